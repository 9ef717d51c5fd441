"""Trying plugins on one's own data; it knows neither framework."""

from plugin_core.training.trials.control import PlainConvolutions
from plugin_core.training.trials.plan import (
    Framework,
    Plan,
    Run,
    config_path,
    difference,
    digest,
    duration,
    measures_time,
    read_duration,
    read_plan,
    write_configs,
    write_plan,
    write_text,
)
from plugin_core.training.trials.plugins import (
    CONTROL,
    DETECTOR_PLUGINS,
    PLAIN,
    STAGES,
    Plugin,
    read_plugins,
)
from plugin_core.training.trials.processes import environment_of, start, stop, tail
from plugin_core.training.trials.running import (
    MEASURED_STEPS,
    Outcome,
    box_ap,
    measure,
    run_all,
    summary,
)

__all__ = [
    "CONTROL",
    "DETECTOR_PLUGINS",
    "Framework",
    "MEASURED_STEPS",
    "Outcome",
    "PLAIN",
    "PlainConvolutions",
    "Plan",
    "Plugin",
    "Run",
    "STAGES",
    "box_ap",
    "config_path",
    "difference",
    "digest",
    "duration",
    "environment_of",
    "measure",
    "measures_time",
    "read_duration",
    "read_plan",
    "read_plugins",
    "run_all",
    "start",
    "stop",
    "summary",
    "tail",
    "write_configs",
    "write_plan",
    "write_text",
]
