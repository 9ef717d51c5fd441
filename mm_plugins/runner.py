"""A runner of mmengine whose trainings survive: bad steps, bad images, kills and a full disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from mm_plugins.checkpoint_files import REPLACING, SafeCheckpointHook
from mm_plugins.images import check_images_while_reading, count_left_out
from mm_plugins.non_finite import GuardedAmpOptimWrapper, GuardedMixin, GuardedOptimWrapper
from mm_plugins.schedules import Changes, replay, take_new_settings
from mm_plugins.weights import fit_names

UNREADABLE = ("error", "skip")  # values of the config's `unreadable_images`
_WRAPPERS: Mapping[type, type] = {
    OptimWrapper: GuardedOptimWrapper,
    AmpOptimWrapper: GuardedAmpOptimWrapper,
}


@RUNNERS.register_module()
class SafeRunner(Runner):
    """Runs a config with safe classes in the place of mmengine's own; a user's own types stay.

    - ``OptimWrapper`` and ``AmpOptimWrapper`` leave out steps whose loss is not finite
      (``mm_plugins.non_finite``).
    - ``LoadImageFromFile`` refuses damaged images, or leaves them out with
      ``unreadable_images = "skip"`` in the config (``mm_plugins.images``).
    - ``CheckpointHook`` keeps the last good checkpoint whole (``mm_plugins.checkpoint_files``).
    - A resumed training takes the schedule of its config (``mm_plugins.schedules``).

    Attributes:
        copies: files to read in the place of the config's, by setting; the launcher sets them.
        begins_anew: resume nothing; the launcher sets it where it has found nothing to go on from.
    """

    copies: ClassVar[Mapping[str, str]] = {}
    begins_anew: ClassVar[bool] = False

    _train_dataloader: Any
    _val_dataloader: Any
    _test_dataloader: Any
    _resume: bool

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        for setting, path in self.copies.items():
            name, *keys = setting.split(".")
            node = getattr(self, f"_{name}")
            for key in keys[:-1]:
                node = node[int(key) if key.isdigit() else key]
            node[keys[-1]] = path
        read = check_images_while_reading
        self._train_dataloader = read(self._train_dataloader, self._left_out)
        self._val_dataloader = read(self._val_dataloader, None)
        self._test_dataloader = read(self._test_dataloader, None)
        self._changes: Changes | None = None

    @classmethod
    def from_cfg(cls, cfg: Config) -> SafeRunner:
        cfg = cfg.copy()
        cfg.pop("runner_type", None)  # MMDetection's own script runs the config that is written
        return super().from_cfg(cfg)

    @property
    def _left_out(self) -> str | None:
        skips = self.cfg.get("unreadable_images") == "skip"
        return os.path.join(self.log_dir, "unreadable_images.txt") if skips else None

    def register_hooks(
        self, default_hooks: dict | None = None, custom_hooks: list | None = None
    ) -> None:
        checkpoint = {"type": "CheckpointHook", "interval": 1}  # mmengine's default
        default_hooks = {"checkpoint": checkpoint, **(default_hooks or {})}
        hook = default_hooks["checkpoint"]
        if isinstance(hook, dict) and names(hook.get("type"), CheckpointHook):
            default_hooks["checkpoint"] = {**hook, "type": SafeCheckpointHook}
        super().register_hooks(
            default_hooks, check_images_while_reading(custom_hooks, self._left_out)
        )
        self.register_hook(SafeTrainingHook(self._left_out))

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        if isinstance(optim_wrapper, dict) and "optimizer" in optim_wrapper:
            kind = optim_wrapper.get("type", OptimWrapper)
            for plain, guarded in _WRAPPERS.items():
                if names(kind, plain):
                    optim_wrapper = {**optim_wrapper, "type": guarded}
        return super().build_optim_wrapper(optim_wrapper)

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        *arguments: Any,
        backend_args: dict | None = None,
        **keywords: Any,
    ) -> None:
        if not file_client_args and not backend_args and "://" not in str(out_dir):
            backend_args = REPLACING
        super().save_checkpoint(
            out_dir, filename, file_client_args, *arguments, backend_args=backend_args, **keywords
        )

    def load_or_resume(self) -> None:
        if self.begins_anew:
            self._resume = False
        super().load_or_resume()

    def resume(self, filename: str, *arguments: Any, **keywords: Any) -> None:
        self._changes = Changes("", "")
        super().resume(filename, *arguments, **keywords)
        changes, self._changes = self._changes, None
        if not changes.settings:
            return
        self.logger.warning(
            f"Resumed at iteration {self.iter} with other settings, which hold from here on: "
            f"{changes}"
        )
        if changes.of_schedule and self.param_schedulers:
            lists = self.param_schedulers
            for schedulers in lists.values() if isinstance(lists, dict) else [lists]:
                replay(schedulers, self.iter, self.epoch, len(self.train_dataloader))

    def load_checkpoint(
        self, filename: str, map_location: str | Callable = "cpu", *arguments: Any, **keywords: Any
    ) -> dict:
        checkpoint = super().load_checkpoint(filename, map_location, *arguments, **keywords)
        if self._changes is not None and "cfg" in checkpoint.get("meta", {}):  # it is resumed from
            self._changes = Changes(checkpoint["meta"]["cfg"], self.cfg.pretty_text)
            if self._changes.of_schedule and "optimizer" in checkpoint:
                take_new_settings(checkpoint, self.optim_wrapper, self._changes)
        return checkpoint


def names(kind: Any, plain: type) -> bool:
    """Tell whether a config's type is a class of mmengine itself."""
    return kind in (plain, plain.__name__, f"mmengine.{plain.__name__}")


@HOOKS.register_module()
class SafeTrainingHook(Hook):
    """Tells the optimizer's wrapper of losses and images, and at the end what was left out.

    Args:
        left_out: file with the names of images that were left out.
    """

    priority = "VERY_HIGH"

    def __init__(self, left_out: str | None = None) -> None:
        self.left_out = left_out

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            fit_names(checkpoint, runner.model)

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, GuardedMixin):

            def keep(module: Any, inputs: Any, output: Any) -> None:
                wrapper.losses = output if isinstance(output, dict) else {}

            self._handle = runner.model.register_forward_hook(keep)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if isinstance(runner.optim_wrapper, GuardedMixin):
            runner.optim_wrapper.batch = data_batch

    def after_train(self, runner: Runner) -> None:
        if self.left_out and is_main_process():
            told = count_left_out(self.left_out)
            runner.logger.warning(told or "No image was left out as unreadable.")
