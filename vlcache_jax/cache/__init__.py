"""The key/value cache: its state, and the methods that decide what is kept."""
