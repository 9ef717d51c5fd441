"""Checkpoints of both frameworks and of the methods' authors: reading, recognising, converting."""
