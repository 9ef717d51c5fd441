"""tools/convert_checkpoint.py on whole detectors of the original DETR repositories."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

import convert_checkpoint
import original_detr as original
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config

pytestmark = pytest.mark.usefixtures("whole_draws")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NO_CATEGORY = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [i for i in range(91) if i not in NO_CATEGORY]
BASES = {
    "DETR": "mmdet::detr/detr_r50_8xb2-150e_coco.py",
    "ConditionalDETR": "mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py",
    "DeformableDETR": "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
}


def small(width: int) -> dict[str, Any]:
    """What is smaller here than in MMDetection's own configs, of any DETR."""
    attention = {"embed_dims": width}
    layer = {
        "self_attn_cfg": attention,
        "ffn_cfg": {**attention, "feedforward_channels": 2 * width},
    }
    return {
        "num_queries": 5,
        "backbone": {"depth": 18, "init_cfg": None},
        "neck": {"in_channels": [512], "out_channels": width},
        "encoder": {"num_layers": 2, "layer_cfg": layer},
        "decoder": {"num_layers": 2, "layer_cfg": {**layer, "cross_attn_cfg": attention}},
        "positional_encoding": {"num_feats": width // 2},
        "bbox_head": {"embed_dims": width},
        "test_cfg": {"max_per_img": 5},
    }


def config_of(tmp_path: Path, kind: str, width: int, **settings: Any) -> Path:
    """A small config on one of MMDetection's own; ``settings`` are those that the tool asks for."""
    model = small(width)
    if kind == "DeformableDETR":
        model["neck"]["in_channels"] = [128, 256, 512]
    merged = Config({"model": model})
    merged.merge_from_dict({"model": settings})
    path = tmp_path / f"{kind}.py"
    path.write_text(
        f"_base_ = {BASES[kind]!r}\n"
        'custom_imports = dict(imports=["mm_plugins"])\n'
        f"model = {merged.model.to_dict()!r}\n"
    )
    return path


def save(net: nn.Module, path: Path, **args: Any) -> Path:
    """A checkpoint as the original trainings write it."""
    content = {"model": net.state_dict(), "epoch": 49, "optimizer": {"param_groups": []}}
    torch.save({**content, "args": argparse.Namespace(lr=1e-4, device="cuda", **args)}, path)
    return path


def convert(source: Path, out: Path, *options: str) -> int:
    return convert_checkpoint.main([str(source), str(out), "--to", "mm", *options])


def build(config: Path, weights: Path) -> nn.Module:
    model = MODELS.build(Config.fromfile(config).model)
    model.load_state_dict(torch.load(weights)["state_dict"], strict=True)
    return model.eval()


def two_images() -> tuple[Tensor, Tensor, list[DetDataSample]]:
    """Images (2, 3, 96, 128), of which one is smaller; their mask; what MMDetection has for it."""
    images, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:] = mask[1, :, 96:] = True
    images[mask[:, None].expand_as(images)] = 0
    shapes = [
        {"img_shape": shape, "batch_input_shape": (96, 128)} for shape in ((96, 128), (64, 96))
    ]
    return images, mask, [DetDataSample(metainfo=shape) for shape in shapes]


