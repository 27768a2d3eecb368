"""The procedural world the tiny model is trained on, and its judge."""
