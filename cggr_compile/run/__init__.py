"""Steps: what a plan compiles, what a step is given, and what is remembered of it."""
