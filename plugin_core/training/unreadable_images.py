"""Errors and counts of images that cannot be read."""

from __future__ import annotations

from collections import Counter

from plugin_core.training.errors import RunError

_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}  # of JPEG and PNG


class UnreadableImage(RunError):
    """An image of the user's data cannot be read.

    Args:
        message: names the image and what is wrong with it. A worker process of PyTorch wraps its
            traceback around the message; only the message is kept.
    """

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.rpartition(f"{type(self).__name__}: ")[2].split())
        super().__init__(self.message)


def ends_well(start: bytes, end: bytes) -> bool:
    """Tell whether a JPEG or PNG has its end; one that is cut off, or of another format, has not.

    Args:
        start: first bytes of the file, 2 or more.
        end: last bytes of the file.
    """
    mark = _ENDS.get(start[:2])
    return mark is not None and end.rstrip(b"\0").endswith(mark)


def summarize_left_out(names: Counter[str]) -> str | None:
    """Say how many images were left out, and which; None if none was.

    Args:
        names: of the images, with the times that each was left out.
    """
    if not names:
        return None
    few = ", ".join(map(repr, list(names)[:5])) + (", …" if len(names) > 5 else "")
    return f"{len(names)} unreadable images were left out, {names.total()} times in all: {few}"
