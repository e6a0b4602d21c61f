"""What users call, and what stands between their model and a plan."""
