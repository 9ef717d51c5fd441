"""Triplet attention in MMDetection's ResNets, by their own ``plugins``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict

import plugin_core
from mm_plugins import TripletAttention
from mm_plugins.backbones import PluginBasicBlock

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "mm" / "triplet_attention"
NARROW = {"stem_channels": 8, "base_channels": 8}
VARIANTS = {
    "ResNet": {"type": "ResNet", "depth": 50, **NARROW},
    "ResNetV1d": {"type": "ResNetV1d", "depth": 50, **NARROW},
    "ResNeXt": {"type": "ResNeXt", "depth": 50, "groups": 2, "base_width": 4, **NARROW},
    "Res2Net": {"type": "Res2Net", "depth": 50, "scales": 2, "base_width": 8, **NARROW},
    "RegNet": {"type": "RegNet", "arch": "regnetx_400mf"},
    "PluginResNet-18": {"type": "PluginResNet", "depth": 18, **NARROW},
    "PluginResNet-34": {"type": "PluginResNet", "depth": 34, **NARROW},
    "PluginResNet-50": {"type": "PluginResNet", "depth": 50, **NARROW},
    "ResNet-101": {"type": "ResNet", "depth": 101, **NARROW},
    "ResNet-152": {"type": "ResNet", "depth": 152, **NARROW},
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
PLUGIN_RESNETS = pytest.mark.parametrize("depth", [18, 34, 50])


def plugin(variant: str = "", *, stages: tuple[bool, ...] | None = None, **layer: Any) -> dict:
    """What a config says; ``variant`` decides on the position, ``stages`` may be left out."""
    basic = variant in ("PluginResNet-18", "PluginResNet-34")
    entry = {
        "cfg": {"type": "TripletAttention", "kernel_size": 3, **layer},
        "position": "after_conv2" if basic else "after_conv3",
    }
    return entry if stages is None else entry | {"stages": stages}


def build(variant: str, *plugins: dict, **changed: Any) -> nn.Module:
    cfg = copy.deepcopy(VARIANTS[variant] | changed)
    return MODELS.build(cfg | {"plugins": list(plugins)} if plugins else cfg)


def evaluating(module: nn.Module) -> nn.Module:
    """``module.eval()``, which returns nothing for MMDetection's backbones."""
    module.eval()
    return module


def is_attention(name: str) -> bool:
    return ".triplet_attention." in name


def randomize(module: nn.Module) -> None:
    """Give norms and gates values that differ from their initial ones, as training does."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                    tensor.uniform_(0.5, 1.5)


# ------------------------------------------------------------------------------------- the layer


def test_layer_is_the_core_module_with_the_frameworks_arguments():
    layer = MODELS.build(
        {"type": "TripletAttention", "in_channels": 8, "kernel_size": 5, "no_spatial": True}
    )
    assert type(layer) is TripletAttention and isinstance(layer, plugin_core.TripletAttention)
    assert (layer.kernel_size, layer.hw, layer.alpha) == (5, None, None)
    warm = MODELS.build({"type": "mmdet.TripletAttention", "warm_start": True})
    assert warm.alpha is not None and warm.kernel_size == 7 and warm.hw is not None


def test_layer_equals_the_core_module():
    layer, core = TripletAttention(in_channels=4).eval(), plugin_core.TripletAttention().eval()
    core.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(layer(x), core(x))


# -------------------------------------------------------------------------------- the gates' norms


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics of the gates' norms."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    state = module.state_dict().items()
    return {n: t.clone() for n, t in state if ".cw." in f".{n}" and n.endswith(names)}


def trained(variant: str, *, frozen_stages: int = -1, **layer: Any) -> nn.Module:
    """A backbone as MMDetection's detectors have it, with ``norm_eval``, after a batch."""
    backbone = build(variant, plugin(variant, **layer), norm_eval=True, frozen_stages=frozen_stages)
    backbone.train()
    backbone(torch.randn(2, 3, 32, 32))
    return backbone


@pytest.mark.parametrize("variant", ["ResNet", "PluginResNet-18"])
def test_gates_gather_statistics_below_a_backbone_in_evaluation_mode(variant):
    backbone = trained(variant)
    for name, buffer in backbone.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == int(is_attention(name)), name
    assert not backbone.bn1.training and not backbone.layer1[0].bn1.training


