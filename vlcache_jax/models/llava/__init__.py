"""The LLaVA family: 1.5 and NeXT."""
