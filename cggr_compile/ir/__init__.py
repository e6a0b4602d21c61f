"""A training step as a program: its graph and what is known of it, and the analyses that passes share."""
