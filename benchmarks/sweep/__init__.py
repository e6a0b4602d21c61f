"""Every class of transformers at a tiny size against eager: what is examined, how, and the page of the outcome."""
