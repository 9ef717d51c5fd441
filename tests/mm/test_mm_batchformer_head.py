"""BatchFormer over the regions of a batch, in MMDetection's box heads."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData

from mm_plugins import BatchFormerBBoxHead
from mm_plugins.analysis import load_config

SMALL = {"in_channels": 16, "roi_feat_size": 3, "num_classes": 4, "fc_out_channels": 12}
NO_DROPOUT = {"batchformer": {"dropout": 0.0}}
SEESAW = {"loss_cls": {"type": "SeesawLoss", "num_classes": 4, "p": 0.8, "q": 2.0}}
# Forms of a head, of which each has its own way from the shared layers to the predictions
FORMS = {
    "default": {},
    "class agnostic": {"reg_class_agnostic": True},
    "shared convs": {"num_shared_convs": 2, "num_shared_fcs": 1, "conv_out_channels": 8},
    "average": {"with_avg_pool": True},
    "branches": {"num_cls_fcs": 1, "num_reg_fcs": 2},
    "one branch": {"num_reg_fcs": 1},
    "classes only": {"with_reg": False},
    "boxes only": {"with_cls": False},
    "seesaw": SEESAW,
    "normed": {"cls_predictor_cfg": {"type": "NormedLinear"}},
    "decoded boxes": {"reg_decoded_bbox": True, "loss_bbox": {"type": "GIoULoss"}},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def head(form: str = "default", kind: str = "BatchFormerBBoxHead", **changed: Any) -> nn.Module:
    torch.manual_seed(1)
    return MODELS.build({"type": kind, **SMALL, **FORMS[form], **changed}).train()


def plain_head(form: str = "default", model: nn.Module | None = None) -> nn.Module:
    """MMDetection's head of this form, which gives its weights to ``model``."""
    plain = head(form, "ConvFCBBoxHead", **{"num_shared_fcs": 2, **FORMS[form]})
    if model is not None:
        keys = model.load_state_dict(plain.state_dict(), strict=False)
        assert not keys.unexpected_keys
        assert {n.split(".")[0] for n in keys.missing_keys} == {"batchformer"}
    return plain


def regions(count: int = 6) -> Tensor:
    return torch.randn(count, 16, 3, 3)