def test_gates_of_frozen_stages_gather_no_statistics():
    backbone = trained("PluginResNet-18", frozen_stages=2)
    for stage in (1, 2, 3, 4):
        gate = getattr(backbone, f"layer{stage}")[0].triplet_attention.cw
        assert gate.conv.bn.num_batches_tracked == int(stage > 2)


def test_gates_gather_no_statistics_in_evaluation():
    backbone = evaluating(trained("PluginResNet-18"))
    before = statistics(backbone)
    backbone(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(statistics(backbone), before, rtol=0, atol=0)


def test_norm_eval_of_the_layer_uses_the_running_statistics_in_training():
    layer = TripletAttention(norm_eval=True)
    randomize(layer)
    before = statistics(layer)
    x = torch.randn(2, 4, 5, 6)
    assert layer.training and torch.equal(layer(x), evaluating(layer)(x))
    assert before and statistics(layer).keys() == before.keys()
    torch.testing.assert_close(statistics(layer), before, rtol=0, atol=0)


def test_scale_and_shift_of_the_gates_can_be_fixed():
    layer = TripletAttention(norm_cfg={"type": "BN", "requires_grad": False})
    fixed = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert fixed == {f"{g}.conv.bn.{p}" for g in ("cw", "hc", "hw") for p in ("weight", "bias")}
    assert all(p.requires_grad for p in TripletAttention().parameters())


def test_norm_of_all_processes_is_the_core_modules():
    layer = TripletAttention(norm_cfg={"type": "SyncBN", "requires_grad": True})
    assert layer.norm == plugin_core.TripletAttention(norm="SyncBN").norm != TripletAttention().norm


@pytest.mark.parametrize("norm_cfg", [{"type": "SyncBN"}, {"type": "BN", "requires_grad": False}])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_names_do_not_depend_on_the_norm(norm_cfg, norm_eval):
    layer = TripletAttention(norm_cfg=norm_cfg, norm_eval=norm_eval)
    layer.load_state_dict(plugin_core.TripletAttention().state_dict(), strict=True)


@pytest.mark.parametrize(
    ("norm_cfg", "message"),
    [
        ({"type": "GN"}, "type must be 'BN' or 'SyncBN', got 'GN'"),
        ({"requires_grad": True}, "type must be 'BN' or 'SyncBN', got None"),
        ({"type": "BN", "eps": 1e-3}, "unknown key eps"),
        ({"type": "BN", "requires_grad": "no"}, "requires_grad must be True or False, got 'no'"),
        (None, "must be dict(type='BN') or the like, got None"),
        ("SyncBN", "must be dict(type='BN') or the like, got 'SyncBN'"),
    ],
)
def test_wrong_norm_is_named_with_what_would_be_right(norm_cfg, message):
    with pytest.raises(ValueError) as error:
        TripletAttention(norm_cfg=norm_cfg)
    assert str(error.value).startswith("norm_cfg") and message in str(error.value)


# ---------------------------------------------------------------------------------- every backbone


@EVERY_VARIANT
def test_every_block_has_attention_under_its_published_name(variant):
    backbone = build(variant, plugin(variant))
    attention = plugin_core.TripletAttention()
    expected = [
        f"layer{stage}.{block}.triplet_attention.{name}"
        for stage in (1, 2, 3, 4)
        for block in range(len(getattr(backbone, f"layer{stage}")))
        for name in attention.state_dict()
    ]
    names = [name for name in backbone.state_dict() if is_attention(name)]
    assert sorted(names) == sorted(expected)
    assert "layer1.0.triplet_attention.cw.conv.conv.weight" in names


@EVERY_VARIANT
def test_other_names_are_the_plain_backbones(variant):
    names = [n for n in build(variant, plugin(variant)).state_dict() if not is_attention(n)]
    plain = variant.replace("Plugin", "")
    if plain not in VARIANTS:  # MMDetection's ResNet of this depth
        plain, changed = variant, {"type": "ResNet"}
    else:
        changed = {}
    assert names == list(build(plain, **changed).state_dict())


@EVERY_VARIANT
def test_stages_are_respected(variant):
    backbone = build(variant, plugin(variant, stages=(False, True, False, True)))
    for stage, wanted in enumerate((False, True, False, True), start=1):
        for block in getattr(backbone, f"layer{stage}"):
            assert hasattr(block, "triplet_attention") == wanted


@EVERY_VARIANT
def test_backbone_trains_with_attention(variant):
    backbone = build(variant, plugin(variant), norm_eval=False)
    backbone.train()
    features = backbone(torch.randn(2, 3, 32, 32))
    assert [f.shape[-1] for f in features] == [8, 4, 2, 1]
    sum(f.square().mean() for f in features).backward()
    for name, parameter in backbone.named_parameters():
        if is_attention(name):
            assert torch.isfinite(parameter.grad).all(), name
    assert backbone.layer1[0].triplet_attention.cw.conv.conv.weight.grad.abs().sum() > 0


@EVERY_VARIANT
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_warm_start_gives_exactly_the_plain_backbones_features(variant, mode):
    changed: dict[str, Any] = {"norm_eval": False}
    warm = build(variant, plugin(variant, warm_start=True), **changed)
    if variant.startswith("PluginResNet"):
        changed["type"] = "ResNet"
    plain = build(variant, **changed)
    randomize(plain)
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(is_attention(n) for n in missing) and not unexpected
    x = torch.randn(2, 3, 32, 32)
    for model in (warm, plain):
        model.train(mode)
    with torch.no_grad():
        features, expected = warm(x), plain(x)
    for feature, other in zip(features, expected, strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(feature, other)


def test_bottleneck_applies_attention_after_its_last_norm_and_before_the_sum():
    block = evaluating(build("ResNet", plugin())).layer2[0]
    randomize(block)
    x = torch.randn(2, 32, 6, 6)
    out = F.relu(block.bn1(block.conv1(x)))
    out = F.relu(block.bn2(block.conv2(out)))
    out = block.triplet_attention(block.bn3(block.conv3(out)))
    torch.testing.assert_close(block(x.clone()), F.relu(out + block.downsample(x)))


# ------------------------------------------------------------------------- ResNet-18 and ResNet-34


def basic_block_by_formula(block: PluginBasicBlock, x: Tensor) -> Tensor:
    out = F.relu(block.bn1(block.conv1(x)))
    out = block.triplet_attention(block.bn2(block.conv2(out)))
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(out + shortcut)


@pytest.mark.parametrize("index", [0, 1], ids=["downsampling", "identity"])
def test_basic_block_applies_attention_after_its_second_norm_and_before_the_sum(index):
    block = evaluating(build("PluginResNet-18", plugin("PluginResNet-18"))).layer2[index]
    randomize(block)
    assert type(block) is PluginBasicBlock and (block.downsample is None) == bool(index)
    x = torch.randn(2, 16 if index else 8, 6, 6)
    torch.testing.assert_close(block(x.clone()), basic_block_by_formula(block, x))


def test_two_plugins_are_applied_in_their_order():
    first, second = (plugin("PluginResNet-18", postfix=p, no_spatial=p == "_2") for p in ("", "_2"))
    block = evaluating(build("PluginResNet-18", first, second)).layer1[0]
    randomize(block)
    x = torch.randn(2, 8, 6, 6)
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    out = block.triplet_attention_2(block.triplet_attention(out))
    torch.testing.assert_close(block(x.clone()), F.relu(out + x))


@PLUGIN_RESNETS
@pytest.mark.parametrize("zero_init_residual", [True, False])
@pytest.mark.parametrize("plugins", [True, False], ids=["plugins", "plain"])
def test_weights_are_initialized_as_in_mmdetections_resnet(depth, zero_init_residual, plugins):
    variant = f"PluginResNet-{depth}"
    entries = [plugin(variant)] if plugins else []
    backbone = build(variant, *entries, zero_init_residual=zero_init_residual)
    plain = build(variant, type="ResNet", zero_init_residual=zero_init_residual)
    for model in (backbone, plain):
        randomize(model)
        model.init_weights()
    last_norm = "bn2" if depth < 50 else "bn3"
    expected = 0 if zero_init_residual else 1
    for model in (backbone, plain):
        for stage in (1, 2, 3, 4):
            for block in getattr(model, f"layer{stage}"):
                assert (getattr(block, last_norm).weight == expected).all()
                assert (block.bn1.weight == 1).all() and (block.bn1.bias == 0).all()


@PLUGIN_RESNETS
def test_attention_starts_as_a_gate_after_the_weights_are_initialized(depth):
    variant = f"PluginResNet-{depth}"
    backbone = build(variant, plugin(variant))
    backbone.init_weights()
    for module in backbone.modules():
        if isinstance(module, TripletAttention):
            assert (module.cw.conv.bn.weight == 1).all()
            assert module.cw.conv.conv.weight.abs().sum() > 0


def test_warm_start_is_still_the_identity_after_the_weights_are_initialized():
    backbone = build("PluginResNet-18", plugin("PluginResNet-18", warm_start=True))
    backbone.init_weights()
    assert backbone.layer1[0].triplet_attention.alpha.item() == 0


@PLUGIN_RESNETS
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # of MMDetection's Bottleneck
def test_recomputed_activations_give_equal_gradients(depth):
    variant = f"PluginResNet-{depth}"
    model = build(variant, plugin(variant), norm_eval=False)
    recomputing = build(variant, plugin(variant), norm_eval=False, with_cp=True)
    recomputing.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32).double()
    for m in (model.double(), recomputing.double()):
        m.train()
        sum(f.square().mean() for f in m(x)).backward()
    expected = dict(model.named_parameters())
    for name, parameter in recomputing.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_basic_block_recomputes_its_activations_in_backward():
    calls = []
    block = PluginBasicBlock(4, 4, plugins=[plugin("PluginResNet-18")], with_cp=True)
    block.triplet_attention.register_forward_pre_hook(lambda *_: calls.append(1))
    y = block(torch.randn(1, 4, 6, 6, requires_grad=True))
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


@PLUGIN_RESNETS
def test_deep_copy_is_independent(depth):
    variant = f"PluginResNet-{depth}"
    backbone = evaluating(build(variant, plugin(variant)))
    x = torch.randn(1, 3, 32, 32)
    expected = backbone(x)[-1]
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(x)[-1], expected)
    for block in twin.layer1:
        nn.init.constant_(block.triplet_attention.cw.conv.bn.bias, 9.0)
    assert torch.equal(backbone(x)[-1], expected)
    assert not torch.allclose(twin(x)[0], backbone(x)[0])


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_backbone_compiles_without_a_graph_break(mode):
    one_stage = {"num_stages": 1, "strides": (1,), "dilations": (1,), "out_indices": (0,)}
    backbone = build("PluginResNet-18", plugin("PluginResNet-18"), **one_stage)
    backbone.train(mode)
    twin = copy.deepcopy(backbone)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(compiled(x)[0], twin(x)[0])
    torch.testing.assert_close(statistics(backbone), statistics(twin))


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2])
def test_frozen_stages_freeze_their_attention(frozen_stages):
    backbone = build("PluginResNet-18", plugin("PluginResNet-18"), frozen_stages=frozen_stages)
    backbone.train()
    for stage in (1, 2, 3, 4):
        attention = getattr(backbone, f"layer{stage}")[0].triplet_attention
        trainable = {p.requires_grad for p in attention.parameters()}
        assert trainable == {stage > frozen_stages}


