"""The operators: schema, fake, autograd, checks."""
