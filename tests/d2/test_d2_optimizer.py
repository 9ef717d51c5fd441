"""AdamW with slower parts and gradients clipped together, and SGD as Detectron2 builds it."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer as build_sgd
from torch import nn

from d2_plugins import add_plugin_config
from d2_plugins.optimizer import build_optimizer


def settings(**solver):
    cfg = get_cfg()
    add_plugin_config(cfg)
    cfg.merge_from_list([part for key, value in solver.items() for part in (key, value)])
    return cfg


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict(
        {"backbone": nn.Linear(3, 2), "neck": nn.Linear(2, 2, bias=False), "norm": nn.LayerNorm(2)}
    )


def adamw(**solver):
    return settings(**{"SOLVER.OPTIMIZER": "ADAMW", "SOLVER.BASE_LR": 0.01, **solver})


def test_sgd_is_detectron2s(model):
    cfg = settings()
    ours, theirs = build_optimizer(cfg, model), build_sgd(cfg, model)
    assert type(ours).__name__ == type(theirs).__name__ == "SGD"
    assert ours.state_dict() == theirs.state_dict()


def test_parts_of_the_model_learn_slower_and_norms_decay_by_their_own_setting(model):
    cfg = adamw(
        **{
            "SOLVER.LR_FACTORS": [["backbone", 0.1], ["weight", 0.5]],
            "SOLVER.WEIGHT_DECAY": 0.2,
            "SOLVER.WEIGHT_DECAY_NORM": 0.3,
        }
    )
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    got = {
        names[p]: (round(group["lr"], 6), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert got == {
        "backbone.weight": (0.001, 0.2),
        "backbone.bias": (0.001, 0.2),
        "neck.weight": (0.005, 0.2),
        "norm.weight": (0.005, 0.3),
        "norm.bias": (0.01, 0.3),
    }


def test_shared_parameter_answers_to_all_its_names_and_alike_ones_are_one_group(model):
    model["head"] = model["neck"]
    optimizer = build_optimizer(adamw(**{"SOLVER.LR_FACTORS": [["head", 0.5]]}), model)
    rates = {group["lr"]: len(group["params"]) for group in optimizer.param_groups}
    assert rates[0.005] == 1 and len(optimizer.param_groups) == 3  # norms decay otherwise


@pytest.mark.parametrize("clip_type", ["full_model", "norm"])
def test_gradients_are_clipped_together_or_each(model, clip_type):
    cfg = adamw(
        **{
            "SOLVER.CLIP_GRADIENTS.ENABLED": True,
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": clip_type,
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.5,
        }
    )
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    if clip_type == "full_model":
        torch.testing.assert_close(norms.norm(), torch.tensor(0.5), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(norms, torch.full_like(norms, 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"SOLVER.OPTIMIZER": "ADAM"}, "SOLVER.OPTIMIZER: expected SGD or ADAMW, got 'ADAM'"),
        (
            {"SOLVER.LR_FACTORS": ["backbone", 0.1]},
            "SOLVER.LR_FACTORS: expected pairs .* 'backbone'",
        ),
        ({"SOLVER.LR_FACTORS": [["backbone", -1]]}, "SOLVER.LR_FACTORS: expected pairs"),
        ({"SOLVER.LR_FACTORS": [["encoder", 0.1]]}, "no parameter of the model has 'encoder'"),
        (
            {"SOLVER.OPTIMIZER": "SGD", "SOLVER.LR_FACTORS": [["backbone", 0.1]]},
            "SOLVER.LR_FACTORS: is for SOLVER.OPTIMIZER ADAMW",
        ),
        (
            {
                "SOLVER.OPTIMIZER": "SGD",
                "SOLVER.CLIP_GRADIENTS.ENABLED": True,
                "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
            },
            "CLIP_TYPE: is for SOLVER.OPTIMIZER ADAMW",
        ),
        (
            {
                "SOLVER.CLIP_GRADIENTS.ENABLED": True,
                "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "all",
            },
            "CLIP_TYPE: expected value, norm or full_model, got 'all'",
        ),
    ],
)
def test_wrong_setting_is_named(model, solver, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(adamw(**solver), model)