@PLUGIN_RESNETS
def test_no_plugins_is_mmdetections_resnet(depth):
    variant = f"PluginResNet-{depth}"
    backbone, plain = evaluating(build(variant)), evaluating(build(variant, type="ResNet"))
    backbone.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    for feature, expected in zip(backbone(x), plain(x), strict=True):
        assert torch.equal(feature, expected)


@pytest.mark.parametrize("position", ["after_conv1", "after_conv3"])
def test_wrong_position_is_named_with_the_right_one(position):
    entry = plugin("PluginResNet-18") | {"position": position}
    with pytest.raises(ValueError) as error:
        build("PluginResNet-18", entry)
    message = str(error.value)
    assert "position must be 'after_conv2'" in message
    assert message.endswith(f"got {position!r}")


@pytest.mark.parametrize("depth", [18, 34])
def test_mmdetections_own_small_resnets_still_refuse_plugins(depth):
    with pytest.raises(AssertionError, match="Not implemented yet"):
        ResNet(depth=depth, plugins=[plugin("PluginResNet-18")])


# ------------------------------------------------------------------------------ size, checkpoints


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ({"type": "ResNet", "depth": 50, "plugins": [plugin(kernel_size=7)]}, 25_561_832),
        (
            {
                "type": "PluginResNet",
                "depth": 18,
                "plugins": [plugin("PluginResNet-18", kernel_size=7)],
            },
            11_691_912,
        ),
        ({"type": "ResNet", "depth": 50}, 25_557_032),
    ],
    ids=["ResNet-50", "ResNet-18", "plain ResNet-50"],
)
def test_classifier_has_the_published_size(backbone, parameters):
    model = MODELS.build(copy.deepcopy(backbone))
    classifier = nn.Linear(model.feat_dim, 1000)
    assert sum(p.numel() for m in (model, classifier) for p in m.parameters()) == parameters


