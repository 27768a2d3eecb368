"""How heads remember."""
