"""Cost of a model, and pictures of its attention."""
