"""What the tests of trials in both frameworks derive from a config, and look for in the models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plugin_core.block_plugins import BlockPlugin
from plugin_core.training.trials import PLAIN, config_path, derive_configs, read_plugins


def derive(trial: Any, names: list[str], out: Path) -> list[str]:
    """Write the derived configs unchecked, which is quicker; returns the labels."""
    plugins = read_plugins(names)
    (out / "configs").mkdir(parents=True)
    labels = {PLAIN: None, **{plugin.label: plugin for plugin in plugins}}
    for label, plugin in labels.items():
        config_path(trial, out, label).write_text(trial.derive(plugin))
    return list(labels)


def inserted(model: nn.Module) -> dict[str, BlockPlugin]:
    """The block plugins that start as the identity and train, by their place in the backbone."""
    return {
        path.removeprefix("backbone.").removeprefix("bottom_up."): module
        for path, module in model.named_modules()
        if isinstance(module, BlockPlugin)
        and float(module.alpha.detach()) == 0
        and all(p.requires_grad for p in module.parameters())
    }


def derived_models(
    trial: Any,
    folder: Path,
    build: Callable[[Any, Path], nn.Module],
    load: Callable[[nn.Module, str], Any],
    key: str,
) -> dict[str, nn.Module]:
    """Build the variants of five plugins, and assert that all begin with the same weights.

    ``key`` is where the framework's checkpoints have the weights.
    """
    out, initial = folder / "out", folder / "initial.pth"
    plugins = read_plugins(["triplet_attention", "ida", "timm:eca", "batchformer_v1", "amc"])
    configs = derive_configs(trial, plugins)
    configs.write(trial, out)
    trial.initialize(3, initial)
    before = torch.load(initial)[key]
    models = {label: build(trial, config_path(trial, out, label)) for label in configs.parameters}
    for label, model in models.items():
        assert sum(p.numel() for p in model.parameters()) == configs.parameters[label]
        torch.manual_seed(9)
        load(model, str(initial))
        state = model.state_dict()
        assert before.keys() <= state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert not inserted(models[PLAIN])
    return models