@torch.no_grad()
def assert_same_outputs(net: nn.Module, model: nn.Module, rows: list[int] | None = None) -> None:
    """Compare all queries' scores and boxes; ``rows`` are the outputs that have become classes."""
    images, mask, samples = two_images()
    logits, boxes = net.eval()(images, mask)
    found_logits, found_boxes = (out[-1] for out in model(images, samples, mode="tensor"))
    logits = logits if rows is None else logits[..., rows]
    for out in (logits, boxes):  # there is something to compare: images and queries differ
        assert (out[0] - out[1]).abs().max() > 0.01 and out.std(dim=1).amax(dim=1).min() > 1e-3
    if model.bbox_head.loss_cls.use_sigmoid:
        scores, found_scores = logits.sigmoid(), found_logits.sigmoid()
    else:
        scores, found_scores = logits.softmax(dim=-1), found_logits.softmax(dim=-1)
    # Random weights let features grow with each block: what additions in another order round
    # differently reaches 1e-4 behind a ResNet-50 on a CPU with AVX2 alone.
    torch.testing.assert_close(found_scores, scores, atol=3e-4, rtol=0)
    torch.testing.assert_close(found_boxes, boxes, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------ the same detections


def detr(**kwargs: Any) -> nn.Module:
    return original.DETR(**kwargs)


def conditional(**kwargs: Any) -> nn.Module:
    return original.ConditionalDETR(**kwargs)


def deformable(**kwargs: Any) -> nn.Module:
    return original.DeformableDETR(**kwargs)


def refining(**kwargs: Any) -> nn.Module:
    return original.DeformableDETR(refine=True, **kwargs)


def two_stage(**kwargs: Any) -> nn.Module:
    return original.DeformableDETR(width=256, refine=True, two_stage=True, **kwargs)


def single_scale(**kwargs: Any) -> nn.Module:
    return original.DeformableDETR(levels=1, **kwargs)


def dc5(**kwargs: Any) -> nn.Module:
    return original.DETR(dilation=True, **kwargs)


def single_scale_dc5(**kwargs: Any) -> nn.Module:
    return original.DeformableDETR(levels=1, dilation=True, **kwargs)


DILATED = {
    "type": "PluginResNet",
    "depth": 50,
    "strides": (1, 2, 2, 1),
    "dilations": (1, 1, 1, 2),
    "contract_dilation": True,
}
SINGLE_SCALE = {
    "num_feature_levels": 1,
    "encoder": {"layer_cfg": {"self_attn_cfg": {"num_levels": 1}}},
    "decoder": {"layer_cfg": {"cross_attn_cfg": {"num_levels": 1}}},
}
VARIANTS: dict[Callable[..., nn.Module], tuple[str, int, dict[str, Any]]] = {
    detr: ("DETR", 32, {}),
    conditional: ("ConditionalDETR", 256, {}),
    deformable: ("DeformableDETR", 64, {"neck": {"bias": True}}),
    refining: ("DeformableDETR", 64, {"neck": {"bias": True}, "with_box_refine": True}),
    two_stage: (
        "DeformableDETR",
        256,
        {"neck": {"bias": True}, "with_box_refine": True, "as_two_stage": True},
    ),
    single_scale: (
        "DeformableDETR",
        64,
        {
            "backbone": {"out_indices": (3,)},
            "neck": {"bias": True, "in_channels": [512], "num_outs": 1},
            **SINGLE_SCALE,
        },
    ),
    dc5: ("DETR", 32, {"backbone": DILATED, "neck": {"in_channels": [2048]}}),
    single_scale_dc5: (
        "DeformableDETR",
        64,
        {
            "backbone": {**DILATED, "out_indices": (3,)},
            "neck": {"bias": True, "in_channels": [2048], "num_outs": 1},
            **SINGLE_SCALE,
        },
    ),
}
DC5 = (dc5, single_scale_dc5)


@pytest.mark.parametrize("make", VARIANTS)
def test_detections_are_the_same(tmp_path, capsys, make):
    kind, width, settings = VARIANTS[make]
    net = make()
    out = tmp_path / "out.pth"
    config = config_of(tmp_path, kind, width, **settings)
    source = save(net, tmp_path / "source.pth", num_queries=5, dilation=make in DC5)
    assert convert(source, out, "--config", str(config)) == 0
    rows = [*COCO_IDS, 91] if kind == "DETR" else COCO_IDS
    assert_same_outputs(net, build(config, out), rows)
    printed = capsys.readouterr()
    depth = 50 if make in DC5 else 18
    assert f"{kind} with ResNet-{depth}, the original repository's names" in printed.out
    assert "classes: the 80 categories of COCO, of its 91 ids" in printed.out
    assert "fresh, as SOURCE has none: none\nunused of SOURCE: none" in printed.out
    assert not printed.err


@pytest.mark.parametrize("make", [make for make in VARIANTS if make not in DC5])
def test_other_classes_than_cocos_are_kept_as_they_are(tmp_path, capsys, make):
    kind, width, settings = VARIANTS[make]
    net = make(num_outputs=4)
    out = tmp_path / "out.pth"
    num_classes = 3 if kind == "DETR" else 4  # its last is "no object" in both
    head = {"bbox_head": {"num_classes": num_classes}}
    assert convert(save(net, tmp_path / "source.pth", num_queries=5), out) == 0
    assert_same_outputs(net, build(config_of(tmp_path, kind, width, **settings, **head), out))
    said = capsys.readouterr().out
    assert f"bbox_head=dict(num_classes={num_classes})" in said
    assert "classes:" not in said


@pytest.mark.parametrize(
    ("make", "insert_idx", "share", "depth"),
    [
        (detr, (0,), False, 1),
        (detr, (0, 1), True, 1),
        (conditional, (1,), True, 1),
        (deformable, (0, 1), False, 1),
        (refining, (0, 1), False, 2),
        (two_stage, (1,), True, 2),
        (single_scale, (0,), False, 1),
    ],
)
def test_batchformer_gives_the_same_second_stream(tmp_path, capsys, make, insert_idx, share, depth):
    kind, width, settings = VARIANTS[make]
    net = make(insert_idx=insert_idx, share=share, depth=depth)
    out = tmp_path / "out.pth"
    source = save(net, tmp_path / "source.pth", num_queries=5, insert_idx=list(insert_idx))
    batchformer = {"insert_after": insert_idx, "share": share, "num_layers": depth}
    with_batchformer = {"type": f"Plugin{kind}", "batchformer": {**batchformer, "eval": True}}
    config = config_of(tmp_path, kind, width, **settings, **with_batchformer)
    assert convert(source, out, "--config", str(config)) == 0
    rows = [*COCO_IDS, 91] if kind == "DETR" else COCO_IDS
    assert_same_outputs(net, build(config, out), rows)
    said = capsys.readouterr().out
    assert f"{'shared ' if share else ''}BatchFormer after encoder layer" in said
    assert "fresh, as SOURCE has none: none\nunused of SOURCE: none" in said
    assert f"model = dict(type='Plugin{kind}', backbone=dict(depth=18" in said
    arguments = f"insert_after={insert_idx}, share={share}, num_layers={depth}"
    assert f"batchformer=dict({arguments}))" in said


def test_plain_detector_of_mmdetection_leaves_the_batchformer_out(tmp_path, capsys):
    net, out = original.DETR(insert_idx=(0,)), tmp_path / "out.pth"
    config = config_of(tmp_path, "DETR", 32)
    assert convert(save(net, tmp_path / "source.pth"), out, "--config", str(config)) == 0
    assert "unused of SOURCE: encoder.batchformer.*.layers.* (12)\n" in capsys.readouterr().out
    model = MODELS.build(Config.fromfile(config).model).eval()
    missing, unexpected = model.load_state_dict(torch.load(out)["state_dict"], strict=False)
    assert not missing and all(name.startswith("encoder.batchformer.0.") for name in unexpected)
    net.transformer.encoder.insert_idx = ()
    assert_same_outputs(net, model, [*COCO_IDS, 91])


def test_shared_batchformer_without_arguments_is_taken_for_one_after_the_first_layer(
    tmp_path, capsys
):
    net = original.DETR(insert_idx=(1,), share=True)
    torch.save({"model": net.state_dict()}, tmp_path / "source.pth")
    assert convert(tmp_path / "source.pth", tmp_path / "out.pth") == 0
    assert "DETR with ResNet-18 and shared BatchFormer after encoder layer 0," in (
        capsys.readouterr().out
    )


def test_softmax_loses_only_the_ids_that_are_no_category(tmp_path):
    """A trained DETR gives those next to no score."""
    net, out = original.DETR(), tmp_path / "out.pth"
    with torch.no_grad():
        net.class_embed.bias[list(NO_CATEGORY)] = -30
    assert convert(save(net, tmp_path / "source.pth"), out) == 0
    model = build(config_of(tmp_path, "DETR", 32), out)
    images, mask, samples = two_images()
    expected = net.eval()(images, mask)[0].softmax(dim=-1)[..., :-1].max(dim=-1)
    with torch.no_grad():
        predicted = model.predict(images, samples, rescale=False)
    for image, sample in enumerate(predicted):
        scores, order = expected.values[image].sort(descending=True)
        torch.testing.assert_close(sample.pred_instances.scores, scores, atol=1e-4, rtol=0)
        ids = [COCO_IDS[label] for label in sample.pred_instances.labels]
        assert ids == expected.indices[image][order].tolist()


def test_classes_are_in_the_order_of_cocos_annotations(coco_sample):
    annotations = next((coco_sample / "annotations").glob("instances_*.json"))
    categories = json.loads(annotations.read_text())["categories"]
    assert [category["id"] for category in categories] == COCO_IDS


def test_outputs_say_what_pixels_they_want(tmp_path, capsys):
    source = save(original.DETR(), tmp_path / "source.pth")
    config = config_of(tmp_path, "DETR", 32, data_preprocessor={"bgr_to_rgb": False})
    assert convert(source, tmp_path / "out.pth", "--config", str(config)) == 0
    assert "model.data_preprocessor.bgr_to_rgb is False" in capsys.readouterr().err
    meta = torch.load(tmp_path / "out.pth")["meta"]
    assert meta["pixel_format"]["channel_order"] == "RGB"


# ------------------------------------------------------------------------------------------ errors


def no_classifier(state: dict[str, Tensor]) -> None:
    del state["class_embed.weight"], state["class_embed.bias"]


def no_decoder(state: dict[str, Tensor]) -> None:
    for name in [n for n in state if n.startswith("transformer.decoder.layers.")]:
        del state[name]


def half_a_batchformer(state: dict[str, Tensor]) -> None:
    state["transformer.bf.0.linear1.weight"] = torch.zeros(32, 32)


def norms_before(state: dict[str, Tensor]) -> None:
    state["transformer.encoder.norm.weight"] = torch.zeros(32)


def mask_head(state: dict[str, Tensor]) -> None:
    for name in list(state):
        state[f"detr.{name}"] = state.pop(name)
    state["mask_head.lay1.weight"] = torch.zeros(1)


def no_backbone(state: dict[str, Tensor]) -> None:
    for name in [n for n in state if n.startswith("backbone.")]:
        del state[name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_classifier, "no whole DETR: it has no class_embed.weight, class_embed.bias. With"),
        (no_decoder, "it has no transformer.decoder.layers.0.self_attn.in_proj_weight, "),
        (half_a_batchformer, "it has no transformer.bf.0.self_attn.in_proj_weight, "),
        (norms_before, "DETR has no place for transformer.encoder.norm.weight; it has no learned"),
        (mask_head, "no whole DETR: it has no bbox_attention.q_linear.weight, "),
        (no_backbone, "no ResNet and no MobileNetV2"),
    ],
)
def test_layout_that_is_nearly_right_is_an_error(tmp_path, capsys, spoil, message):
    state = dict(original.DETR().state_dict())
    spoil(state)
    torch.save({"model": state}, tmp_path / "source.pth")
    assert convert(tmp_path / "source.pth", tmp_path / "out.pth") == 1
    error = capsys.readouterr().err
    assert message in error and "source.pth" in error
    assert not (tmp_path / "out.pth").exists()


