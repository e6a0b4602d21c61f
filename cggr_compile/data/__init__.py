"""Batches on their way to the model: which rows reach it, and who makes them ready."""
