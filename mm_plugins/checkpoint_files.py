"""Writing mmengine's checkpoints so that the last good one stays whole, whatever happens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from plugin_core.files import replacing, write_text

REPLACING = {"backend": "replacing"}


class ReplacingBackend(LocalBackend):
    """Writes a file beside the old one, whose place it takes when it is whole."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        os.makedirs(os.path.dirname(filepath), exist_ok=True)
        with replacing(filepath) as file:
            file.write(obj)


register_backend(REPLACING["backend"], ReplacingBackend)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Saves checkpoints as mmengine does, but removes an old one only when the new one is written.

    ``last_checkpoint`` names the old one until then, too. The best one before a resume is looked
    for in the run's own folder, which may be a copy. Arguments are those of mmengine's hook.
    """

    best_ckpt_path: str | None
    best_ckpt_path_dict: dict[str, str | None]

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if self.save_best is None:
            return
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = self._here(self.best_ckpt_path)
        else:
            for key, path in self.best_ckpt_path_dict.items():
                self.best_ckpt_path_dict[key] = self._here(path)

    def _here(self, path: str | None) -> str | None:
        return path and self.file_backend.join_path(self.out_dir, os.path.basename(path))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        path = self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", path)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_text(os.path.join(runner.work_dir, "last_checkpoint"), path)
        if outdated is not None:
            self._remove(
                self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated))
            )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        # mmengine removes what these attributes name before it saves.
        if not self.save_best:
            return
        if len(self.key_indicators) == 1:
            old, self.best_ckpt_path = self.best_ckpt_path, None
            super()._save_best_checkpoint(runner, metrics)
            self.best_ckpt_path = self._newer(old, self.best_ckpt_path)
        else:
            olds = dict(self.best_ckpt_path_dict)
            self.best_ckpt_path_dict = dict.fromkeys(olds)
            super()._save_best_checkpoint(runner, metrics)
            self.best_ckpt_path_dict = {
                key: self._newer(olds.get(key), new)
                for key, new in self.best_ckpt_path_dict.items()
            }

    def _newer(self, old: str | None, new: str | None) -> str | None:
        if old and new and old != new:
            self._remove(old)
        return new or old

    def _remove(self, path: str) -> None:
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # of a strategy that writes folders
            self.file_backend.rmtree(path)
