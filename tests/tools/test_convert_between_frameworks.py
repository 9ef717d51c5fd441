"""tools/convert_checkpoint.py on the frameworks' own checkpoints and their configs."""

from __future__ import annotations

import pickle

import pytest
import torch
from convert_checkpoint_cases import (
    assert_same,
    authors_resnet,
    caffe2_weights,
    detectron2_config,
    detectron2_features,
    mmdetection_backbone,
    mmdetection_features,
    needs,
    run,
)
from torch import nn

from plugin_core import IDABlock
from plugin_core.checkpoints.report import Target, report_pixels


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built without values, as every tensor that counts is loaded or drawn here."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


# ------------------------------------------------------------------------------ the frameworks' own


@needs("detectron2")
@needs("mmdet")
def test_caffe2_weights_compute_what_detectron2_computes_with_them(tmp_path, capsys):
    x = torch.randn(1, 3, 64, 64)
    weights = caffe2_weights(authors_resnet(50, attention=False))
    source = tmp_path / "R-50.pkl"
    with open(source, "wb") as file:
        pickle.dump(weights, file, protocol=2)
    config = detectron2_config(tmp_path, 50, attention=False)
    expected = detectron2_features(config, str(source), x)

    assert run(source, tmp_path / "d2.pkl", "d2", "--config", config) == 0
    printed = capsys.readouterr()
    assert "Caffe2's names" in printed.out
    assert "unused of SOURCE: conv1_b, fc1000_w" in printed.out
    assert "MODEL.RESNETS.STRIDE_IN_1X1 = True" in printed.out
    assert f"{config}: INPUT.FORMAT is 'RGB', but the weights " in printed.err
    # Not to the bit: of norms without statistics Detectron2 takes a variance of 1, and adds 1e-5.
    assert_same(detectron2_features(config, str(tmp_path / "d2.pkl"), x), expected)

    assert run(source, tmp_path / "mm.pth", "mm") == 0
    assert "model.backbone.style = 'caffe'" in capsys.readouterr().out
    backbone = mmdetection_backbone(50, attention=False)
    assert_same(mmdetection_features(backbone, str(tmp_path / "mm.pth"), x), expected)


@needs("detectron2")
@needs("mmdet")
def test_backbone_is_taken_out_of_a_c4_detector(tmp_path, capsys):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()  # Faster R-CNN R50-C4, whose last stage is in its RoI head
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    model = build_model(cfg).state_dict()
    torch.save({"model": model, "iteration": 7}, tmp_path / "detector.pth")
    assert run(tmp_path / "detector.pth", tmp_path / "out.pth", "mm") == 0
    said = capsys.readouterr().out
    assert "ResNet-50, Detectron2's names below 'backbone.'" in said
    assert "proposal_generator.rpn_head" in said and "roi_heads.box_predictor" in said
    state_dict = torch.load(tmp_path / "out.pth")["state_dict"]
    assert torch.equal(state_dict["layer4.2.conv3.weight"], model["roi_heads.res5.2.conv3.weight"])
    assert torch.equal(state_dict["bn1.running_var"], model["backbone.stem.conv1.norm.running_var"])


@needs("detectron2")
def test_c4_config_gets_its_last_stage_too(tmp_path, capsys):
    net = authors_resnet(50)
    torch.save(net.state_dict(), tmp_path / "source.pth")
    config = tmp_path / "c4.yaml"
    config.write_text(
        "VERSION: 2\n"
        "MODEL:\n"
        "  BACKBONE: {NAME: build_resnet_plugin_backbone}\n"
        "  ROI_HEADS: {NAME: Res5PluginROIHeads}\n"
        "  RESNETS: {PLUGINS: [{NAME: triplet_attention, STAGES: [res2, res3, res4, res5]}]}\n"
    )
    out = tmp_path / "out.pth"
    assert run(tmp_path / "source.pth", out, "d2", "--config", str(config)) == 0
    assert "fresh, as SOURCE has none: none" in capsys.readouterr().out

    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from d2_plugins import add_plugin_config, merge_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, str(config), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(out))
    block, expected = model.roi_heads.res5[2], net.layer4[2]
    assert torch.equal(block.conv3.norm.running_var, expected.bn3.running_var)
    assert torch.equal(
        block.triplet_attention.state_dict()["hw.conv.conv.weight"],
        expected.triplet_attention.hw.conv.conv.weight,
    )
    assert torch.equal(model.backbone.stem.conv1.weight, net.conv1.weight)


@needs("mmdet")
def test_backbone_is_taken_out_of_mmengines_checkpoint(tmp_path, capsys):
    from mmengine.logging.history_buffer import HistoryBuffer

    history = HistoryBuffer()
    history.update(1.5)
    names = {f"backbone.{n}": t for n, t in authors_resnet(18).state_dict().items()}
    content = {
        "meta": {"epoch": 1},
        "state_dict": names | {"rpn_head.rpn_conv.weight": torch.zeros(1)},
        "message_hub": {"log_scalars": {"train/loss": history}},
    }
    torch.save(content, tmp_path / "epoch_1.pth")
    assert run(tmp_path / "epoch_1.pth", tmp_path / "out.pth", "mm") == 0
    said = capsys.readouterr().out
    assert "torchvision's names below 'backbone.'" in said
    assert "rpn_head.rpn_conv.weight" in said


# -------------------------------------------------------------------------------- config and pixels


