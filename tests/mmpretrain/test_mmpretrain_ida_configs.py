"""The configs of IDA's classifiers: they build, train a step, and schedule as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmpretrain.registry import MODELS, TRANSFORMS
from mmpretrain.structures import DataSample
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "mmpretrain" / "ida"
NAMES = sorted(path.name for path in FOLDER.glob("*.py"))
LIGHT = "resnet101-ida_4xb32_coco2014-448px.py"


def config(name: str, **options: Any) -> Config:
    cfg = Config.fromfile(FOLDER / name)
    cfg.merge_from_dict({"model.backbone.init_cfg": None, **options})
    return cfg


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_trains_a_step(name):
    # With a ResNet-18, as that is quicker; the head takes its 512 channels.
    small = {"model.backbone.depth": 18, "model.head.in_channels": 512}
    cfg = config(name, **small)
    model = MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    pipeline = [TRANSFORMS.build(step) for step in cfg.train_pipeline[1:]]
    inputs, samples = [], []
    for labels in ([1, 4], []):
        results: Any = {"img": np.random.randint(0, 255, (40, 60, 3), np.uint8), "gt_label": labels}
        for transform in pipeline:
            results = transform(results)
        inputs.append(results["inputs"][:, :64, :64])
        samples.append(results["data_samples"])
    before = model.head.classifier.head[0].weight.detach().clone()
    log = model.train_step({"inputs": inputs, "data_samples": samples}, optimizer)
    assert torch.isfinite(log["loss"])
    assert not torch.equal(before, model.head.classifier.head[0].weight)
    size = 224 if "224px" in name else 448
    assert results["data_samples"].img_shape == (size, size)
    model.eval()
    batch = {"inputs": inputs, "data_samples": [DataSample() for _ in inputs]}
    found = model.test_step(batch)
    assert found[0].pred_score.shape == (20 if "voc" in name else 80,)


@pytest.mark.parametrize("name", [name for name in NAMES if "-asl" not in name])
def test_weighted_cross_entropy_is_the_loss_of_the_reproductions_logs(name):
    cfg = config(name)
    batch, classes = cfg.train_dataloader.batch_size, cfg.model.head.num_classes
    x, y = torch.randn(batch, classes), (torch.rand(batch, classes) < 0.05).float()
    loss = MODELS.build(cfg.model.head.loss)
    expected = nn.MultiLabelSoftMarginLoss(reduction="sum")(x, y)  # a mean over the classes
    torch.testing.assert_close(loss(x, y, avg_factor=batch), expected)


def test_small_training_turns_after_a_fifth_of_its_20_epochs():
    cycle = config("resnet50-ida_1xb64_coco2014-224px.py").param_scheduler
    assert [(node.begin, node.end) for node in cycle] == [(0, 20), (0, 4), (4, 20)]
    assert cycle[0].pct_start == 0.2 and cycle[1].eta_min == 0.85


def test_learning_rate_and_first_beta_are_those_of_pytorchs_one_cycle():
    cfg = config(LIGHT)
    steps = 20  # of each of the 80 epochs
    parameter = nn.Parameter(torch.zeros(2, 2))
    ours = torch.optim.Adam([parameter], lr=1e-4, betas=cfg.optim_wrapper.optimizer.betas)
    theirs = torch.optim.Adam([parameter], lr=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=1e-4, steps_per_epoch=steps, epochs=80, pct_start=0.2
    )
    schedulers = []
    for node in cfg.param_scheduler:
        arguments = dict(node, optimizer=ours, epoch_length=steps)
        kind = PARAM_SCHEDULERS.get(arguments.pop("type"))
        arguments.pop("convert_to_iter_based")
        schedulers.append(kind.build_iter_from_epoch(**arguments))
    for _ in range(80 * steps - 1):
        ours.step()
        theirs.step()
        group, expected = ours.param_groups[0], theirs.param_groups[0]
        assert group["lr"] == pytest.approx(expected["lr"], rel=1e-6)
        # It turns a step later.
        assert group["betas"][0] == pytest.approx(expected["betas"][0], abs=6e-4)
        schedule.step()
        for scheduler in schedulers:
            scheduler.step()


def test_weights_alone_are_decayed():
    cfg = config(LIGHT, **{"model.backbone.depth": 18, "model.head.in_channels": 512})
    cfg.model.head.heavy = True
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() > 1}
