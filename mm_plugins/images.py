"""Reading images of which some are damaged: a clear error, or left out by name."""

from __future__ import annotations

import copy
import io
import logging
import os
from collections import Counter
from contextlib import suppress
from typing import Any

import mmcv
import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

from plugin_core.training.unreadable_images import (
    UnreadableImage,
    ends_well,
    summarize_left_out,
)

_MOST_IN_A_ROW = 1000  # as often as mmengine's datasets draw another image


@TRANSFORMS.register_module()
class LoadReadableImage(LoadImageFromFile):
    """Loads an image as ``LoadImageFromFile`` does, and never half of one.

    Args:
        left_out: file that collects the names of images that cannot be read. Such an image is
            left out, and the dataset draws another one. Without the file it is an error.
        **arguments: of ``LoadImageFromFile``.
    """

    def __init__(self, *, left_out: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.left_out = left_out
        self._told: set[str] = set()
        self._whole: set[str] = set()  # images that were read to their end
        self._in_a_row = 0

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        path = results["img_path"]
        try:
            image = self._read(path)
        except UnreadableImage as error:
            self._in_a_row += 1
            if self.left_out is None:
                if self.ignore_empty:
                    return None
                raise
            if self._in_a_row == _MOST_IN_A_ROW:
                raise UnreadableImage(
                    f"{_MOST_IN_A_ROW} images in a row cannot be read; the last: {error}"
                ) from error
            if path not in self._told:
                # Other processes may have told of it.
                with suppress(FileNotFoundError), open(self.left_out, encoding="utf-8") as file:
                    self._told.update(file.read().splitlines())
            if path not in self._told:
                self._told.add(path)
                print_log(f"{error}; it is left out", "current", logging.WARNING)
            # One short write, which those of other processes do not mix with
            with open(self.left_out, "a", encoding="utf-8") as file:
                file.write(f"{path}\n")
            return None
        self._in_a_row = 0
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results

    def _read(self, path: str) -> np.ndarray:
        try:
            if self.file_client_args is not None:
                client = fileio.FileClient.infer_client(self.file_client_args, path)
                content = client.get(path)
            else:
                content = fileio.get(path, backend_args=self.backend_args)
        except OSError as error:
            raise UnreadableImage(f"image {path!r} cannot be read: {error.strerror}") from error
        if not content:
            raise UnreadableImage(f"image {path!r} cannot be read: it is empty (0 bytes)")
        if path not in self._whole:
            _check_whole(path, content)
            self._whole.add(path)
        try:
            image = mmcv.imfrombytes(content, flag=self.color_type, backend=self.imdecode_backend)
        except Exception as error:  # a damaged file makes the readers raise almost anything
            reason = " ".join(str(error).split())[:80]
            raise UnreadableImage(f"image {path!r} cannot be read: {reason}") from error
        if image is None:
            raise UnreadableImage(
                f"image {path!r} cannot be read: it is no image (it begins with {content[:12]!r})"
            )
        return image


def _check_whole(path: str, content: bytes) -> None:
    """Check that a file can be read to its end; OpenCV makes up what it cannot decode.

    A JPEG is decoded at an eighth of its size, which takes a part of the time.
    """
    if ends_well(content, content[-64:]) and not content.startswith(b"\xff\xd8"):
        return  # a PNG, whose damage in the middle OpenCV refuses
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("L", (image.width // 8, image.height // 8))
            image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return  # OpenCV reads more formats, and larger images
    except Exception as error:
        raise UnreadableImage(
            f"image {path!r} cannot be read: it is damaged or cut off ({str(error)[:80]})"
        ) from error


def check_images_while_reading(node: Any, left_out: str | None) -> Any:
    """Copy a config with :class:`LoadReadableImage` in the place of ``LoadImageFromFile``.

    Args:
        node: config of a data loader or of hooks.
        left_out: file that collects the names of unreadable images, which are errors without it.
    """
    if isinstance(node, (list, tuple)):
        return type(node)(check_images_while_reading(part, left_out) for part in node)
    if not isinstance(node, dict):
        return node
    node = copy.copy(node)
    for key, value in node.items():
        node[key] = check_images_while_reading(value, left_out)
    kind = node.get("type")
    if kind is LoadImageFromFile or (
        isinstance(kind, str) and kind.rpartition(".")[2] == "LoadImageFromFile"
    ):
        node |= {"type": LoadReadableImage, "left_out": left_out}
    return node


def count_left_out(path: str) -> str | None:
    """Say how many images were left out, and which; None if there were none."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        names = Counter(file.read().splitlines())
    told = summarize_left_out(names)
    return f"{told} (all of them in {path})" if told else None
