"""Each config of configs/mmpretrain/batchformer builds, trains a step and predicts, made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmpretrain.structures import DataSample
from mmpretrain.utils import register_all_modules

import mm_plugins  # noqa: F401
from mm_plugins.mmpretrain.balanced_softmax_loss import BalancedSoftmaxLoss
from mm_plugins.mmpretrain.long_tail import LongTailMetric

FOLDER = Path(__file__).resolve().parents[2] / "configs/mmpretrain/batchformer"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
LONG_TAIL = [name for name in CONFIGS if name.startswith("resnet")]
SMALL = {"embed_dims": 16, "num_layers": 12, "num_heads": 2, "feedforward_channels": 16}


@pytest.fixture(autouse=True)
def _scope() -> Any:
    register_all_modules(init_default_scope=False)
    MessageHub.get_current_instance().update_info("max_iters", 10)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


def small(name: str) -> Config:
    cfg = Config.fromfile(CONFIGS[name])
    if name.startswith("deit"):
        cfg.model.backbone.arch = SMALL
        options = {"model.backbone.img_size": 32}
        options |= {"model.head.in_channels": 16, "model.head.num_classes": 3}
        options |= {"model.head.loss.num_classes": 3, "model.data_preprocessor.num_classes": 3}
    elif name.startswith("moco"):
        options = {"model.backbone.base_channels": 8, "model.backbone.norm_cfg.type": "BN"}
        options |= {"model.neck.in_channels": 256, "model.neck.hid_channels": 16}
        options |= {"model.neck.norm_cfg": {"type": "BN1d"}, "model.backbone.frozen_stages": -1}
        if "mocov3" in name:
            options |= {"model.head.predictor.hid_channels": 16}
            options |= {"model.head.predictor.norm_cfg": {"type": "BN1d"}}
        else:
            options |= {"model.queue_len": 16}
    else:
        options = {"model.head.num_classes": 3, "data_preprocessor.num_classes": 3}
        if "resnet32" not in name:
            wide = 256 if "resnet50" in name else 64
            options |= {"model.backbone.base_channels": 8, "model.head.in_channels": wide}
    cfg.merge_from_dict(options)
    return cfg


def build(cfg: Config) -> Any:
    torch.manual_seed(0)
    if "data_preprocessor" in cfg and not cfg.model.get("data_preprocessor"):
        cfg.model.data_preprocessor = cfg.data_preprocessor  # as the runner does
    model = MODELS.build(cfg.model)
    for module in model.modules():
        if isinstance(module, BalancedSoftmaxLoss):
            module.set_counts([9, 5, 2])
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_trains_and_the_model_predicts(name: str) -> None:
    cfg = small(name)
    model = build(cfg).train()
    if name.startswith("deit"):  # whose classifier starts at 0
        torch.nn.init.normal_(model.head.layers.head.weight)
    wrapper = build_optim_wrapper(
        model,
        {k: v for k, v in cfg.optim_wrapper.items() if k not in ("type", "loss_scale")},
    )  # without mixed precision
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trained: dict[str, torch.Tensor] = {}
    for n, p in model.named_parameters():
        if "batchformer." in n and p.requires_grad:
            p.register_hook(lambda gradient, n=n: trained.update({n: gradient}))
    images = torch.randint(0, 255, (4, 3, 32, 32))
    samples = [DataSample().set_gt_label(k) for k in (0, 1, 2, 0)]
    if name.startswith("moco"):
        data = {"inputs": [images, images.flip(3)], "data_samples": samples}
    else:
        data = {"inputs": list(images), "data_samples": samples}
    losses = model.train_step(data, wrapper)
    assert torch.isfinite(losses["loss"])
    after = dict(model.named_parameters())
    assert any(not torch.equal(old, after[n]) for n, old in before.items())
    assert all(gradient.any() for gradient in trained.values())
    own = {n for n in after if "batchformer." in n}
    assert own
    assert trained.keys() == (set() if "mocov3" in name else own)  # there it stays as it is drawn
    if not name.startswith("moco"):
        with torch.no_grad():
            found = model.eval().val_step({"inputs": list(images), "data_samples": samples})
        assert [sample.pred_score.shape for sample in found] == [(3,)] * 4


@pytest.mark.parametrize("name", LONG_TAIL)
def test_long_tails_are_trained_as_the_authors_do(name: str) -> None:
    cfg = small(name)
    model = build(cfg)
    assert model.head.loss_module.loss_weight == 3.0
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {id(group["params"][0]): group["lr"] for group in wrapper.optimizer.param_groups}
    base = cfg.optim_wrapper.optimizer.lr
    for parameter in model.head.batchformer.parameters():
        assert rates[id(parameter)] == pytest.approx(0.1 * base)
    assert rates[id(model.head.fc.weight)] == base
    assert isinstance(METRICS.build(cfg.test_evaluator[1]), LongTailMetric)
    assert cfg.train_dataloader.drop_last
    assert cfg.default_hooks.checkpoint.save_best == "accuracy/top1"
    assert cfg.train_cfg.val_interval == 1
    assert METRICS.build(cfg.val_evaluator[0]).prefix == "accuracy"
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert DATASETS.get(loader.dataset.type) is not None
        for step in loader.dataset.pipeline:
            TRANSFORMS.build(step)
