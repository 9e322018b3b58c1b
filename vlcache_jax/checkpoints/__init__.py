"""Model directories, opened and read piece by piece."""
