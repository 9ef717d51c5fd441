"""BatchFormer over the regions of a batch, in Detectron2's RoI heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_rcnn import example, predictors, shrink

from d2_plugins.preflight import check_config
from d2_plugins.roi_heads import BatchFormerOutputLayers
from plugin_core import BatchFormer

# -------------------------------------------------------------------------------------- what is run


@pytest.fixture(params=["Standard", "Cascade"])
def head_cfg(request: pytest.FixtureRequest, cfg: CfgNode) -> CfgNode:
    """A small detector on an FPN, whose regions train through a BatchFormer too."""
    shrink(cfg, request.param)
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED = True
    return cfg


def build(cfg: CfgNode) -> tuple[nn.Module, nn.Module]:
    """The detector and Detectron2's own of the same weights."""
    plain_cfg = cfg.clone()
    plain_cfg.MODEL.ROI_HEADS.NAME = cfg.MODEL.ROI_HEADS.NAME.replace("Plugin", "")
    model, plain = build_model(cfg), build_model(plain_cfg)
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert keys.missing_keys and all(".batchformer.layers.0." in n for n in keys.missing_keys)
    return model, plain


def losses(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Losses of a step that draws the same regions for every model."""
    torch.manual_seed(3)
    with EventStorage():
        return model.train()(batch)


def layers(kind: type = BatchFormerOutputLayers, **arguments: Any) -> FastRCNNOutputLayers:
    """A predictor for features of 8 channels and 3 classes."""
    torch.manual_seed(1)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    return kind(ShapeSpec(channels=8), box2box_transform=transform, num_classes=3, **arguments)


def proposals(*counts: int) -> list[Instances]:
    """Labelled proposals of some images, objects of all classes and the background."""
    result = []
    for count in counts:
        corners = torch.rand(count, 2) * 30
        boxes = Boxes(torch.cat((corners, corners + 20), dim=1))
        result.append(
            Instances(
                (64, 64),
                proposal_boxes=boxes,
                gt_boxes=Boxes(boxes.tensor + 2),
                gt_classes=torch.arange(count) % 4,
            )
        )
    return result


class Zeros(nn.Module):
    """In place of a BatchFormer, makes a second stream that can be told from the first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


# --------------------------------------------------------------------------------- the layers alone


def test_in_training_both_streams_are_predicted_from_the_plain_one_first():
    model, plain = layers(batchformer={"dropout": 0.0}), layers(FastRCNNOutputLayers)
    x = torch.randn(6, 8)
    both = torch.cat((x, model.batchformer(x[:, None])[:, 0]))
    assert not torch.allclose(both[:6], both[6:])
    for predicted, expected, first in zip(model.train()(x), plain(both), plain(x), strict=True):
        assert len(predicted) == 12 and torch.equal(predicted, expected)
        torch.testing.assert_close(predicted[:6], first)  # a product of fewer rows may round else


def test_regions_of_a_batch_are_one_sequence():
    model, x = layers(batchformer={"dropout": 0.0}), torch.randn(6, 8)
    changed = x.clone()
    changed[5] += 1
    before, after = model(x)[0], model(changed)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert ((before[6:] - after[6:]).abs().amax(1) > 1e-6).all()


def test_in_evaluation_the_batchformer_is_not_called():
    model, plain, x = layers().eval(), layers(FastRCNNOutputLayers).eval(), torch.randn(6, 8)
    model.batchformer = None
    assert all(map(torch.equal, model(x), plain(x)))
    predictions, regions = plain(x), proposals(4, 2)
    for name in ("predict_boxes", "predict_probs", "predict_boxes_for_gt_classes", "losses"):
        with EventStorage():
            got, want = (getattr(m, name)(predictions, regions) for m in (model, plain))
        got, want = (list(v.values()) if isinstance(v, dict) else v for v in (got, want))
        assert all(map(torch.equal, got, want)), name


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_losses_are_the_means_over_both_streams(agnostic, kind):
    arguments = {"cls_agnostic_bbox_reg": agnostic, "box_reg_loss_type": kind}
    model, plain = layers(**arguments), layers(FastRCNNOutputLayers, **arguments)
    x, regions = torch.randn(7, 8), proposals(5, 2)
    with EventStorage():
        first = plain.losses(plain(x), regions)
        second = plain.losses(plain(torch.zeros_like(x)), regions)
        model.batchformer = Zeros()
        got = model.losses(model(x), regions)
        model.batchformer = nn.Identity()
        unchanged = model.losses(model(x), regions)
    assert set(got) == set(first)
    for name in first:
        assert not torch.allclose(first[name], second[name])
        torch.testing.assert_close(got[name], (first[name] + second[name]) / 2)
        torch.testing.assert_close(unchanged[name], first[name])


@pytest.mark.parametrize("name", ["predict_boxes", "predict_boxes_for_gt_classes", "predict_probs"])
def test_what_is_predicted_in_training_is_the_plain_streams(name):
    model, plain = layers(), layers(FastRCNNOutputLayers)
    model.batchformer = Zeros()
    x, regions = torch.randn(7, 8), proposals(5, 2)
    got = getattr(model, name)(model(x), regions)
    for part, expected in zip(got, getattr(plain, name)(plain(x), regions), strict=True):
        torch.testing.assert_close(part, expected)


def test_no_region_gives_no_prediction_and_zero_gradients():
    model, regions = layers(), proposals(0, 0)
    predictions = model(torch.randn(0, 8))
    assert [p.shape for p in predictions] == [(0, 4), (0, 12)]
    assert [len(p) for p in model.predict_boxes(predictions, regions)] == [0, 0]
    with EventStorage():
        loss = sum(model.losses(predictions, regions).values())
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_single_region_is_warned_of():
    with pytest.warns(UserWarning, match="the batch is a single sample"):
        layers()(torch.randn(1, 8))


def test_mixed_precision_gives_finite_losses():
    model, regions = layers(), proposals(5, 2)
    with torch.autocast("cpu", torch.bfloat16), EventStorage():
        loss = sum(model.losses(model(torch.randn(7, 8)), regions).values())
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_copy_has_a_batchformer_of_its_own():
    model, x = layers(batchformer={"dropout": 0.0}), torch.randn(6, 8)
    twin = copy.deepcopy(model)
    before = model(x)[0].detach()
    nn.init.constant_(model.batchformer.layers[0].linear2.weight, torch.nan)
    assert torch.equal(twin(x)[0], before) and model(x)[0].isnan().any()


def test_lazy_config_names_the_layers():
    predictor = LazyCall(BatchFormerOutputLayers)(
        input_shape=LazyCall(ShapeSpec)(channels=8),
        batchformer={"num_heads": 2, "num_layers": 3},
        box2box_transform=LazyCall(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=3,
    )
    batchformer = instantiate(predictor).batchformer
    assert batchformer.embed_dims == 8 and len(batchformer.layers) == 3
    assert batchformer.layers[0].self_attn.num_heads == 2


# ---------------------------------------------------------------------------------- whole detectors


def test_detector_trains_every_parameter_of_its_heads_and_predicts(head_cfg):
    head_cfg.MODEL.MASK_ON = head_cfg.MODEL.KEYPOINT_ON = True
    model = build_model(head_cfg)
    batch = [example(), example()]
    sum(losses(model, batch).values()).backward()
    for name, parameter in model.roi_heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for predictor in predictors(model):
        assert all(
            parameter.grad.any()
            for name, parameter in predictor.batchformer.named_parameters()
            if not name.endswith("in_proj_bias")  # a part of it moves no softmax
        )
    (output,) = model.eval()([{"image": batch[0]["image"]}])
    assert len(output["instances"]) > 0 and output["instances"].scores.isfinite().all()


def test_evaluation_is_the_plain_detectors_to_the_last_bit(head_cfg):
    head_cfg.MODEL.MASK_ON = True
    model, plain = build(head_cfg)
    inputs = [{"image": example()["image"]}]
    with torch.no_grad():
        (got,), (expected,) = model.eval()(inputs), plain.eval()(inputs)
    got, expected = got["instances"].get_fields(), expected["instances"].get_fields()
    assert len(got["scores"]) > 0 and set(got) == set(expected)
    for name, value in expected.items():
        same = (v.tensor if isinstance(v, Boxes) else v for v in (got[name], value))
        assert torch.equal(*same), name


def test_identity_in_its_place_gives_the_plain_detectors_losses(head_cfg):
    model, plain = build(head_cfg)
    for predictor in predictors(model):
        predictor.batchformer = nn.Identity()
    batch = [example(), example()]
    got, expected = losses(model, batch), losses(plain, batch)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("on_predicted_boxes", [False, True])
def test_masks_and_keypoints_are_trained_as_without_it(head_cfg, on_predicted_boxes):
    head_cfg.MODEL.MASK_ON = head_cfg.MODEL.KEYPOINT_ON = True
    head_cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = on_predicted_boxes
    model, plain = build(head_cfg)
    batch = [example(), example()]
    got, expected = losses(model, batch), losses(plain, batch)
    for name in ("loss_mask", "loss_keypoint"):
        torch.testing.assert_close(got[name], expected[name], msg=name)
    assert any(not torch.allclose(got[name], expected[name]) for name in got if "cls" in name)


@pytest.mark.parametrize("head_cfg", ["Cascade"], indirect=True)
def test_stages_of_a_cascade_have_their_own_and_hand_on_the_plain_boxes(head_cfg):
    model, plain = build(head_cfg)
    assert len({id(predictor.batchformer) for predictor in predictors(model)}) == 3
    handed: list[list[Tensor]] = []
    for heads in (model.roi_heads, plain.roi_heads):
        original = heads._create_proposals_from_boxes

        def note(boxes: list[Tensor], sizes: Any, original: Any = original) -> list[Instances]:
            handed.append([part.detach().clone() for part in boxes])
            return original(boxes, sizes)

        heads._create_proposals_from_boxes = note
    batch = [example(), example()]
    losses(model, batch)
    losses(plain, batch)
    assert len(handed) == 4
    for got, expected in zip(handed[:2], handed[2:], strict=True):
        for part, expected_part in zip(got, expected, strict=True):
            torch.testing.assert_close(part, expected_part)


def test_c4_detector_trains_through_it_after_res5(cfg):
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_backbone", 0
    cfg.MODEL.ROI_HEADS.NAME = "Res5PluginROIHeads"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 8, "BN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 8
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED = True
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model, _ = build(cfg)
    batchformer = model.roi_heads.box_predictor.batchformer
    assert batchformer.embed_dims == 128
    sum(losses(model, [example(), example()]).values()).backward()
    assert batchformer.layers[0].linear1.weight.grad.any()


def test_settings_reach_the_batchformer(head_cfg):
    node = head_cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER
    node.NUM_HEADS, node.DROPOUT, node.NUM_LAYERS, node.GATHER = 8, 0.25, 2, True
    for predictor in predictors(build_model(head_cfg)):
        layer = predictor.batchformer.layers[1]
        assert (layer.self_attn.num_heads, layer.dropout1.p) == (8, 0.25)
        assert predictor.batchformer.gather and predictor.batchformer.embed_dims == 32


def test_without_enabled_the_layers_are_the_frameworks_own(head_cfg):
    head_cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED = False
    assert all(type(p) is FastRCNNOutputLayers for p in predictors(build_model(head_cfg)))


def test_box_transforms_of_a_cascade_are_kept(head_cfg):
    model, plain = build(head_cfg)
    weights, expected = (
        [p.box2box_transform.weights for p in predictors(m)] for m in (model, plain)
    )
    assert weights == expected


def test_plain_checkpoint_loads_and_the_batchformer_alone_is_missing(head_cfg, tmp_path):
    model, plain = build(head_cfg)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    found: list[Any] = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(tmp_path / "plain.pth"))
    (incompatible,) = found
    assert not incompatible.unexpected_keys and not incompatible.incorrect_shapes
    expected = {n for n, m in model.named_modules() if isinstance(m, BatchFormer)}
    assert {n.partition(".layers.")[0] for n in incompatible.missing_keys} == expected
    names = set(incompatible.missing_keys)
    cascade = "Cascade" in head_cfg.MODEL.ROI_HEADS.NAME
    stage = "box_predictor.0" if cascade else "box_predictor"
    assert f"roi_heads.{stage}.batchformer.layers.0.self_attn.in_proj_weight" in names


@pytest.mark.parametrize("head_cfg", ["Standard"], indirect=True)
def test_federated_loss_is_taken_over_both_streams(head_cfg, registered):
    if "USE_FED_LOSS" not in head_cfg.MODEL.ROI_BOX_HEAD:
        pytest.skip("Detectron2 v0.6 has no federated loss")
    counts = [{"id": i, "image_count": 10 + i} for i in range(1, 4)]
    MetadataCatalog.get("counted").class_image_count = counts
    head_cfg.DATASETS.TRAIN = ("counted",)
    head = head_cfg.MODEL.ROI_BOX_HEAD
    head.USE_SIGMOID_CE = head.USE_FED_LOSS = True
    head.FED_LOSS_NUM_CLASSES = 3
    model, plain = build(head_cfg)
    for predictor in predictors(model):
        predictor.batchformer = nn.Identity()
    batch = [example(), example()]
    got, expected = losses(model, batch), losses(plain, batch)
    for name in (name for name in expected if "cls" in name):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------- wrong settings

NODE = "MODEL.ROI_BOX_HEAD.BATCHFORMER"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {f"{NODE}.NUM_HEADS": 3},
            f"{NODE}.NUM_HEADS: must divide embed_dims, got num_heads=3 and embed_dims=32",
        ),
        ({f"{NODE}.NUM_LAYERS": 0}, f"{NODE}.NUM_LAYERS: must be a positive integer"),
        ({f"{NODE}.DROPOUT": 1.0}, f"{NODE}.DROPOUT: must be in [0, 1), got 1.0"),
        (
            {f"{NODE}.ENABLED": False, f"{NODE}.NUM_HEADS": 8},
            f"{NODE} is set, but its ENABLED is False",
        ),
        (
            {"MODEL.ROI_HEADS.NAME": "StandardROIHeads"},
            f"MODEL.ROI_HEADS.NAME: 'StandardROIHeads' takes no {NODE}; use "
            "'StandardPluginROIHeads'",
        ),
        ({"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"}, "use 'CascadePluginROIHeads'"),
        ({"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}, "use 'Res5PluginROIHeads'"),
        ({"MODEL.ROI_HEADS.NAME": "RROIHeads"}, "use 'StandardPluginROIHeads'"),
        *(
            ({"MODEL.META_ARCHITECTURE": name}, f"{NODE}: a {name} has no RoI heads, which read it")
            for name in ("RetinaNet", "ProposalNetwork", "SemanticSegmentor")
        ),
        (
            {
                "MODEL.BACKBONE.NAME": "build_resnet_backbone",
                "MODEL.ROI_HEADS.NAME": "Res5PluginROIHeads",
                "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
                "MODEL.RPN.IN_FEATURES": ["res4"],
                "MODEL.ANCHOR_GENERATOR.SIZES": [[16]],
                f"{NODE}.NUM_HEADS": 7,
            },
            "got num_heads=7 and embed_dims=128",
        ),
        (
            {"MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead"},
            f"{NODE}.ENABLED: True, but 'IDABoxHead' classifies a map",
        ),
    ],
)
@pytest.mark.parametrize("head_cfg", ["Standard"], indirect=True)
def test_wrong_setting_is_named_before_training(head_cfg, settings, reason):
    head_cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        check_config(head_cfg, eval_only=True, resume=False)
    assert reason in str(error.value)


@pytest.mark.parametrize("head_cfg", ["Standard"], indirect=True)
def test_right_settings_come_to_the_datasets(head_cfg):
    with pytest.raises(ValueError, match=r"^DATASETS.TRAIN: names no dataset"):
        check_config(head_cfg, eval_only=False, resume=False)


def test_detector_with_both_classifiers_is_not_built(head_cfg):
    head_cfg.MODEL.ROI_BOX_HEAD.NAME = "IDABoxHead"
    with pytest.raises(ValueError, match="'IDABoxHead' classifies a map of each region"):
        build_model(head_cfg)