def test_dilation_of_a_file_without_arguments_is_asked_for(tmp_path, capsys):
    """The original DETR's own files hold the state dict alone."""
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    torch.save({"model": original.DETR().state_dict()}, source)
    assert convert(source, out) == 0
    printed = capsys.readouterr().out
    assert "is it DC5? Then say --args dilation=True" in printed and "dilations" not in printed
    assert convert(source, out, "--args", "dilation=True") == 0
    assert "dilations=(1, 1, 1, 2), contract_dilation=True" in capsys.readouterr().out
    for text, reason in (
        ("dilations=True", "must be NAME=VALUE, with dilation, insert_idx, nheads, num_queries"),
        ("dilation=yes", "must be of type bool"),
        ("insert_idx=['a']", "must be a list of whole numbers"),
    ):
        assert convert(source, out, "--args", text) == 1
        assert f"--args {text}: {reason}" in capsys.readouterr().err
    assert convert(source, out, "--backbone", "--args", "dilation=True") == 1
    assert "--args: are of a whole DETR" in capsys.readouterr().err
    assert convert(source, out, "--branch", "detr") == 1
    assert "--branch detr: SOURCE is a DETR" in capsys.readouterr().err


def test_dilated_config_is_not_that_of_other_weights(tmp_path, capsys):
    source = save(original.DETR(), tmp_path / "source.pth", dilation=False)
    dilated = {"strides": [1, 2, 2, 1], "dilations": [1, 1, 1, 2]}
    config = config_of(tmp_path, "DETR", 32, backbone=dilated)
    assert convert(source, tmp_path / "out.pth", "--config", str(config)) == 1
    assert "backbone.dilations is (1, 1, 1, 2), not (1, 1, 1, 1)" in capsys.readouterr().err
    # MMDetection's ResNet dilates the stage's first block, too.
    source = save(original.DETR(), tmp_path / "source.pth", dilation=True)
    assert convert(source, tmp_path / "out.pth", "--config", str(config)) == 1
    assert "backbone.contract_dilation is False, not True" in capsys.readouterr().err


