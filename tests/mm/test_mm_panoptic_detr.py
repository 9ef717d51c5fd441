"""DETR with its mask head: the original's masks, losses and segments; what is trained when."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

import convert_checkpoint
import original_panoptic as original
from batchformer_detectors import without_dropout
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData, PixelData

from mm_plugins.weights import check_weights
from plugin_core.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("whole_draws")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mm" / "batchformer"
CONFIG = CONFIGS / "panoptic-detr_r50-batchformer_8xb2-25e_coco-panoptic.py"
NO_CATEGORY = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
COCO_IDS = [i for i in range(92) if i not in NO_CATEGORY] + original.IDS_OF_STUFF
ROWS = [*COCO_IDS, 250]
WIDTH = original.WIDTH
VOID = 133
COMPARED = ("panoptic_head.", "encoder.", "decoder.", "neck.")
SHIPPED = Config.fromfile(CONFIG).model


def small(**settings: Any) -> ConfigDict:
    """The shipped config's model, as small as the original's in the tests."""
    attention = {"embed_dims": WIDTH}
    layer = {
        "self_attn_cfg": attention,
        "ffn_cfg": {**attention, "feedforward_channels": 2 * WIDTH},
    }
    cfg = Config({"model": copy.deepcopy(SHIPPED)})
    for part in (
        {
            "num_queries": 5,
            "backbone": {"depth": 18, "init_cfg": None},
            "neck": {"in_channels": [512], "out_channels": WIDTH},
            "encoder": {"num_layers": 2, "layer_cfg": layer},
            "batchformer": {"insert_after": (0,), "share": False},
            "decoder": {"num_layers": 2, "layer_cfg": {**layer, "cross_attn_cfg": attention}},
            "positional_encoding": {"num_feats": WIDTH // 2},
            "bbox_head": {"embed_dims": WIDTH},
            "panoptic_head": {"embed_dims": WIDTH, "in_channels": (64, 128, 256)},
            "test_cfg": {"max_per_img": 5},
        },
        settings,
    ):
        cfg.merge_from_dict({"model": part})
    return cfg.model


def build(net: nn.Module | None = None, **settings: Any) -> Any:
    """A small detector, with random weights or converted ones."""
    model = MODELS.build(small(**settings))
    if net is not None:
        converted = convert_checkpoint.convert_detr(net.state_dict(), {})
        missing, unexpected = model.load_state_dict(converted.tensors, strict=False)
        assert not missing and all(".batchformer." in name for name in unexpected)
    return model.eval()


@torch.no_grad()
def decided(net: Any, images: Tensor, mask: Tensor) -> nn.Module:
    """Let each query be sure of one of two things and two kinds of stuff."""
    classifier = net.detr.class_embed
    classifier.weight.mul_(30)
    classifier.bias -= net(images, mask)[0].mean(dim=(0, 1))
    some = classifier.bias[[1, 90, 92, 200]]
    classifier.bias.fill_(-1e5)[[1, 90, 92, 200]] = some
    return net


def batch(sizes: tuple = ((96, 128), (64, 96))) -> tuple[Tensor, Tensor, list[DetDataSample]]:
    """Images (B, 3, 96, 128), of which the second is smaller, with things and stuff; their mask."""
    images, mask = torch.randn(len(sizes), 3, 96, 128), torch.ones(len(sizes), 96, 128).bool()
    samples = []
    for i, (height, width) in enumerate(sizes):
        mask[i, :height, :width] = False
        images[i][:, mask[i]] = 0
        things = np.zeros((2, 96, 128), np.uint8)
        things[0, 8:40, 8:50] = things[1, 30:60, 40:90] = 1
        semantic = torch.full((96, 128), 255)
        semantic[:height, :width] = torch.where(torch.arange(width) < 33, 100, 131)
        semantic[torch.from_numpy(things.any(0))] = 7
        instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 50, 40], [40, 30, 90, 60]]),
            labels=torch.tensor([7, 7 + i]),
            masks=BitmapMasks(things, 96, 128),
        )
        shape = {"img_shape": (height, width), "batch_input_shape": (96, 128)}
        meta = {**shape, "ori_shape": (height * 2 // 3, width), "scale_factor": (1, 1.5)}
        samples.append(
            DetDataSample(
                metainfo=meta,
                gt_instances=instances,
                gt_sem_seg=PixelData(sem_seg=semantic[None]),
            )
        )
    return images, mask, samples


def truth_of(sample: DetDataSample) -> tuple[InstanceData, Tensor]:
    """Boxes, labels and masks (N, H, W) of all segments, made by hand."""
    things, semantic = sample.gt_instances, sample.gt_sem_seg.sem_seg[0]
    stuff = torch.stack([semantic == label for label in (100, 131)])
    boxes = []
    for mask in stuff:
        y, x = mask.nonzero(as_tuple=True)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    objects = InstanceData(
        bboxes=torch.cat([things.bboxes, torch.tensor(boxes).float()]),
        labels=torch.cat([things.labels, torch.tensor([100, 131])]),
    )
    return objects, torch.cat([things.masks.to_tensor(torch.bool, "cpu"), stuff])


def matched(model: Any, outputs: tuple[Tensor, ...], samples: list) -> tuple[Tensor, Tensor]:
    """Masks of an original's matched queries, and their segments'."""
    found, wanted = [], []
    for logits, boxes, masks, sample in zip(*outputs, samples, strict=True):
        objects, truth = truth_of(sample)
        height, width = sample.img_shape
        boxes = bbox_cxcywh_to_xyxy(boxes.detach()) * torch.tensor([width, height] * 2)
        predicted = InstanceData(scores=logits.detach()[:, ROWS], bboxes=boxes)
        places = model.bbox_head.assigner.assign(predicted, objects, sample.metainfo).gt_inds
        found.append(masks[places > 0])
        wanted.append(truth[places[places > 0] - 1])
    return torch.cat(found), torch.cat(wanted)


# ------------------------------------------------------------------------------------- the original


@pytest.mark.parametrize("insert_idx", [(), (0,)])
def test_boxes_and_masks_are_the_originals(insert_idx):
    # In float64: in float32 masks near 0 differ by what the order of additions rounds.
    net = original.DETRsegm(insert_idx=insert_idx).eval().double()
    model = build(net, batchformer={"eval": True} if insert_idx else None).double()
    images, mask, samples = batch()
    images = images.double()
    with torch.no_grad():
        logits, boxes, masks = net(images, mask)
        scores, found_boxes, found_masks = model(images, samples, mode="tensor")
    assert masks.shape == (2, 5, 24, 32)
    assert masks.std(dim=1).amax(dim=(1, 2)).min() > 0.1  # queries differ
    torch.testing.assert_close(scores[-1], logits[..., ROWS], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found_boxes[-1], boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found_masks, masks, atol=1e-4, rtol=1e-4)


def test_segments_and_masks_of_boxes_are_the_originals():
    images, mask, samples = batch(((96, 128),))
    net = decided(original.DETRsegm().eval(), images, mask)
    model = build(net, batchformer=None, test_cfg={"instance_on": True})
    with torch.no_grad():
        logits, _, masks = net(images, mask)
        (found,) = model.predict(images, copy.deepcopy(samples))
    size = samples[0].ori_shape
    expected = original.segments_of(logits[0], masks[0], (96, 128), size)
    labels = found.pred_panoptic_seg.sem_seg[0].numpy()
    assert labels.shape == size and len(expected) > 1
    assert {label % 1000 < 80 for label in np.unique(labels)} == {True, False}
    for category, pixels in expected:
        (label,) = np.unique(labels[pixels])
        assert COCO_IDS[label % 1000] == category
        assert (label > 1000) == (category <= 90)
        assert ((labels == label) == pixels).all()

    scores, best = logits[0].softmax(-1)[:, :-1].max(-1)
    things = [q for q in scores.argsort(descending=True).tolist() if best[q] <= 90]
    assert things
    full = nn.functional.interpolate(masks, (96, 128), mode="bilinear")[0, things].sigmoid() > 0.5
    full = nn.functional.interpolate(full[None].float(), size)[0].bool()
    other = found.pred_instances.masks != full
    assert other.shape == (len(things), *size) and other.float().mean() < 1e-3
    assert [COCO_IDS[i] for i in found.pred_instances.labels] == best[things].tolist()


def test_losses_and_gradients_of_both_streams_are_the_originals():
    net = original.DETRsegm(insert_idx=(0,)).eval()
    model = without_dropout(build(net, trains="all")).train()
    assert model.batchformers is not None
    images, mask, samples = batch()
    losses = model.loss(images, list(samples))

    second = net(images, mask)
    net.detr.transformer.encoder.insert_idx = ()
    first = net(images, mask)
    both = [torch.cat(streams) for streams in zip(first, second, strict=True)]
    expected = original.mask_losses(*matched(model, tuple(both), samples * 2))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-4, rtol=1e-4)

    sum(expected.values()).backward()
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    theirs = convert_checkpoint.convert_detr({**net.state_dict(), **gradients}, {}).tensors
    names = [n for n, _ in model.named_parameters() if n.startswith(COMPARED)]
    assert len(names) > 80
    for name in names:
        atol = 1e-4 * max(1.0, theirs[name].abs().max().item())
        torch.testing.assert_close(
            model.get_parameter(name).grad, theirs[name], atol=atol, rtol=1e-3
        )


# ------------------------------------------------------------------------------------ what is what


def test_batchformer_is_absent_in_evaluation():
    model = build()
    plain = build(batchformer=None)
    plain.load_state_dict(model.state_dict(), strict=False)
    images, _, samples = batch()
    with torch.no_grad():
        results = [m(images, samples, mode="tensor") for m in (model, plain)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("trains", "learns"), [("masks", True), ("boxes", False)])
def test_only_the_part_that_is_trained_has_gradients(trains, learns):
    model = build(trains=trains).train()
    images, _, samples = batch()
    loss, _ = model.parse_losses(model.loss(images, samples))
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.startswith("panoptic_head.") for name in moved} == {learns}
    assert any("batchformer" in name for name in moved) != learns


def test_attention_mask_consistency_joins_in():
    model = build(trains="all", attention_mask_consistency={}).train()
    images, _, samples = batch()
    losses = model.loss(images, list(samples))
    assert losses["loss_amc_mean"] + losses["loss_amc_max"] > 0 < losses["loss_mask"]
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None for p in model.panoptic_head.parameters())


def test_detector_without_trained_masks_predicts_boxes_of_things_alone():
    images, mask, samples = batch()
    net = decided(original.DETRsegm().eval(), images, mask)
    model = build(net, batchformer=None, trains="boxes")
    with torch.no_grad():
        found = model.predict(images, samples)
    assert 0 < sum(len(sample.pred_instances) for sample in found) < 10
    for sample in found:
        assert "pred_panoptic_seg" not in sample and "masks" not in sample.pred_instances
        assert (sample.pred_instances.labels < 80).all()


def test_images_without_any_segment_train():
    model = build(trains="all").train()
    images, _, samples = batch()
    for sample in samples:
        sample.gt_instances = InstanceData(
            bboxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.long),
            masks=BitmapMasks([], 96, 128),
        )
        sample.gt_sem_seg.sem_seg[:] = 255
    losses = model.loss(images, samples)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert all(p.grad is not None for p in model.panoptic_head.parameters())


def test_image_of_stuff_alone_trains_its_masks():
    model = build(trains="all").train()
    images, _, samples = batch()
    for sample in samples:
        sample.gt_instances = sample.gt_instances[:0]
    assert model.loss(images, samples)["loss_dice"] > 0


def test_image_without_a_sure_query_is_void():
    model = build(trains="all", test_cfg={"score_thr": 0.999})
    images, _, samples = batch()
    with torch.no_grad():
        for sample in model.predict(images, samples):
            assert sample.pred_panoptic_seg.sem_seg.unique().tolist() == [VOID]


def test_segments_do_not_reach_into_the_padding():
    images, mask, samples = batch()
    model = build(decided(original.DETRsegm().eval(), images, mask), batchformer=None)
    with torch.no_grad():
        for sample in model.predict(images, samples, rescale=False):
            assert sample.pred_panoptic_seg.sem_seg.shape[1:] == sample.img_shape


def test_masks_train_without_stuff():
    model = build(
        batchformer=None,
        trains="all",
        bbox_head={"num_classes": 80},
        panoptic_head={"num_stuff_classes": 0},
        test_cfg={"panoptic_on": False, "instance_on": True},
    ).train()
    images, _, samples = batch()
    for sample in samples:
        del sample.gt_sem_seg
    assert model.loss(images, samples)["loss_dice"] > 0
    with torch.no_grad():
        for sample in model.eval().predict(images, samples):
            assert sample.pred_instances.masks.shape == (5, *sample.ori_shape)


@pytest.mark.parametrize(
    ("settings", "argument", "reason"),
    [
        ({"trains": "heads"}, "trains", "must be 'all', 'boxes' or 'masks', got 'heads'"),
        (
            {"bbox_head": {"num_classes": 80}},
            "bbox_head.num_classes",
            "must be 133, the panoptic head's 80 things and 53 stuff classes, got 80",
        ),
        (
            {
                "bbox_head": {
                    "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "_delete_": True}
                }
            },
            "bbox_head.loss_cls.use_sigmoid",
            "must be False",
        ),
        ({"test_cfg": {"score_thresh": 0.1}}, "test_cfg.score_thresh", "is unknown; .*score_thr"),
        ({"panoptic_head": {"test_cfg": {}}}, "panoptic_head.test_cfg", "leave it out"),
        ({"panoptic_head": {"embed_dims": 96}}, "embed_dims", "must be a multiple of 128, got 96"),
        ({"panoptic_head": {"num_heads": 4}}, "num_heads", "must be a multiple of 8 .*, got 4"),
        ({"panoptic_head": {"in_channels": (64,)}}, "in_channels", r"of 3 maps, got \(64,\)"),
    ],
)
def test_wrong_setting_is_named(settings, argument, reason):
    with pytest.raises(ArgumentError, match=reason) as error:
        MODELS.build(small(**settings))
    assert error.value.argument == argument


@pytest.mark.parametrize("lost", ["encoder.layers.0.norms.0.weight", "bbox_head.fc_cls.bias"])
def test_mask_head_alone_is_not_trained_on_a_part_of_a_detector(tmp_path, lost):
    model = MODELS.build(small(trains="masks"))
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("panoptic_head.")}
    torch.save({"state_dict": state}, tmp_path / "boxes.pth")
    path = str(tmp_path / "boxes.pth")
    assert check_weights(model, path, "load_from", whole=False) == []
    state[lost] = state[lost][:3]
    torch.save({"state_dict": state}, tmp_path / "boxes.pth")
    with pytest.raises(ValueError, match=f"load_from: .* would stay random.*{lost}"):
        check_weights(model, path, "load_from", whole=False)


def test_backbone_that_gives_one_map_is_an_error_that_names_the_setting():
    model = build(backbone={"out_indices": (3,)})
    images, _, samples = batch()
    with pytest.raises(ValueError, match=r"model.backbone.out_indices: must be \(0, 1, 2, 3\)"):
        model.predict(images, samples)


# --------------------------------------------------------------------------------------- conversion


def convert(tmp_path: Path, state: dict[str, Tensor], *options: str) -> tuple[int, Path]:
    out = tmp_path / "out.pth"
    torch.save({"model": state, "args": argparse.Namespace(nheads=8)}, tmp_path / "source.pth")
    words = [str(tmp_path / "source.pth"), str(out), "--to", "mm", *options]
    return convert_checkpoint.main(words), out


def test_checkpoint_of_the_original_is_converted_whole(tmp_path, capsys):
    config = tmp_path / "config.py"
    model = small().to_dict()
    config.write_text(f"custom_imports = dict(imports=['mm_plugins'])\nmodel = {model!r}\n")
    net = original.DETRsegm(insert_idx=(0,))
    code, out = convert(tmp_path, net.state_dict(), "--config", str(config))
    assert code == 0
    MODELS.build(small()).load_state_dict(torch.load(out)["state_dict"], strict=True)
    said = capsys.readouterr().out
    assert "PanopticDETR with ResNet-18 and BatchFormer after encoder layer 0" in said
    assert "classes: the 133 panoptic categories of COCO, of its 250 ids" in said
    assert "fresh, as SOURCE has none: none\nunused of SOURCE: none" in said
    assert "type='PluginPanopticDETR', backbone=dict(depth=18, out_indices=(0, 1, 2, 3))" in said
    assert "num_things_classes=80, num_stuff_classes=53" in said


def test_checkpoint_of_boxes_alone_says_that_its_masks_are_to_be_trained(tmp_path, capsys):
    net = original.DETRsegm()
    code, out = convert(tmp_path, net.detr.state_dict())
    assert code == 0
    missing = MODELS.build(small(batchformer=None)).load_state_dict(
        torch.load(out)["state_dict"], strict=False
    )
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"panoptic_head"}
    assert "boxes alone (it has no mask head: train it next)" in capsys.readouterr().out


def test_part_of_a_mask_head_is_an_error(tmp_path, capsys):
    state = original.DETRsegm().state_dict()
    del state["mask_head.gn3.weight"]
    assert convert(tmp_path, state)[0] == 1
    assert "no whole DETR: it has no mask_head.gn3.weight" in capsys.readouterr().err


def test_masks_of_instances_are_converted_without_stuff(tmp_path, capsys):
    code, out = convert(tmp_path, original.DETRsegm(num_outputs=92).state_dict())
    assert code == 0
    settings = {"bbox_head": {"num_classes": 80}, "panoptic_head": {"num_stuff_classes": 0}}
    model = MODELS.build(small(batchformer=None, **settings))
    model.load_state_dict(torch.load(out)["state_dict"], strict=True)
    said = capsys.readouterr().out
    assert "classes: the 80 categories of COCO, of its 91 ids" in said
    assert "num_things_classes=80, num_stuff_classes=0" in said
