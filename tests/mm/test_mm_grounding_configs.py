"""The shipped configs of grounding detectors: each trains a step with the losses of its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from batchformer_detectors import skip_where_it_cannot_run
from grounding_detectors import ROOT, images, kind_of, samples
from mmdet.registry import METRICS, MODELS
from mmengine.config import Config
from mmengine.registry import EVALUATOR

from mm_plugins.preflight import check_config
from mm_plugins.training_settings import check_training_settings

SHIPPED = sorted(
    path
    for folder in ("grounding", "synthetic")
    for path in (ROOT / "configs" / "mm" / folder).glob("g*.py")
)


def shrink(cfg: Config, text_model: Path) -> None:
    model = cfg.model
    model.backbone.init_cfg = None
    model.language_model.name = str(text_model)
    if model.backbone.type == "SwinTransformer":
        model.backbone.depths = (1, 1, 1, 1)
    if model.type == "PluginGLIP":
        model.bbox_head.lang_model_name = str(text_model)
        model.bbox_head.num_dyhead_blocks = 1
    else:
        skip_where_it_cannot_run("grounding-dino")
        model.num_queries = 10
        for coder in (model.encoder, model.decoder):
            coder.num_layers = 2
            coder.layer_cfg.ffn_cfg.feedforward_channels = 64
        assert model.encoder.get("num_cp", 0) == 0


def test_there_are_configs_of_both_detectors_with_each_loss_and_with_both():
    losses = ("amc", "functional-entropy", "amc-functional-entropy")
    names = [path.stem for path in SHIPPED]
    for detector in ("grounding-dino_r50", "glip_r50"):
        assert f"{detector}_synthetic" in names
        assert {f"{detector}-{loss}_synthetic" for loss in losses} <= set(names)
    for detector in ("grounding_dino_swin-t", "glip_atss_swin-t_c"):
        assert all(any(n.startswith(f"{detector}_{loss}_f") for n in names) for loss in losses)


def parts(path: Path) -> dict[str, object]:
    """Of a config's model, what of it is no plain detector's."""
    model = Config.fromfile(path).model
    return {k: model.get(k) for k in ("attention_mask_consistency", "functional_entropy")}


@pytest.mark.parametrize("path", [p for p in SHIPPED if "amc-f" in p.stem], ids=lambda p: p.stem)
def test_with_both_is_each_and_the_other(path):
    both = parts(path)
    assert all(value is not None for value in both.values())
    for name, left_out in (
        ("amc", "functional_entropy"),
        ("functional-entropy", "attention_mask_consistency"),
    ):
        one = parts(path.with_name(path.name.replace("amc-functional-entropy", name)))
        assert one == {**both, left_out: None}


# Of GLIP, which takes its time, the small one with both stands for all.
TRAINED = [p for p in SHIPPED if "grounding" in p.stem or p.stem.startswith("glip_r50-amc-f")]
POINTING = [p for p in SHIPPED if "pointing" in p.stem]
TRAINED = [p for p in TRAINED if p not in POINTING]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_config_trains_a_step_with_the_losses_of_its_name(path, text_models):
    cfg = Config.fromfile(path)
    check_training_settings(cfg, train=True)
    name = "glip" if cfg.model.type == "PluginGLIP" else "grounding-dino"
    shrink(cfg, text_models[name])
    check_config(Config({"model": cfg.model}), train=True, resumes=False)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    if name == "grounding-dino":
        torch.nn.init.normal_(model.level_embed)  # which nothing has set
    losses = model.loss(images(), samples(kind_of(name)))
    amc = {"loss_amc_mean", "loss_amc_max"}
    entropy = {"loss_functional_entropy", "information_image", "information_text"}
    assert amc & set(losses) == (amc if "amc" in path.stem else set())
    assert entropy & set(losses) == (entropy if "functional-entropy" in path.stem else set())
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_config_is_a_base_and_a_few_lines(path):
    """What differs from a base, so that the difference can be read."""
    plain = path.stem in ("grounding-dino_r50_synthetic", "glip_r50_synthetic")
    assert plain or len(path.read_text().splitlines()) <= 12


def test_config_of_the_pointing_game_predicts_heatmaps_that_its_metric_takes(text_models):
    cfg = Config.fromfile(next(path for path in POINTING if "flickr30k" in path.stem))
    shrink(cfg, text_models["grounding-dino"])
    cfg.model.test_cfg.max_per_img = 5
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(model.level_embed)
    batch = samples("phrases", test=True)
    keys = cfg.val_dataloader.dataset.pipeline[-1].meta_keys
    assert {"phrase_ids", "phrases", "tokens_positive"} <= set(keys)
    for sample in batch:
        sample.set_metainfo({"phrase_ids": [0, 1], "phrases": ["the red disk", "the square"]})
    results = model.predict(images(), batch)
    assert [cfg[f"{split}_dataloader"].dataset.ann_file for split in ("val", "test")] == [
        f"final_flickr_separateGT_{split}.json" for split in ("val", "test")
    ]
    for settings in cfg.val_evaluator:
        metric = METRICS.build(settings)
        metric.process({}, [result.to_dict() for result in results])
        assert metric.evaluate(2)


@pytest.mark.parametrize("path", [p for p in POINTING if "ref" in p.stem], ids=lambda p: p.stem)
def test_every_split_of_referring_expressions_has_a_pointing_game_of_its_own(path):
    cfg = Config.fromfile(path)
    check_training_settings(cfg, train=False)
    assert cfg.model.type == "PluginGroundingDINO" and cfg.model.heatmap.in_test
    assert cfg.test_dataloader == cfg.val_dataloader and cfg.test_evaluator == cfg.val_evaluator
    names = cfg.test_evaluator.dataset_prefixes
    for name, dataset in zip(names, cfg.test_dataloader.dataset.datasets, strict=True):
        assert f"_{dataset.get('split', '')}" in name
        assert dataset.type == "ReferDataset" or name in dataset.ann_file
    evaluator = EVALUATOR.build(cfg.test_evaluator)
    evaluator.dataset_meta = {"cumulative_sizes": [i + 1 for i in range(len(names))]}
    heatmap = torch.tensor([[0.0, 1.0]])
    boxes = torch.tensor([[1.0, 0, 2, 1]])
    for i in range(len(names)):
        sample = {
            "gt_instances": {"bboxes": boxes - i % 2, "labels": torch.tensor([1])},
            "phrase_heatmaps": {"labels": torch.tensor([0]), "heatmaps": heatmap[None]},
            "tokens_positive": -1,
            "ori_shape": (1, 2),
        }
        for metric in evaluator.metrics:
            metric.process({}, [sample])
    found = evaluator.evaluate(len(names))
    for i, name in enumerate(names):
        assert found[f"{name}/pointing_game/accuracy"] == 1 - i % 2
