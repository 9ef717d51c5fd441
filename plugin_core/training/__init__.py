"""What keeps a training alive, and its folder in order, in either framework."""

from plugin_core.training.errors import RunError

__all__ = ["RunError"]
