"""Detectron2's checkpointer, with checkpoints that stay whole and weights that are checked."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.errors import StateDictError, few
from plugin_core.files import replacing, write_text
from plugin_core.published_names import find_cold, find_unread, rename_all_published
from plugin_core.training import RunError
from plugin_core.training.checkpoint_files import check_readable, checkpoints_in
from plugin_core.training.checkpoint_files import find_resumable as find_newest
from plugin_core.training.names import fit_names

logger = logging.getLogger("detectron2.plugins")

_STATE_DICTS = ("state_dict", "model_state_dict", "ema_state_dict")  # besides Detectron2's "model"


class CheckpointError(RunError):
    """A checkpoint cannot be written, or does not fit."""


class PluginCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that never leaves half a checkpoint, and reads MMDetection's.

    Args:
        model: a detector, maybe wrapped for several processes.
        save_dir: folder of the checkpoints.
        setting: that names the weights to load, for messages.
        whole: whether the model runs with the weights alone, so that all shapes have to fit.
        thing_classes: names of the classes, saved with each checkpoint.
        **arguments: of ``DetectionCheckpointer``.

    Attributes:
        resumed: whether :meth:`resume_or_load` has found a checkpoint to go on from.
        last_good: path of the last checkpoint that this run has written or gone on from.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        setting: str = "MODEL.WEIGHTS",
        whole: bool = False,
        thing_classes: Sequence[str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, save_dir, **arguments)
        self.setting, self.whole, self.thing_classes = setting, whole, thing_classes
        self.resumed, self.last_good = False, ""

    def save(self, name: str, **kwargs: Any) -> None:
        if self.thing_classes:
            kwargs["thing_classes"] = [str(c) for c in self.thing_classes]
        if not self.save_dir or not self.save_to_disk or "://" in self.save_dir:
            super().save(name, **kwargs)
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path) as file:
                torch.save({"model": self.model.state_dict(), **states, **kwargs}, file)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a full disk
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            if shutil.disk_usage(self.save_dir).free < 1 << 20:
                reason = os.strerror(errno.ENOSPC)
            raise CheckpointError(
                f"checkpoint {path!r} cannot be written: {reason}; last good checkpoint: "
                f"{self.last_good or 'none'}. Make room, then go on with --resume"
            ) from error
        self.last_good = path

    def finish(self) -> None:
        """Make the checkpoint that the training has gone on from its final one.

        A training may be killed when its last step is saved, and its final checkpoint is not.
        """
        final = os.path.join(self.save_dir, "model_final.pth")
        if self.save_to_disk and os.path.basename(self.last_good) != "model_final.pth":
            with replacing(final) as file, open(self.last_good, "rb") as last:
                shutil.copyfileobj(last, file)
            self.tag_last_checkpoint("model_final.pth")
            self.last_good = final

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        if "://" in self.save_dir:  # which the framework lists
            self.resumed = self.whole = resume and self.has_checkpoint()
            return super().resume_or_load(path, resume=resume)
        found, damaged = _find(self.save_dir) if resume else (None, [])
        for one in damaged:
            logger.warning("--resume: passing over %r, which is damaged or missing", one)
        if found is None:
            if resume:
                logger.warning(
                    "--resume: there is no checkpoint in %r; beginning anew", self.save_dir
                )
            elif self.save_dir and (names := checkpoints_in(self.save_dir)):
                logger.warning(
                    "%r has checkpoints of an earlier training (%s), which a later --resume may "
                    "take for this one's; use another folder",
                    self.save_dir,
                    few(names),
                )
            return self.load(path, checkpointables=[])
        logger.info("--resume: going on from %r", found)
        self.setting, self.whole, self.resumed, self.last_good = "--resume", True, True, found
        return self.load(found)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return {"model": find_state_dict(read_checkpoint(filename))}
        loaded = super()._load_file(filename)
        inner = loaded["model"]
        found = [inner[key] for key in _STATE_DICTS if isinstance(inner.get(key), Mapping)]
        return {"model": dict(found[0])} if found else loaded

    def _load_model(self, checkpoint: Any) -> Any:
        state = checkpoint["model"]
        for name in [n for n, value in state.items() if not hasattr(value, "shape")]:
            del state[name]  # such as the number of an epoch
        if not checkpoint.get("matching_heuristics", False):
            fit_names(state, self.model.state_dict().keys(), self.setting)
        rename_all_published(state, self.model)
        given, example = dict(state), next(iter(state), "nothing")
        try:
            result = super()._load_model(checkpoint)
        except StateDictError as error:
            raise CheckpointError(f"{self.setting}: {error}") from error
        shapes = [
            f"{name} ({tuple(old)} in the file, {tuple(new)} in the model)"
            for name, old, new in result.incorrect_shapes
        ]
        if len(result.unexpected_keys) + len(shapes) >= len(given):
            raise CheckpointError(
                f"{self.setting}: no tensor of the checkpoint fits the model (it holds "
                f"{shapes[0] if shapes else repr(example)}); name a checkpoint of this detector"
            )
        missing = result.missing_keys
        if told := find_unread(self.model, missing, result.unexpected_keys, given):
            raise CheckpointError(f"{self.setting}: {told}")
        if shapes and self.whole:
            raise CheckpointError(
                f"{self.setting}: the checkpoint is of another model, as with another number of "
                f"classes; these weights do not fit: {few(shapes)}"
            )
        if self.whole and (cold := find_cold(self.model, missing)):
            raise CheckpointError(
                f"{self.setting}: the checkpoint lacks weights of block plugins, which would be "
                f"random: {few(cold)}"
            )
        return result


def find_resumable(folder: str) -> str | None:
    """Find the checkpoint that ``--resume`` goes on from; None if there is none.

    Raises:
        RunError: if there are checkpoints and none is whole.
    """
    return _find(folder)[0]


def _find(folder: str) -> tuple[str | None, list[str]]:
    return find_newest(folder, "model_{}.pth", final=["model_final.pth"])


def check_weights(model: nn.Module, path: str, setting: str, *, whole: bool) -> None:
    """Check that a file of weights is whole and fits a model, which is given them.

    Args:
        model: that is not needed any more, maybe without memory for its parameters.
        path: of a file on this machine.
        setting: that names it, for the message.
        whole: whether the model runs with these weights alone, so that all shapes have to fit.

    Raises:
        RunError: names the setting and what is wrong.
    """
    check_readable(path, setting)
    checkpointer = PluginCheckpointer(model, setting=setting, whole=whole)
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the run itself tells what it loads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters without memory
            checkpointer.load(path)
    finally:
        logging.disable(before)