@needs("detectron2")
def test_config_that_agrees_gets_no_warning_and_one_that_does_not_gets_one_a_setting(
    tmp_path, capsys
):
    torch.save(authors_resnet(50).state_dict(), tmp_path / "source.pth")
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    config = detectron2_config(tmp_path, 50)
    assert run(source, out, "d2", "--config", config) == 0
    assert "warning" not in capsys.readouterr().err
    swapped = "[103.53, 116.28, 123.675]"
    config = detectron2_config(tmp_path, 50, mean=swapped, stride_in_1x1=True)
    assert run(source, out, "d2", "--config", config) == 0
    mean, stride = capsys.readouterr().err.splitlines()
    assert f"{config}: MODEL.PIXEL_MEAN is [103.53, 116.28, 123.675], but the weights" in mean
    assert "that want [123.675, 116.28, 103.53]" in mean
    assert "MODEL.RESNETS.STRIDE_IN_1X1 is True" in stride and "want False" in stride


MM_CONFIG = """
custom_imports = dict(imports=["mm_plugins"])
plugin = dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_conv2")
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        type="PluginResNet",
        depth=18,
        plugins=[plugin],
        style="caffe",
        init_cfg=dict(type="Pretrained", checkpoint="nowhere.pth"),
    ),
)
"""


@needs("mmdet")
def test_mmdetections_config_is_the_target(tmp_path, capsys):
    torch.save(authors_resnet(18).state_dict(), tmp_path / "source.pth")
    (tmp_path / "r18.py").write_text(MM_CONFIG)
    options = ("--config", str(tmp_path / "r18.py"))
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", "mm", *options) == 0
    printed = capsys.readouterr()
    # The published function, in a config that starts as the identity
    assert "layer*.*.triplet_attention.alpha (8)" in printed.out
    settings = [line.split()[2] for line in printed.err.splitlines()]
    assert settings == [
        "model.data_preprocessor.bgr_to_rgb",
        "model.data_preprocessor.mean",
        "model.data_preprocessor.std",
    ]  # and no style: the stride is at the same place in a ResNet-18 of either
    tensors = torch.load(tmp_path / "out.pth")["state_dict"]
    assert tensors["layer3.1.triplet_attention.alpha"] == 1


IDA_CONFIGS = {
    "d2": """
VERSION: 2
INPUT: {FORMAT: RGB}
MODEL:
  META_ARCHITECTURE: ProposalNetwork
  BACKBONE: {NAME: build_resnet_plugin_backbone}
  RPN: {IN_FEATURES: [res4]}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: [res2, res3, res4, res5]
    PLUGINS: [{NAME: ida, STAGES: [res5], NUM_QUERIES: 6, WARM_START: True}]
""",
    "mm": """
custom_imports = dict(imports=["mm_plugins"])
layer = dict(type="IDABlock", num_queries=6, warm_start=True)
stages = (False, False, False, True)
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(type="DetDataPreprocessor"),
    backbone=dict(
        type="PluginResNet",
        depth=18,
        plugins=[dict(cfg=layer, stages=stages, position="after_conv2")],
    ),
)
""",
}


@needs("detectron2")
@needs("mmdet")
def test_ida_goes_from_framework_to_framework_with_a_config_that_has_it(tmp_path, capsys):
    from mmengine.config import Config

    configs = {to: tmp_path / f"ida.{'yaml' if to == 'd2' else 'py'}" for to in IDA_CONFIGS}
    for to, path in configs.items():
        path.write_text(IDA_CONFIGS[to])
    backbone = Config.fromfile(configs["mm"]).model.backbone
    torch.save(authors_resnet(18, attention=False).state_dict(), tmp_path / "plain.pth")
    assert (
        run(tmp_path / "plain.pth", tmp_path / "0.pth", "mm", "--config", str(configs["mm"])) == 0
    )
    trained = torch.load(tmp_path / "0.pth")
    trained["state_dict"]["layer4.1.ida.alpha"] = torch.tensor(0.5)
    for name, tensor in IDABlock(512, 6).state_dict().items():
        trained["state_dict"][f"layer4.1.ida.{name}"] = torch.randn_like(tensor) / 20
    torch.save(trained, tmp_path / "1.pth")
    x = torch.randn(1, 3, 64, 64)
    expected = mmdetection_features(backbone, str(tmp_path / "1.pth"), x)
    for to, source, out in (("d2", "1.pth", "2.pth"), ("mm", "2.pth", "3.pth")):
        assert run(tmp_path / source, tmp_path / out, to, "--config", str(configs[to])) == 0
        said = capsys.readouterr().out
        assert "ResNet-18 with ida in 1 block," in said and "SOURCE has none: none" in said
    assert_same(detectron2_features(str(configs["d2"]), str(tmp_path / "2.pth"), x), expected)
    assert_same(mmdetection_features(backbone, str(tmp_path / "3.pth"), x), expected)
    assert run(tmp_path / "1.pth", tmp_path / "4.pth", "d2") == 0  # with the source's own plugins
    own, by_config = (torch.load(tmp_path / f"{n}.pth")["model"] for n in (4, 2))
    assert own.keys() == by_config.keys() and all(torch.equal(own[n], by_config[n]) for n in own)


def test_pixels_that_are_unknown_are_said_to_be():
    assert report_pixels(None, Target({}, dict)).startswith("pixels: unknown; ")
