"""Trying plugins on one's own data; it knows neither framework."""

from plugin_core.processes import Launcher, LocalLauncher
from plugin_core.training.trials.configs import (
    config_path,
    derive_configs,
    difference,
    digest,
)
from plugin_core.training.trials.control import PlainConvolutions
from plugin_core.training.trials.plan import (
    Framework,
    Plan,
    Run,
    duration,
    measures_time,
    read_duration,
    read_plan,
    write_plan,
)
from plugin_core.training.trials.plugins import (
    CONTROL,
    DETECTOR_PLUGINS,
    PLAIN,
    STAGES,
    Plugin,
    read_plugins,
)
from plugin_core.training.trials.running import (
    MEASURED_STEPS,
    Outcome,
    average_precision,
    measure,
    run_all,
    summary,
    training_section,
)
from plugin_core.training.trials.slurm import SlurmLauncher

__all__ = [
    "CONTROL",
    "DETECTOR_PLUGINS",
    "Framework",
    "Launcher",
    "LocalLauncher",
    "MEASURED_STEPS",
    "Outcome",
    "PLAIN",
    "PlainConvolutions",
    "Plan",
    "Plugin",
    "Run",
    "STAGES",
    "SlurmLauncher",
    "average_precision",
    "config_path",
    "derive_configs",
    "difference",
    "digest",
    "duration",
    "measure",
    "measures_time",
    "read_duration",
    "read_plan",
    "read_plugins",
    "run_all",
    "summary",
    "training_section",
    "write_plan",
]