def test_other_number_of_heads_is_an_error(tmp_path, capsys):
    source = save(original.DETR(), tmp_path / "source.pth", nheads=4)
    assert convert(source, tmp_path / "out.pth") == 1
    assert "args.nheads is 4, which no tensor tells" in capsys.readouterr().err


def test_backbone_alone_is_converted_where_that_is_asked_for(tmp_path):
    net = original.DETR()
    source, out = save(net, tmp_path / "source.pth"), tmp_path / "out.pth"
    assert convert(source, out, "--backbone") == 0
    state = torch.load(out)["state_dict"]
    assert torch.equal(state["conv1.weight"], net.state_dict()["backbone.0.body.conv1.weight"])
    assert not any("encoder" in name for name in state)


def test_detectron2_gets_the_backbone_and_is_told_of_the_bridge(tmp_path, capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    net = original.DETR()
    source, out = save(net, tmp_path / "source.pth"), tmp_path / "out.pth"
    assert convert_checkpoint.main([str(source), str(out), "--to", "d2"]) == 0
    assert "for MODEL.META_ARCHITECTURE MMDetDetector convert it with --to mm" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    state = torch.load(out)["model"]
    assert torch.equal(state["stem.conv1.weight"], net.state_dict()["backbone.0.body.conv1.weight"])


@pytest.mark.parametrize(
    ("framework", "config", "message"),
    [
        (
            "d2",
            "d2/BatchFormer-Detection/detr_R_50_batchformer_50ep.yaml",
            "use --to mm --config mmdet::detr/detr_r50_8xb2-150e_coco.py",
        ),
        ("mm", "d2/COCO-Detection/retinanet_R_50_IDA_FPN_1x.yaml", "defines no `model`"),
    ],
)
def test_config_of_the_other_framework_is_an_error(tmp_path, capsys, framework, config, message):
    source, out = save(original.DETR(), tmp_path / "source.pth"), tmp_path / "out.pth"
    arguments = [str(source), str(out), "--to", framework, "--config", str(CONFIGS / config)]
    assert convert_checkpoint.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"with_box_refine": True}, ["there is no neck.convs.0.conv.bias"]),
        (
            {"neck": {"bias": True}},
            ["weights: with_box_refine is False, not True. ", "as_two_stage=False"],
        ),
        (
            {
                "neck": {"bias": True},
                "with_box_refine": True,
                "bbox_head": {"num_classes": 20},
                "decoder": {"num_layers": 1},
            },
            [
                "decoder.num_layers is 1, not 2; bbox_head.num_classes is 20, not 80; ",
                "more differences",
                "To fine-tune on other classes convert without --config",
            ],
        ),
    ],
)
def test_config_of_another_model_is_an_error_that_says_which_settings_are_needed(
    tmp_path, capsys, settings, messages
):
    source = save(original.DeformableDETR(refine=True), tmp_path / "source.pth")
    config = config_of(tmp_path, "DeformableDETR", 64, **settings)
    assert convert(source, tmp_path / "out.pth", "--config", str(config)) == 1
    error = capsys.readouterr().err
    for message in [str(config), "neck=dict(bias=True)", "with_box_refine=True", *messages]:
        assert message in error
    assert not (tmp_path / "out.pth").exists()
