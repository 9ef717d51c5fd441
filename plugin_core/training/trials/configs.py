"""The configs of a trial: the user's own, and one for each variant."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_core.files import write_text
from plugin_core.inspection.cost import Cost
from plugin_core.training.trials.control import fit_control
from plugin_core.training.trials.plan import Framework
from plugin_core.training.trials.plugins import CONTROL, PLAIN, Plugin


@dataclass(frozen=True)
class Configs:
    """The config of each variant, "plain" first.

    Args:
        texts: label → what its file holds.
        parameters: label → number of parameters.
        control: a sentence about the control, if there is one.
    """

    texts: Mapping[str, str]
    parameters: dict[str, int]
    control: str

    def write(self, framework: Framework, out: Path) -> None:
        """Write them to the folder of a trial."""
        (out / "configs").mkdir(parents=True, exist_ok=True)
        for label, text in self.texts.items():
            write_text(config_path(framework, out, label), text)


def derive_configs(
    framework: Framework, plugins: Sequence[Plugin], control: bool = False
) -> Configs:
    """Derive a config for each plugin, and check all of them.

    Args:
        framework: of the config.
        plugins: that are tried.
        control: whether to add a plain detector that costs as much.

    Raises:
        ValueError: for the config itself, or names each plugin that does not fit, and why.
    """
    texts: dict[str, str] = {}
    parameters, wrong, about_control = {}, [], ""
    with tempfile.TemporaryDirectory() as folder:

        def write(plugin: Plugin | None) -> Path:
            label = plugin.label if plugin else PLAIN
            texts[label] = framework.derive(plugin)
            path = Path(folder, f"{label}{framework.suffix}")
            path.write_text(texts[label], encoding="utf-8")
            return path

        paths = {PLAIN: write(None)}
        parameters[PLAIN] = framework.check(paths[PLAIN])
        for plugin in plugins:
            try:
                paths[plugin.label] = write(plugin)
                parameters[plugin.label] = framework.check(paths[plugin.label])
            except ValueError as error:
                wrong.append(f"--with {plugin.name}: {error}")
        if wrong:
            raise ValueError("\n".join(wrong))
        if control:
            costs = {label: _cost(framework, path) for label, path in paths.items()}
            plain, about_control = fit_control(
                plugins, costs, lambda plugin: _cost(framework, write(plugin))
            )
            parameters[CONTROL] = framework.check(write(plain))
    return Configs(texts, parameters, about_control)


def _cost(framework: Framework, path: Path) -> Cost:
    try:
        return framework.cost(path)
    except Exception as error:  # a model that takes no image alone, or of the model's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"--control: {path.stem} cannot be counted: {reason}") from error


def config_path(framework: Framework, out: Path, label: str) -> Path:
    """Name the config of a variant."""
    return out / "configs" / f"{label}{framework.suffix}"


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Show the settings that differ between two configs, as a diff."""
    old, new = (dict(_flatten(settings)) for settings in (before, after))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            lines += [f"  - {key}: {old[key]}"] if key in old else []
            lines += [f"  + {key}: {new[key]}"] if key in new else []
    return "\n".join(lines)


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def digest(settings: Mapping[str, Any]) -> str:
    """Give a short text that differs between configs that differ."""
    return hashlib.sha256(repr(sorted(_flatten(settings))).encode()).hexdigest()[:16]