SECOND_SPELLING = {
    "cw.conv.": "ChannelGateH.spatial.",
    "hc.conv.": "ChannelGateW.spatial.",
    "hw.conv.": "SpatialGate.spatial.",
}


def in_second_spelling(name: str) -> str:
    for ours, published in SECOND_SPELLING.items():
        name = name.replace(f".triplet_attention.{ours}", f".triplet_attention.{published}")
    return name


class Detector(nn.Module):
    """The keys of a detection checkpoint: ``backbone.layer1.0.…``."""

    def __init__(self, variant: str, **layer: Any) -> None:
        super().__init__()
        self.backbone = evaluating(build(variant, plugin(variant, **layer)))


@pytest.mark.parametrize("variant", ["ResNet", "PluginResNet-18"])
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_published_detection_checkpoint_loads_whole(variant, warm_start, tmp_path):
    source = evaluating(Detector(variant).double())
    randomize(source)
    state = {in_second_spelling(k): v for k, v in source.state_dict().items()}
    assert "backbone.layer1.0.triplet_attention.ChannelGateH.spatial.conv.weight" in state
    path = str(tmp_path / "model.pth")
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, path)
    x = torch.randn(1, 3, 32, 32).double()
    expected = source.backbone(x)

    from_file, from_state = (Detector(variant, warm_start=warm_start).double() for _ in range(2))
    load_checkpoint(from_file, path, map_location="cpu", strict=True)
    load_state_dict(from_state, state, strict=True)
    for target in (from_file, from_state):
        target.eval()
        for feature, other in zip(target.backbone(x), expected, strict=True):
            torch.testing.assert_close(feature, other)


