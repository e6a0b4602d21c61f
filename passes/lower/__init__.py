"""From a rewritten program to what an inner backend compiles."""
