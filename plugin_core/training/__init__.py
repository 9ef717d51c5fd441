"""What keeps a training alive, and its folder in order, in either framework."""
