"""Trainings as jobs of a Slurm cluster, which submitit submits."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_core.files import write_text
from plugin_core.processes import one_thread

# submitit's own limit is 5 minutes.
_TIME_LIMIT_MINUTES = 24 * 60


@dataclass
class _Command:
    """What a job runs. A job that is preempted or out of time is queued again and goes on."""

    words: Sequence[str]
    log: str
    variables: Mapping[str, str]

    def __call__(self) -> int:
        with open(self.log, "ab") as output:
            return subprocess.call(
                self.words,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.variables},
            )

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class SlurmProcess:
    """A job, as a process."""

    job: Any
    log: Path

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception as error:  # of submitit, or whatever the job raised
            with open(self.log, "a", encoding="utf-8") as log:
                reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
                log.write(f"\nerror: job {self.job.job_id} ({self.job.state}): {reason}\n")
            return 1


class SlurmLauncher:
    """Jobs of a Slurm cluster. They outlive this process, and the next one takes them over.

    Args:
        folder: of submitit's files, which all nodes see.
        options: submitit's of Slurm, such as ``{"partition": "gpu", "gpus_per_node": "1"}``.
        cluster: submitit's name of it; "local" are processes, for a try.

    Raises:
        ValueError: if submitit is missing, this is no such cluster, or an option is unknown.
    """

    def __init__(self, folder: Path, options: Mapping[str, str], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError(
                f"--launcher slurm: needs submitit: `pip install -e .[slurm]` ({error})"
            ) from error
        self.folder = folder.absolute()
        self.job_class = getattr(submitit, f"{cluster.capitalize()}Job")
        options = {key.replace("-", "_"): value for key, value in options.items()}
        if not {"time", "timeout_min"} & options.keys():
            options["timeout_min"] = str(_TIME_LIMIT_MINUTES)
        try:
            self.executor = submitit.AutoExecutor(folder=self.folder, cluster=cluster)
            self.executor.update_parameters(
                **{f"slurm_{key}": _number(value) for key, value in options.items()}
            )
        except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
            raise ValueError(f"--launcher slurm: {' '.join(str(error).split())}") from error

    def start(self, command: Sequence[str], log: Path, place: int) -> SlurmProcess:
        """Submit a command, or take over the job that an earlier process has submitted for it."""
        log = log.absolute()
        note = log.with_name("slurm_job.txt")
        if note.is_file():
            job = self.job_class(self.folder, note.read_text(encoding="utf-8"))
            if not job.done(force_check=True):
                return SlurmProcess(job, log)
        job = self.executor.submit(_Command(list(command), str(log), one_thread()))
        write_text(note, str(job.job_id))
        return SlurmProcess(job, log)

    def stop(self, processes: Sequence[SlurmProcess]) -> None:
        for process in processes:
            if not process.job.done():
                process.job.cancel(check=False)


def _number(text: str) -> int | float | str:
    """Read a number where the text is one, as submitit asks for numbers."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
