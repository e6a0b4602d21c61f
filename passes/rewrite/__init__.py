"""The rewrites: each takes a program and returns another."""
