"""`make demo`: a model fine-tuned plain and routed, with its data."""
