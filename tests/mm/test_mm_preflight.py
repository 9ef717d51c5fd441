"""What tools/train_mmdet.py and tools/test_mmdet.py find out before anything is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.layers import DinoTransformerDecoder
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import PretrainedInit

from mm_plugins.preflight import check_config, check_decoder


@MODELS.register_module()
class PartsOfADetector(nn.Module):
    """Builds the modules that a config names, and nothing else."""

    def __init__(self, **parts: dict[str, Any]) -> None:
        super().__init__()
        for part in parts.values():
            MODELS.build(part)


def attention(**changed: Any) -> dict[str, Any]:
    return {"cfg": {"type": "TripletAttention"}, "position": "after_conv3"} | changed


def config(backbone: dict[str, Any] | None = None, **top: Any) -> Config:
    cfg = parts(backbone=backbone) if backbone else parts()
    cfg.merge_from_dict(top)
    return cfg


def parts(**named: dict[str, Any]) -> Config:
    return Config({"model": {"type": "PartsOfADetector", **named}})


def resnet(**changed: Any) -> dict[str, Any]:
    small = {"base_channels": 8, "stem_channels": 8}
    return {"type": "ResNet", "depth": 50} | small | changed


def mobilenet(**changed: Any) -> dict[str, Any]:
    entry = attention(position="after_linear_conv") | changed
    return {"type": "PluginMobileNetV2", "plugins": [entry]}


def check(cfg: Config, *, train: bool = True, resumes: bool = False) -> None:
    check_config(cfg, train=train, resumes=resumes)


def error_of(cfg: Config, *, train: bool = True, resumes: bool = False) -> str:
    with pytest.raises(ValueError) as error:
        check(cfg, train=train, resumes=resumes)
    return str(error.value)


def resnet_checkpoint(path: Path, blocks: tuple[int, ...]) -> str:
    names = [
        f"backbone.layer{stage}.{block}.conv{i}.weight"
        for stage, count in enumerate(blocks, start=1)
        for block in range(count)
        for i in (1, 2, 3)
    ]
    torch.save({"state_dict": dict.fromkeys(names, torch.zeros(1)), "meta": {}}, path)
    return str(path)


def test_good_config_passes_unchanged_and_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    cfg = config(val_dataloader=None, work_dir="work_dirs/a")
    before = cfg.to_dict()
    check(cfg)
    assert cfg.to_dict() == before
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "gcnet/mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco.py",
        "empirical_attention/faster-rcnn_r50-attn1111_fpn_1x_coco.py",
        "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco.py",
        "resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py",
        "detectors/detectors_htc-r50_1x_coco.py",
        "hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py",
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
        "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
        "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    ],
)
def test_models_of_mmdetections_own_configs_pass_and_draw_no_random_numbers(name):
    import mmdet

    cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / name)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg.pop(loader)  # COCO is not here
    before = torch.get_rng_state()
    check(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_that_computes_while_it_is_built_passes_and_draws_no_random_numbers(monkeypatch):
    def compute(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.drawn = torch.rand(1).item()  # which takes numbers

    monkeypatch.setattr(PartsOfADetector, "__init__", compute)
    before = torch.get_rng_state()
    check(parts())
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------- backbone, plugins


@pytest.mark.parametrize(
    ("kind", "depth", "depths"),
    [
        ("ResNet", 42, "18, 34, 50, 101, 152"),
        ("ResNeXt", 18, "50, 101, 152"),
        ("PluginResNet", "50", "10, 18, 34, 50, 101, 152"),
    ],
)
def test_unknown_depth_is_named_with_those_that_exist(kind, depth, depths):
    for scope in ("", "mmdet."):
        message = error_of(config({"type": scope + kind, "depth": depth}))
        assert message == f"model.backbone.depth: no {kind} of depth {depth!r}; there are {depths}"


def test_resnet_anywhere_in_the_model_is_found():
    inner = {"type": "PartsOfADetector", "backbone": resnet(depth=42)}
    assert error_of(parts(detector=inner)).startswith("model.detector.backbone.depth: ")


def test_config_without_a_model_passes():
    check(Config({"train_dataloader": None}))


KAIMING = {"type": "Kaiming", "layer": "Conv2d"}
IN_BACKBONE = "model.backbone.plugins[0]"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"position": "after_conv4"},
            ".position: must be 'after_conv1' or 'after_conv2' or 'after_conv3' in this backbone, "
            "got 'after_conv4'",
        ),
        ({"position": None}, ".position: must be 'after_conv1' or "),
        ({"stage": (True,) * 4}, ": unknown key 'stage'; did you mean 'stages'?"),
        ({"cfg": "TripletAttention"}, ": expected dict(cfg=dict(type=…), position=…, stages=…), "),
        ({"cfg": {"kernel_size": 3}}, ".cfg.type: must be a plugin layer such as 'TripletAttent"),
        (
            {"cfg": {"type": "TripletAtention"}},
            ".cfg.type: must be a plugin layer such as 'TripletAttention' or 'BlockPlugin', got "
            "'TripletAtention'; did you mean 'TripletAttention'",
        ),
        (
            {"cfg": {"type": "TripletAttention", "kernel_size": 4}},
            ".cfg.kernel_size: must be a positive odd number (3 or 7 in the paper), got 4",
        ),
        (
            {"cfg": {"type": "TripletAttention", "norm": "GN"}},
            ".cfg.norm: must be 'BN', 'SyncBN' or 'FrozenBN', got 'GN'",
        ),
        (
            {"cfg": {"type": "TripletAttention", "kernel": 3}},
            ".cfg.kernel: is no argument; there are kernel_size, no_spatial, norm",
        ),
        (
            {"cfg": {"type": "IDABlock", "in_channels": 8}},
            ".cfg.in_channels: leave it out; the backbone passes it",
        ),
        (
            {"cfg": {"type": "IDABlock", "num_queries": 0}, "blocks": "all"},
            ".cfg.num_queries: must be a positive",
        ),
        (
            {"cfg": {"type": "IDABlock", "beta": 0.0}, "blocks": "all"},
            ".cfg.beta: must be positive, got 0.0",
        ),
        (
            {"cfg": {"type": "SimAM", "warm_start": 1}},
            ".cfg.warm_start: must be True or False, got 1",
        ),
        (
            {"cfg": {"type": "IDABlock"}},
            ".blocks: 'IDABlock' is for the last block of a stage, and ResNet puts plugins into "
            "all of them; use type='PluginResNet', or say so by blocks='all'",
        ),
        ({"blocks": "last"}, ".blocks: 'TripletAttention' is for the last block of a stage, and"),
        ({"blocks": "first"}, ".blocks: must be 'all' or 'last', got 'first'"),
        (
            {"cfg": {"type": "BlockPlugin", "name": "simm"}},
            ".cfg.name: must be one of ida, simam, triplet_attention, one of timm's such as ",
        ),
        (
            {"cfg": {"type": "BlockPlugin"}},
            ".cfg.name: is missing; name a block plugin ('timm:eca')",
        ),
        (
            {"cfg": {"type": "BlockPlugin", "name": "math:sqrt"}},
            ".cfg.name: must be a class of nn.Module, got 'math:sqrt'",
        ),
    ],
)
def test_wrong_setting_of_a_plugin_is_named_with_its_path_and_what_is_right(changed, message):
    entry = attention(**changed)
    assert error_of(config(resnet(plugins=[entry]))).startswith(IN_BACKBONE + message)
    # And the right one of several
    other = attention(cfg={"type": "TripletAttention", "postfix": "_1"})
    found = error_of(config(resnet(plugins=[other, entry])))
    assert found.startswith(f"model.backbone.plugins[1]{message}")


def test_two_of_a_type_in_one_stage_need_a_postfix_of_their_own():
    first, last = (True, True, False, False), (False, True, True, False)
    message = error_of(config(resnet(plugins=[attention(stages=first), attention(stages=last)])))
    assert message == (
        "model.backbone.plugins[1].cfg: plugins[0] is a 'TripletAttention' in the same stage; give "
        "each a postfix of its own, such as postfix='_2'"
    )
    apart = [attention(stages=first), attention(stages=(False, False, True, True))]
    named = [attention(), attention(cfg={"type": "TripletAttention", "postfix": "_2"})]
    for plugins in (apart, named):
        check(config(resnet(plugins=plugins)))


@pytest.mark.parametrize(
    "layer",
    [
        {"type": "TripletAttention", "postfix": "_2", "warm_start": True},
        {"type": "mmdet.TripletAttention", "norm": "SyncBN"},
        {"type": "BlockPlugin", "name": "simam", "e_lambda": 0.1},
        {"type": "ContextBlock", "ratio": 1 / 16},
        {"type": "NonLocal2d", "reduction": 2},
    ],
)
def test_layers_of_ours_and_of_mmcv_pass(layer):
    check(config(resnet(plugins=[attention(cfg=layer)])))


# The channels that 7 heads cannot share, at each backbone's positions
@pytest.mark.parametrize(
    ("backbone", "entry", "channels"),
    [
        (resnet(), {"stages": (False, False, False, True)}, 256),
        (resnet(), {"stages": (True, False, False, True)}, 32),  # the first that is wrong
        (resnet(), {"stages": (False, False, True, False), "position": "after_conv2"}, 32),
        ({"type": "RegNet", "arch": "regnetx_400mf"}, {}, 32),
        ({"type": "PluginResNet", "depth": 18}, {"position": "after_conv2"}, 64),
        ({"type": "PluginMobileNetV2"}, {"position": "after_linear_conv"}, 16),
    ],
)
def test_heads_that_do_not_divide_the_channels_of_a_stage_are_named(backbone, entry, channels):
    layers = [{"type": "IDABlock", "num_heads": heads, "postfix": heads} for heads in (8, 7)]
    plugins = [attention(cfg=layer, blocks="all", **entry) for layer in layers]
    assert error_of(config(backbone | {"plugins": plugins})) == (
        f"model.backbone.plugins[1].cfg.num_heads: must divide the {channels} channels, got 7"
    )


def test_stage_without_the_layer_does_not_matter():
    layer = {"type": "IDABlock", "num_heads": 24}
    assert "must divide the 16 channels, got 24" in error_of(config(mobilenet(cfg=layer)))
    check(config(mobilenet(cfg=layer, stages=tuple(stage == 5 for stage in range(1, 8)))))


def test_backbone_with_attention_stays_as_its_config_says():
    dcn = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": False}
    deformable = {"dcn": dcn, "stage_with_dcn": (False, True, True, True)}
    layer = {"type": "IDABlock", "num_heads": 4}
    cfg = config(resnet(**deformable, plugins=[attention(cfg=layer, blocks="all")]))
    before = cfg.to_dict()
    check(cfg)
    assert cfg.to_dict() == before


@pytest.mark.parametrize("stages", [(), (True,), (True,) * 5, ("res2", "res3"), True, 4])
def test_wrong_stages_are_named(stages):
    message = error_of(config(resnet(plugins=[attention(stages=stages)])))
    assert message == (
        "model.backbone.plugins[0].stages: expected 4 times True or False, one for each stage of "
        f"model.backbone, got {stages!r}"
    )


def test_stages_are_counted_as_the_backbone_has_them():
    three = {"num_stages": 3, "out_indices": (2,), "strides": (1, 2, 2), "dilations": (1, 1, 1)}
    check(config(resnet(**three, plugins=[attention(stages=(True, False, True))])))
    for stages, backbone, count in (
        ((True,) * 4, resnet(**three, plugins=[attention(stages=(True,) * 4)]), 3),
        ((True,) * 4, mobilenet(stages=(True,) * 4), 7),
    ):
        message = error_of(config(backbone))
        assert message.startswith(f"{IN_BACKBONE}.stages: expected {count} times True or False")
        assert message.endswith(f"got {stages}")
    check(config(mobilenet(stages=(True,) * 7)))


@pytest.mark.parametrize(
    ("backbone", "name", "right"),
    [
        ({"type": "ResNet", "depth": 18}, "ResNet-18", "after_conv2"),
        ({"type": "mmdet.ResNet", "depth": 34}, "ResNet-34", "after_conv2"),
        ({"type": "MobileNetV2"}, "MobileNetV2", "after_linear_conv"),
    ],
)
def test_backbone_that_takes_no_plugins_is_named_with_the_one_that_does(backbone, name, right):
    entry = attention(position=right)
    kind = backbone["type"].removeprefix("mmdet.")
    assert error_of(config(backbone | {"plugins": [entry]})) == (
        f"model.backbone.type: MMDetection's {name} takes no plugins; "
        f"use type='Plugin{kind}' and position={right!r}"
    )
    check(config(backbone | {"type": f"Plugin{kind}", "plugins": [entry]}))
    check(config(backbone))
    wrong = backbone | {"type": f"Plugin{kind}", "plugins": [attention(position="after_conv3")]}
    assert error_of(config(wrong)) == (
        f"model.backbone.plugins[0].position: must be {right!r} in this backbone, got 'after_conv3'"
    )


# --------------------------------------------------------------------------------- anything else


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (resnet(plugin=[]), "plugin: is no argument; there are depth, .*did you mean 'plugins'?"),
        (
            {"type": "ResNeXt", "depth": 50, "plugin": []},
            "plugin: is no argument; there are groups, .*did you mean 'plugins'?",
        ),
        (
            {"type": "PluginMobileNetV2", "out_indexes": (4, 7)},
            "out_indexes: is no argument; .*did you mean 'out_indices'?",
        ),
        (
            {"type": "FPN", "in_channel": [8], "out_channels": 8, "num_outs": 1},
            "in_channel: is no argument; there are in_channels, .*did you mean 'in_channels'",
        ),
        (
            {"type": "SwinTransformr"},
            "type: no module is registered as 'SwinTransformr'; did you mean 'SwinTransformer'?",
        ),
        (resnet(style="none"), "style: it cannot be built: AssertionError: assert style in"),
    ],
)
def test_what_no_constructor_of_mmdetection_takes_is_one_line_with_its_place(part, message):
    found = error_of(config(part))
    if "style" in message:  # of which MMDetection does not say the argument
        message = message.replace("style", "model.backbone", 1)
    else:
        message = f"model.backbone.{message}"
    assert re.match(message, found), found
    assert "\n" not in found


def test_error_of_a_part_is_one_short_line(monkeypatch):
    def fail(self: Any) -> None:
        raise RuntimeError("a\nb" * 1000)

    monkeypatch.setattr(PartsOfADetector, "__init__", fail)
    message = error_of(parts())
    assert message.startswith("model: it cannot be built: RuntimeError: a ba b")
    assert len(message) < 600


# --------------------------------------------------------------------------------------- the heads

HEAD = {"in_channels": 16, "roi_feat_size": 3, "num_classes": 4, "fc_out_channels": 12}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("IDABBoxHead", {"num_heads": 3}, "num_heads: must divide the 16 channels, got 3"),
        (
            "IDABBoxHead",
            {"num_shared_convs": 1, "conv_out_channels": 18},
            "num_heads: must divide the 18 channels, got 4",
        ),
        ("IDABBoxHead", {"beta": 0.0}, "beta: must be positive, got 0.0"),
        ("IDABBoxHead", {"sample_order": "row"}, "sample_order: must be 'heads' or 'interleaved'"),
        ("IDABBoxHead", {"num_head": 3}, "num_head: is no argument; .*did you mean 'num_heads'"),
        ("IDABBoxHead", {"fc_out_channel": 3}, "fc_out_channel: .*did you mean 'fc_out_channels'"),
        ("IDABBoxHead", {"with_avg_pool": True}, "with_avg_pool: must be False, as IDABBoxHead"),
        (
            "BatchFormerBBoxHead",
            {"batchformer": {"num_heads": 5}},
            "batchformer.num_heads: must divide embed_dims, got num_heads=5 and embed_dims=12",
        ),
        (
            "BatchFormerBBoxHead",
            {"batchformer": {"num_head": 2}},
            "batchformer.num_head: is no argument; there are num_heads, .*mean 'num_heads'",
        ),
        ("BatchFormerBBoxHead", {"batchformer": 4}, r"batchformer: must be dict\(…\), got 4"),
        ("BatchFormerBBoxHead", {"batchformers": {}}, "batchformers: .*did you mean 'batchformer'"),
        ("BatchFormerBBoxHead", {"num_shared_fcs": 0}, "num_shared_fcs: must be at least 1, as"),
        ("BatchFormerBBoxHead", {"num_cls_convs": 1}, "num_cls_convs: must be 0, as shared fully"),
    ],
)
def test_wrong_argument_of_a_head_is_named(kind, arguments, message):
    wrong = {"type": kind, **HEAD, **arguments}
    assert re.match(f"model.bbox_head.{message}", error_of(parts(bbox_head=wrong)))


def test_head_of_a_cascades_stage_is_named():
    good = {"type": "IDABBoxHead", **HEAD, "num_heads": 2}
    cfg = parts(first=good, second={**good, "num_heads": 3})
    assert error_of(cfg).startswith("model.second.num_heads: must divide")


@pytest.mark.parametrize(
    "head",
    [
        {"type": "IDABBoxHead", "num_heads": 8, "heavy": True, "init_cfg": None},
        {"type": "IDABBoxHead", "loss_cls": {"type": "SeesawLoss", "num_classes": 4}},
        {"type": "BatchFormerBBoxHead", "batchformer": {"num_heads": 2, "dropout": 0.1}},
    ],
)
def test_head_that_can_be_built_passes_unchanged(head):
    cfg = parts(bbox_head=HEAD | head)
    before = cfg.to_dict()
    check(cfg)
    assert cfg.to_dict() == before


# ------------------------------------------------------------------------------------------ weights


def test_weights_of_another_depth_are_refused(tmp_path):
    path = resnet_checkpoint(tmp_path / "r101.pth", (3, 4, 23, 3))
    message = error_of(config(resnet(), load_from=path))
    assert message.startswith(f"load_from: {path!r} holds a ResNet-101, but model.backbone.depth")
    check(config(resnet(depth=101), load_from=path))


def test_missing_weights_are_refused_but_where_a_training_is_resumed():
    assert (
        error_of(config(resnet(), load_from="none.pth"))
        == "load_from: there is no checkpoint 'none.pth'"
    )
    check(config(resnet(), load_from="none.pth"), resumes=True)


@pytest.mark.parametrize("weights", ["torchvision://resnet50", "https://example.com/r.pth"])
def test_weights_to_download_are_left_to_mmdetection(weights):
    pretrained = {"type": "Pretrained", "checkpoint": weights}
    check(config(resnet(init_cfg=pretrained)))
    check(config(resnet(), load_from=weights))


@pytest.mark.parametrize("listed", [False, True], ids=["alone", "listed"])
@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit], ids=["named", "class"])
def test_pretrained_backbone_of_another_depth_is_refused(tmp_path, kind, listed):
    path = resnet_checkpoint(tmp_path / "r101.pth", (3, 4, 23, 3))
    init = {"type": kind, "checkpoint": path}
    cfg = config(resnet(init_cfg=[KAIMING, init] if listed else init))
    message = error_of(cfg)
    assert message.startswith(f"model.backbone.init_cfg.checkpoint: {path!r} holds a ResNet-101")
    assert "set model.backbone.depth to 101" in message


def test_pretrained_backbone_does_not_matter_where_the_whole_model_is_loaded(tmp_path):
    path = resnet_checkpoint(tmp_path / "r50.pth", (3, 4, 6, 3))
    pretrained = {"type": "Pretrained", "checkpoint": "none.pth"}
    check(config(resnet(init_cfg=pretrained), load_from=path))
    assert "there is no checkpoint 'none.pth'" in error_of(config(resnet(init_cfg=pretrained)))


def test_weights_of_a_backbone_without_a_depth_must_be_there_and_no_more(tmp_path):
    pretrained = {"type": "Pretrained", "checkpoint": "none.pth"}
    regnet = {"type": "RegNet", "arch": "regnetx_400mf", "init_cfg": pretrained}
    assert "there is no checkpoint 'none.pth'" in error_of(config(regnet))
    pretrained["checkpoint"] = resnet_checkpoint(tmp_path / "r50.pth", (3, 4, 6, 3))
    check(config(regnet))


def test_other_initializations_have_no_weights():
    check(config(resnet(init_cfg=KAIMING)))
    check(config(resnet(init_cfg=None)))


def test_names_that_mmdetection_does_not_load_are_refused_with_the_remedy(tmp_path):
    names = [f"backbone.bottom_up.res2.{b}.conv{i}.weight" for b in range(3) for i in (1, 2, 3)]
    path = str(tmp_path / "detectron2.pth")
    torch.save({"model": dict.fromkeys(names, torch.zeros(1))}, path)
    message = error_of(config(resnet(), load_from=path))
    assert "Detectron2's names" in message
    assert f"tools/convert_checkpoint.py {path} converted.pth --to mm" in message


@pytest.mark.parametrize("whole", [True, False], ids=["load_from", "init_cfg"])
def test_tensors_that_stand_where_detectron2_has_them_are_refused_with_the_remedy(
    tmp_path, monkeypatch, whole
):
    path = resnet_checkpoint(tmp_path / "model_final.pth", (3, 4, 6, 3))
    torch.save({"model": torch.load(path)["state_dict"], "iteration": 9}, path)

    def cfg(path: str) -> Config:
        pretrained = {"type": "Pretrained", "checkpoint": path}
        return config(resnet(), load_from=path) if whole else config(resnet(init_cfg=pretrained))

    message = error_of(cfg(path))
    setting = "load_from" if whole else "model.backbone.init_cfg.checkpoint"
    assert message.startswith(f"{setting}: {path!r} has its tensors under 'model', as Detectron2")
    monkeypatch.chdir(tmp_path)
    exec(message.partition("has them: ")[2])
    check(cfg("converted.pth"))


def test_layout_does_not_depend_on_the_backbone(tmp_path):
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    swin = {"type": "SwinTransformer"}
    assert "tensors under 'model'" in error_of(config(swin, load_from=str(tmp_path / "a.pth")))
    check(config(swin, load_from=str(tmp_path / "a.pth")), resumes=True)


def test_backbone_alone_is_no_detector(tmp_path):
    path = resnet_checkpoint(tmp_path / "r50.pth", (3, 4, 6, 3))
    state_dict = torch.load(path)["state_dict"]
    bare = {name.removeprefix("backbone."): value for name, value in state_dict.items()}
    torch.save(bare, path)
    message = error_of(config(resnet(), load_from=path))
    assert message.startswith("load_from: ") and "model.backbone.init_cfg=dict(" in message
    check(config(resnet(init_cfg={"type": "Pretrained", "checkpoint": path})))


# ------------------------------------------------------------------------------------- the decoder


def test_grounding_dino_that_does_not_fit_the_forward_it_inherits_is_told():
    kinds = (DinoTransformerDecoder, GroundingDinoTransformerDecoder)
    dino, decoder = (kind(1, {}, post_norm_cfg=None) for kind in kinds)
    first = decoder.ref_point_head.layers[0]
    first.in_features = dino.ref_point_head.layers[0].in_features
    check_decoder(decoder)
    first.in_features //= 2
    with pytest.raises(ValueError, match=r"model\.type: Grounding DINO cannot run in MMDetection"):
        check_decoder(decoder)
