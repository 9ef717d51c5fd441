"""Errors that end a run with one line."""

from __future__ import annotations


class RunError(ValueError):
    """A run cannot go on, and the message tells the user all there is to know."""
