"""Private and version-dependent parts of torch and transformers, one file a subsystem; imports nothing of ours."""