@pytest.mark.parametrize(
    "config", ["faster-rcnn_r50-triplet_fpn_1x_coco", "retinanet_r50-triplet_fpn_1x_coco"]
)
def test_checkpoint_that_mmdetection_2_saved_loads_whole(config, tmp_path):
    cfg = Config.fromfile(CONFIGS / f"{config}.py")
    cfg.merge_from_dict({"model.backbone": NARROW | {"init_cfg": None}})
    cfg.merge_from_dict({"model.neck.in_channels": [32, 64, 128, 256]})
    saved = {
        in_second_spelling(name): torch.rand(tensor.shape).to(tensor.dtype)
        for name, tensor in MODELS.build(cfg.model).state_dict().items()
        if not name.endswith("alpha")
    }
    assert "backbone.layer1.0.triplet_attention.ChannelGateH.spatial.conv.weight" in saved
    meta = {"mmdet_version": "2.10.0", "epoch": 12, "CLASSES": ("person", "bicycle"), "config": ""}
    path = str(tmp_path / "model.pth")
    torch.save({"meta": meta, "state_dict": saved, "optimizer": {"param_groups": []}}, path)

    model = MODELS.build(cfg.model)
    load_checkpoint(model, path, map_location="cpu", strict=True)
    for name, tensor in model.state_dict().items():
        expected = torch.ones(()) if name.endswith("alpha") else saved[in_second_spelling(name)]
        assert torch.equal(tensor, expected), name


def test_missing_attention_is_reported_by_its_name():
    state = Detector("ResNet").state_dict()
    del state["backbone.layer1.0.triplet_attention.cw.conv.conv.weight"]
    with pytest.raises(RuntimeError, match=r"layer1\.0\.triplet_attention\.cw\.conv\.conv\.weight"):
        load_state_dict(Detector("ResNet"), state, strict=True)
