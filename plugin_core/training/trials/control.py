"""The control of a trial: a plain detector that costs no less than the variants with plugins.

A gain that plain convolutions of the same cost bring as well is no evidence for a plugin. The
control has such convolutions where the trial's plugins are, and begins as the plain detector, as
they do. It is as narrow as it can be and still have no fewer parameters and GFLOPs than any other
variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from plugin_core.inspection.cost import Cost
from plugin_core.training.trials.plugins import CONTROL, STAGES, Plugin


class PlainConvolutions(nn.Module):
    """Two more layers of a residual block, as a block plugin: y = x + W₂ relu(norm(W₁ * x)).

    W₁ are 3×3 convolutions to ``width`` channels, and W₂ is a 1×1 convolution back.

    Args:
        channels: C.
        width: channels between the two, 1 or more.

    Shape: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def control_of_width(width: int, stages: tuple[int, ...]) -> Plugin:
    """Describe the control as a block plugin."""
    name = f"{PlainConvolutions.__module__}:{PlainConvolutions.__name__}"
    return Plugin(name, stages, CONTROL, {"width": width})


def fit_control(
    plugins: Sequence[Plugin],
    costs: Mapping[str, Cost],
    cost_of: Callable[[Plugin], Cost],
) -> tuple[Plugin, str]:
    """Choose the control, and say in a sentence what it costs.

    Args:
        plugins: that are tried. The control is in the stages of all of them together, or in all
            stages where none is a block plugin.
        costs: of each variant, the plain one first.
        cost_of: counts that of a control.

    Raises:
        ValueError: if the detector takes no block plugins, or no variant costs more than it.
    """
    plain, *others = costs.values()
    if all(c.parameters <= plain.parameters and c.flops <= plain.flops for c in others):
        raise ValueError(
            "--control: no plugin has parameters or GFLOPs of its own, so the plain detector is "
            "the control already; leave it out"
        )
    stages = tuple(sorted({stage for plugin in plugins for stage in plugin.stages})) or STAGES

    try:  # cost is linear in the width
        one, two = (cost_of(control_of_width(width, stages)) for width in (1, 2))
    except ValueError as error:
        raise ValueError(f"--control: {error}") from error
    parameters = max(c.parameters for c in others)
    flops = max(c.flops for c in others)
    missing = (
        (parameters - one.parameters) / (two.parameters - one.parameters),
        (flops - one.flops) / max(1, two.flops - one.flops),
    )
    width = 1 + max(0, *map(math.ceil, missing))
    cost = Cost(
        one.parameters + (width - 1) * (two.parameters - one.parameters),
        one.flops + (width - 1) * (two.flops - one.flops),
    )
    return control_of_width(width, stages), (
        f"The control is the plain detector with two more convolutions in each block of stages "
        f"{', '.join(map(str, stages))}, of width {width}: {cost.parameters:,} parameters and "
        f"{cost.flops / 1e9:.2f} GFLOPs an image, where the variants have up to {parameters:,} and "
        f"{flops / 1e9:.2f} (plain {plain.parameters:,} and {plain.flops / 1e9:.2f}). Its own "
        "weights are random behind a factor of 0, as those of block plugins are; so it begins as "
        "the plain detector."
    )
