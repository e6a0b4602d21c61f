"""Triton implementations of the `cggr` operators, one module a kernel; `reference` says what they compute."""
