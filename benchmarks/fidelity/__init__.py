"""How near a compressed cache stays to the full one on text: real prose, and questions about it."""
