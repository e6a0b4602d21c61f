"""`cggr.check`: routed against eager training. Its eager side shares nothing with the compiler."""