def targets(count: int, num_classes: int = 4) -> tuple[Tensor, ...]:
    """RoIs, labels, label weights, box targets and their weights; the last third is background."""
    corners = torch.rand(count, 2) * 30
    rois = torch.cat((torch.zeros(count, 1), corners, corners + 20), dim=1)
    labels = torch.arange(count) % num_classes
    labels[2 * count // 3 :] = num_classes
    weights = (labels < num_classes).float()[:, None].expand(-1, 4)
    return rois, labels, torch.ones(count), rois[:, 1:] / 100 + 0.1, weights


def values(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in losses.items() if "loss" in name}


class Zeros(nn.Module):
    """In place of a BatchFormer, makes a second stream that can be told from the first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def present(*pairs: Any) -> list[tuple[Any, ...]]:
    """Corresponding predictions, without the branch that a head lacks."""
    return [pair for pair in zip(*pairs, strict=True) if pair[0] is not None]


# ----------------------------------------------------------------------------------------- the head


@EVERY_FORM
def test_in_training_both_streams_are_predicted_the_plain_one_first(form):
    model = head(form)
    plain, x, seen = plain_head(form, model), regions(), []
    model.batchformer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    outputs = model(x)
    ((taken, given),) = seen  # once, for both branches
    assert taken.shape == given.shape == (6, 1, 12)
    for predicted, first in present(outputs, plain(x)):
        assert predicted.shape == (12, *first.shape[1:])
        torch.testing.assert_close(predicted[:6], first)
        assert not torch.allclose(predicted[6:], first)


def test_both_branches_read_what_the_batchformer_made_of_the_shared_features():
    model, x = head("branches"), regions()
    shared = x.flatten(1)
    for fc in model.shared_fcs:
        shared = fc(shared).relu()
    seen = []
    model.batchformer.register_forward_hook(lambda _, args, out: seen.append(out[:, 0]))
    scores, deltas = model(x)
    both = torch.cat((shared, seen[0]))
    assert torch.equal(scores, model.fc_cls(model.cls_fcs[0](both).relu()))
    for fc in model.reg_fcs:
        both = fc(both).relu()
    assert torch.equal(deltas, model.fc_reg(both))


@EVERY_FORM
def test_evaluation_is_the_plain_heads_to_the_last_bit(form):
    model = head(form)
    plain, x = plain_head(form, model).eval(), regions()
    model.eval().batchformer = None
    for predicted, expected in present(model(x), plain(x)):
        assert torch.equal(predicted, expected)
    rest = targets(6)
    got, expected = (values(m.loss(*m(x), *rest)) for m in (model, plain))
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_regions_of_a_batch_are_one_sequence():
    model, x = head(**NO_DROPOUT), regions()
    changed = x.clone()
    changed[5] += 1
    before, after = model(x)[0], model(changed)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert ((before[6:] - after[6:]).abs().amax(1) > 1e-8).all()


@EVERY_FORM
def test_losses_are_the_means_over_both_streams(form):
    x, rest = regions(), targets(6)
    plain, of_zeros = plain_head(form), plain_head(form)
    for layer in of_zeros.shared_fcs:  # so that the features behind them are 0
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    first = values(plain.loss(*plain(x), *rest))
    second = values(of_zeros.loss(*of_zeros(x), *rest))
    for stand_in, other in ((nn.Identity(), first), (Zeros(), second)):
        model = head(form)
        plain_head(form, model)
        model.batchformer = stand_in
        got = values(model.loss(*model(x), *rest))
        assert set(got) == set(first)
        for name, value in got.items():
            assert value.isfinite()
            # This one counts the labels that it has seen, here twice as many.
            if name != "loss_cls_classes":
                torch.testing.assert_close(value, (first[name] + other[name]) / 2)


@EVERY_FORM
def test_every_parameter_gets_a_gradient(form):
    model = head(form)
    sum(values(model.loss(*model(regions()), *targets(6))).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert "batchformer" not in name or parameter.grad.any(), name


@pytest.mark.parametrize("form", ["default", "branches", "seesaw"])
def test_no_region_gives_zero_gradients(form):
    model = head(form)
    scores, deltas = model(regions(0))
    assert len(scores) == len(deltas) == 0
    loss = sum(values(model.loss(scores, deltas, *targets(0))).values()) + scores.sum()
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_predictions_without_a_gradient_are_plain_in_training_mode_too():
    model = head()
    assert len(model(regions(6))[0]) == 12
    with torch.no_grad():
        assert len(model(regions(6))[0]) == 6


def test_a_single_region_is_warned_of():
    with pytest.warns(UserWarning, match="the batch is a single sample"):
        head()(regions(1))


def test_mixed_precision_gives_a_finite_loss():
    model = head()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(values(model.loss(*model(regions()), *targets(6))).values())
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_layers_called_by_themselves_are_as_ever_even_after_a_step_that_failed():
    model, features = head(), torch.randn(3, 12)
    before = model.fc_cls(features)
    fc_reg, model.fc_reg = model.fc_reg, nn.Linear(5, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        model(regions())
    model.fc_reg = fc_reg
    assert torch.equal(model.fc_cls(features), before)
    assert len(model(regions(2))[0]) == 4


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "average"])
def test_a_copy_calls_its_own_batchformer(copied):
    model, x = head(**NO_DROPOUT), regions()
    before = [part.detach() for part in model(x)]
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = ExponentialMovingAverage(model).module.train()
    nn.init.constant_(model.batchformer.layers[0].linear2.weight, torch.nan)
    assert all(map(torch.equal, twin(x), before))
    assert model(x)[0][6:].isnan().all()


def test_settings_reach_the_batchformer():
    arguments = {"num_heads": 6, "dropout": 0.25, "num_layers": 2, "gather": True}
    batchformer = head(batchformer=arguments).batchformer
    layer = batchformer.layers[1]
    assert (batchformer.embed_dims, layer.self_attn.num_heads, layer.dropout1.p) == (12, 6, 0.25)
    assert batchformer.gather


# ---------------------------------------------------------------------------- weights to begin with


def test_initialization_leaves_the_batchformer_as_it_is_and_mmdetection_says_so(monkeypatch):
    model = head()
    drawn = {name: p.clone() for name, p in model.named_parameters()}
    said: dict[str, str] = {}

    def record() -> None:  # what is written into the log
        for name, parameter in model.named_parameters():
            said[name] = model._params_init_info[parameter]["init_info"]

    monkeypatch.setattr(model, "_dump_init_info", record)
    model.init_weights()
    for name, parameter in model.named_parameters():
        ours = name.startswith("batchformer.")
        assert torch.equal(parameter, drawn[name]) or not ours, name
        if ours:
            assert said[name].startswith("The value is the same before and after"), name
        else:
            assert said[name].startswith(("NormalInit", "XavierInit")), name
    assert model.fc_cls.weight.std() < 0.02 and not model.fc_cls.bias.any()


@pytest.mark.parametrize("kind", ["StandardRoIHead", "CascadeRoIHead"])
def test_plain_checkpoint_loads_and_the_batchformer_alone_is_missing(kind, tmp_path):
    plain, model = roi_head(kind, "Shared2FCBBoxHead"), roi_head(kind)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    records: list[str] = []
    logger = logging.getLogger("loading")
    logger.addHandler(handler := _Recorder(records))
    load_checkpoint(model, str(tmp_path / "plain.pth"), logger=logger)
    logger.removeHandler(handler)
    stage = "bbox_head.0" if kind == "CascadeRoIHead" else "bbox_head"
    name = f"{stage}.batchformer.layers.0.self_attn.in_proj_weight"
    assert any(name in record for record in records)
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys and name in keys.missing_keys
    assert all(".batchformer.layers.0." in missing for missing in keys.missing_keys)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


class _Recorder(logging.Handler):
    def __init__(self, records: list[str]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


# ------------------------------------------------------------------------------------- in RoI heads


def roi_head(kind: str, head_type: str = "BatchFormerBBoxHead", **changed: Any) -> nn.Module:
    """A RoI head of MMDetection's own config with masks, narrow."""
    base = {
        "StandardRoIHead": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        "CascadeRoIHead": "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    }[kind]
    model = load_config(base).model
    cfg = copy.deepcopy(model.roi_head)
    assert cfg.type == kind
    cfg.bbox_roi_extractor.out_channels = cfg.mask_roi_extractor.out_channels = 16
    cfg.mask_head.update(in_channels=16, conv_out_channels=8, num_classes=4, num_convs=1)
    small = {"type": head_type, **SMALL, "roi_feat_size": 7, **changed}
    for single in cfg.bbox_head if isinstance(cfg.bbox_head, list) else [cfg.bbox_head]:
        single.update(small)
    for stage in model.train_cfg.rcnn if kind == "CascadeRoIHead" else [model.train_cfg.rcnn]:
        stage.sampler.num = 16
    cfg.update(train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn | {"score_thr": 0.0})
    torch.manual_seed(2)
    return MODELS.build(ConfigDict(cfg))


def scene(counts: tuple[int, ...] = (7, 9)) -> tuple[Any, ...]:
    """Features, proposals and annotated samples of images of 64 pixels."""
    torch.manual_seed(4)
    features = tuple(torch.randn(len(counts), 16, 64 // s, 64 // s) for s in (4, 8, 16, 32))
    samples, proposals = [], []
    for count in counts:
        corners = torch.rand(count, 2) * 30
        proposals.append(InstanceData(bboxes=torch.cat((corners, corners + 20), dim=1)))
        shape = {"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo=shape)
        boxes = torch.tensor([[4.0, 4, 30, 30], [20.0, 20, 50, 60]])
        masks = BitmapMasks(np.ones((2, 64, 64), np.uint8), 64, 64)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 3]), masks=masks)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return features, proposals, samples


def bbox_heads(model: nn.Module) -> list[BatchFormerBBoxHead]:
    heads = model.bbox_head
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


KINDS = pytest.mark.parametrize("kind", ["StandardRoIHead", "CascadeRoIHead"])


@KINDS
@pytest.mark.parametrize("changed", [{}, SEESAW, {"reg_class_agnostic": False}], ids=str)
def test_roi_head_trains_every_parameter(kind, changed):
    model = roi_head(kind, **changed).train()
    losses = model.loss(*scene())
    sum(values(losses).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for bbox_head in bbox_heads(model):
        assert bbox_head.batchformer.layers[0].linear1.weight.grad.any()


@KINDS
@pytest.mark.parametrize("changed", [{}, {"reg_class_agnostic": False}], ids=str)
def test_identity_in_its_place_gives_the_plain_heads_losses(kind, changed):
    model = roi_head(kind, **changed).train()
    plain = roi_head(kind, "Shared2FCBBoxHead", **changed).train()
    model.load_state_dict(plain.state_dict(), strict=False)
    for bbox_head in bbox_heads(model):
        bbox_head.batchformer = nn.Identity()
    got, expected = model.loss(*scene()), plain.loss(*scene())
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("changed", [{}, SEESAW, {"reg_class_agnostic": False}], ids=str)
def test_cascade_goes_on_with_the_plain_boxes_and_leaves_masks_alone(changed):
    model = roi_head("CascadeRoIHead", **changed).train()
    plain = roi_head("CascadeRoIHead", "Shared2FCBBoxHead", **changed).train()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert len({id(bbox_head.batchformer) for bbox_head in bbox_heads(model)}) == 3
    refined: list[list[Tensor]] = []
    for bbox_head in (*bbox_heads(model)[:2], *bbox_heads(plain)[:2]):
        original = bbox_head.refine_bboxes

        def note(*args: Any, original: Any = original) -> Any:
            results = original(*args)
            refined.append([result.bboxes.clone() for result in results])
            return results

        bbox_head.refine_bboxes = note
    got, expected = model.loss(*scene()), plain.loss(*scene())
    assert len(refined) == 4
    for mine, theirs in zip(refined[:2], refined[2:], strict=True):
        for boxes, expected_boxes in zip(mine, theirs, strict=True):
            torch.testing.assert_close(boxes, expected_boxes)
    for name in (name for name in expected if "mask" in name):
        torch.testing.assert_close(got[name], expected[name], msg=name)
    assert not torch.allclose(got["s0.loss_bbox"], expected["s0.loss_bbox"])


def test_targets_are_handed_on_for_one_stream():
    model = roi_head("StandardRoIHead").train()
    seen: list[dict] = []
    bbox_head = model.bbox_head
    original = bbox_head.loss_and_target

    def note(**kwargs: Any) -> dict:
        seen.append({"scores": len(kwargs["cls_score"]), "rois": len(kwargs["rois"])})
        result = original(**kwargs)
        seen[-1]["targets"] = [len(part) for part in result["bbox_targets"]]
        return result

    bbox_head.loss_and_target = note
    model.loss(*scene())
    (lengths,) = seen
    assert lengths["scores"] == 2 * lengths["rois"]
    assert lengths["targets"] == [lengths["rois"]] * 4


@KINDS
def test_predictions_are_the_plain_heads_to_the_last_bit(kind):
    model, plain = roi_head(kind).eval(), roi_head(kind, "Shared2FCBBoxHead").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for counts in ((3, 0), (4,)):
        found = []
        for network in (model, plain):
            features, proposals, samples = scene(counts)
            with torch.no_grad():
                found.append(network.predict(features, proposals, samples))
        assert any(len(instances) for instances in found[1])
        for got, expected in zip(*found, strict=True):
            for name in ("bboxes", "scores", "labels", "masks"):
                assert torch.equal(got[name], expected[name]), name


# ---------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batchformer": {"num_heads": 5}},
            "batchformer.num_heads must divide embed_dims, got num_heads=5 and embed_dims=12",
        ),
        ({"batchformer": {"dropout": 1.0}}, "batchformer.dropout must be in [0, 1), got 1.0"),
        ({"batchformer": {"num_layers": 0}}, "batchformer.num_layers must be a positive integer"),
        ({"batchformer": {"num_head": 2}}, "batchformer.num_head is no argument; there are num_"),
        ({"num_shared_fcs": 0}, "num_shared_fcs must be at least 1, as the BatchFormer"),
        ({"num_cls_convs": 1}, "num_cls_convs must be 0, as shared fully connected layers leave"),
        ({"num_reg_convs": 2}, "num_reg_convs must be 0, as shared fully connected layers leave"),
    ],
)
def test_argument_that_cannot_work_is_named(arguments, message):
    with pytest.raises(ValueError) as error:
        BatchFormerBBoxHead(**SMALL, **arguments)
    assert str(error.value).startswith(message)
