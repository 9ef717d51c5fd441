"""What tools/train_mmdet.py and tools/test_mmdet.py find out before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config

from mm_plugins.preflight import check_config


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, Any]:
    """A dataset that is there: its annotations and its folder of images."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    content = {"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}]}
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    return {
        "type": "CocoDataset",
        "data_root": str(tmp_path),
        "ann_file": "annotations/train.json",
        "data_prefix": {"img": "images/"},
    }


def attention(**changed: Any) -> dict[str, Any]:
    return {"cfg": {"type": "TripletAttention"}, "position": "after_conv3"} | changed


def config(backbone: dict[str, Any] | None = None, **top: Any) -> Config:
    default = {"type": "ResNet", "depth": 50, "plugins": [attention()]}
    model = {"type": "FasterRCNN", "backbone": default if backbone is None else backbone}
    return Config({"model": model} | top)


def resnet(**changed: Any) -> dict[str, Any]:
    return {"type": "ResNet", "depth": 50} | changed


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


def test_good_config_passes_unchanged_and_nothing_is_written(dataset, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    cfg = config(train_dataloader={"dataset": dataset}, val_dataloader=None, work_dir="work_dirs/a")
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
        "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    ],
)
def test_models_of_mmdetections_own_configs_pass(name):
    import mmdet

    cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / name)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg.pop(loader)  # COCO is not here
    check(cfg)


# ----------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    ("train", "loaders"),
    [(True, ["train_dataloader", "val_dataloader"]), (False, ["test_dataloader"])],
)
def test_datasets_that_will_be_used_are_checked_and_no_others(dataset, tmp_path, train, loaders):
    wrong = dataset | {"ann_file": "none.json"}
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg = config(**{loader: {"dataset": wrong}})
        if loader in loaders:
            assert error_of(cfg, train=train) == (
                f"{loader}.dataset.ann_file: there is no annotation file "
                f"{str(tmp_path / 'none.json')!r}"
            )
        else:
            check(cfg, train=train)


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda d: {"type": "RepeatDataset", "times": 2, "dataset": d}, "dataset.dataset"),
        (lambda d: {"type": "ConcatDataset", "datasets": [d]}, "dataset.datasets[0]"),
        (
            lambda d: {"type": "MultiImageMixDataset", "dataset": {"datasets": [{}, d]}},
            "dataset.dataset.datasets[1]",
        ),
    ],
    ids=["repeated", "concatenated", "nested"],
)
def test_wrapped_datasets_are_checked(dataset, wrap, where):
    check(config(train_dataloader={"dataset": wrap(dataset)}))
    dataset["ann_file"] = "none.json"
    message = error_of(config(train_dataloader={"dataset": wrap(dataset)}))
    assert message.startswith(f"train_dataloader.{where}.ann_file: there is no annotation file")


def test_broken_annotations_are_found(dataset, tmp_path):
    (tmp_path / "annotations" / "train.json").write_text('{"images": [')
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.ann_file: ")
    assert "no whole COCO-format JSON" in message


def test_missing_image_folder_is_found(dataset, tmp_path):
    dataset["data_prefix"] = {"img": "none/"}
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.data_prefix.img: there is no image folder")
    assert str(tmp_path / "none") in message


def test_dataset_whose_files_have_whole_paths_needs_no_root(dataset, tmp_path):
    path = str(tmp_path / "annotations" / "train.json")
    for changed in ({"data_prefix": {"img": ""}}, {"data_root": "", "data_prefix": {"img": ""}}):
        own = {"type": "CocoDataset", "ann_file": path} | changed
        check(config(train_dataloader={"dataset": own}))


def test_whole_paths_are_not_looked_for_below_the_root(dataset, tmp_path):
    dataset["ann_file"] = str(tmp_path / "annotations" / "train.json")
    dataset["data_prefix"] = {"img": str(tmp_path / "images")}
    dataset["data_root"] = "none/"
    check(config(train_dataloader={"dataset": dataset}))


@pytest.mark.parametrize(
    "changed",
    [
        {"type": "VOCDataset"},
        {"type": "NoSuchDataset"},
        {"ann_file": ""},
        {"ann_file": ["none.json"]},
        {"data_root": "s3://bucket/coco"},
        {"ann_file": "https://example.com/none.json", "data_root": None},
        {"backend_args": {"backend": "petrel"}},
    ],
)
def test_annotations_of_another_kind_or_place_are_left_alone(dataset, changed):
    check(config(train_dataloader={"dataset": dataset | {"ann_file": "none.json"} | changed}))


@pytest.mark.parametrize(
    "changed",
    [{"data_prefix": {"img": "s3://bucket/"}}, {"data_prefix": {}}, {"data_prefix": None}],
)
def test_images_of_another_place_are_left_alone(dataset, changed):
    check(config(train_dataloader={"dataset": dataset | changed}))


def test_every_dataset_in_cocos_format_is_checked(dataset):
    for kind in ("CocoDataset", "mmdet.CocoDataset", "LVISDataset", "CocoPanopticDataset"):
        wrong = dataset | {"type": kind, "ann_file": "none.json"}
        assert "there is no annotation file" in error_of(
            config(train_dataloader={"dataset": wrong})
        )


def test_only_training_without_empty_images_needs_annotations(dataset, tmp_path):
    content = '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}'
    (tmp_path / "annotations" / "train.json").write_text(content)
    check(config(train_dataloader={"dataset": dataset}))
    dataset["filter_cfg"] = {"filter_empty_gt": True}
    check(config(val_dataloader={"dataset": dataset}))
    both = {"type": "ConcatDataset", "datasets": [dataset, dataset]}
    check(config(train_dataloader={"dataset": both}))
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.ann_file: ")
    assert "has an empty list of annotations" in message


# -------------------------------------------------------------------------------- backbone, plugins


@pytest.mark.parametrize(
    ("kind", "depth", "depths"),
    [
        ("ResNet", 42, "18, 34, 50, 101, 152"),
        ("ResNeXt", 18, "50, 101, 152"),
        ("PluginResNet", "50", "18, 34, 50, 101, 152"),
        ("mmdet.ResNet", 42, "18, 34, 50, 101, 152"),
    ],
)
def test_unknown_depth_is_named_with_those_that_exist(kind, depth, depths):
    message = error_of(config({"type": kind, "depth": depth}))
    assert message == f"model.backbone.depth: no {kind} of depth {depth!r}; there are {depths}"


def test_resnet_anywhere_in_the_model_is_found():
    inner = {"type": "FasterRCNN", "backbone": resnet(depth=42)}
    cfg = Config({"model": {"type": "SoftTeacher", "detector": inner}})
    assert error_of(cfg).startswith("model.detector.backbone.depth: ")


@pytest.mark.parametrize(
    "backbone",
    [
        {"type": "SwinTransformer", "depth": 42, "plugins": "any"},
        {"type": "NoSuchBackbone", "depth": 42},
        {"type": "RegNet", "arch": "regnetx_400mf", "plugins": [attention()]},
    ],
)
def test_other_backbones_are_left_alone(backbone):
    check(config(backbone))


def test_config_without_a_model_passes():
    check(Config({"train_dataloader": None}))


@pytest.mark.parametrize("entry", ["TripletAttention", {"type": "TripletAttention"}, {"cfg": "x"}])
def test_plugin_of_another_form_is_shown_with_the_right_one(entry):
    message = error_of(config(resnet(plugins=[attention(), entry])))
    assert message.startswith("model.backbone.plugins[1]: expected dict(cfg=dict(type=…)")
    assert message.endswith(f"got {entry!r}")


def test_unknown_layer_is_named_with_the_likely_one():
    message = error_of(config(resnet(plugins=[attention(cfg={"type": "TripletAtention"})])))
    assert message.startswith(
        "model.backbone.plugins[0].cfg.type: no module is registered as 'TripletAtention'; "
        "did you mean TripletAttention"
    )


def test_unknown_layer_that_resembles_none_is_named():
    message = error_of(config(resnet(plugins=[attention(cfg={"type": "zzzzzzzz"})])))
    assert message.endswith("no module is registered as 'zzzzzzzz'")


def test_layer_without_a_type_is_refused():
    message = error_of(config(resnet(plugins=[attention(cfg={"kernel_size": 3})])))
    assert message.startswith("model.backbone.plugins[0].cfg.type: ")


def test_unknown_argument_of_a_layer_is_named_with_the_likely_one():
    layer = {"type": "TripletAttention", "kernel": 3}
    assert error_of(config(resnet(plugins=[attention(cfg=layer)]))) == (
        "model.backbone.plugins[0].cfg: TripletAttention has no argument 'kernel'; "
        "did you mean kernel_size?"
    )


@pytest.mark.parametrize("kind", ["ResNet", "ResNeXt", "PluginResNet"])
def test_unknown_argument_of_the_backbone_is_named_with_the_likely_one(kind):
    message = error_of(config({"type": kind, "depth": 50, "plugin": [attention()]}))
    assert message == f"model.backbone: {kind} has no argument 'plugin'; did you mean plugins?"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be a positive odd"),
        ({"norm_cfg": {"type": "GN"}}, "norm_cfg: type must be 'BN' or 'SyncBN', got 'GN'"),
    ],
)
def test_wrong_value_of_a_layers_argument_is_named(argument, message):
    layer = {"type": "TripletAttention", **argument}
    for backbone in (resnet(plugins=[attention(cfg=layer)]), mobilenet(cfg=layer)):
        assert error_of(config(backbone)).startswith(f"model.backbone.plugins[0].cfg: {message}")


@pytest.mark.parametrize(
    "layer",
    [
        {"type": "TripletAttention", "postfix": "_2", "warm_start": True},
        {"type": "mmdet.TripletAttention"},
        {"type": "TripletAttention", "norm_cfg": {"type": "SyncBN"}, "norm_eval": True},
        {"type": "ContextBlock", "ratio": 1 / 16},
        {"type": "NonLocal2d", "reduction": 2},
        {"type": "ContextBlock", "no_such": 1},  # MMDetection's affair
    ],
)
def test_layers_of_ours_and_of_mmcv_pass(layer):
    check(config(resnet(plugins=[attention(cfg=layer)])))


# The channels that 7 heads cannot share, at each backbone's positions
@pytest.mark.parametrize(
    ("backbone", "entry", "channels"),
    [
        (resnet(), {"stages": (False, False, False, True)}, 2048),
        (resnet(), {"stages": (True, False, False, True)}, 256),  # the first that is wrong
        (resnet(), {"stages": (False, False, True, False), "position": "after_conv2"}, 256),
        (resnet(base_channels=16), {}, 64),
        ({"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4}, {}, 256),
        ({"type": "RegNet", "arch": "regnetx_400mf"}, {}, 32),
        ({"type": "PluginResNet", "depth": 18}, {"position": "after_conv2"}, 64),
        ({"type": "PluginMobileNetV2"}, {"position": "after_linear_conv"}, 16),
        ({"type": "PluginMobileNetV2", "widen_factor": 2.0}, {"position": "after_linear_conv"}, 32),
    ],
)
def test_heads_that_do_not_divide_the_channels_of_a_stage_are_named(backbone, entry, channels):
    layer = attention(cfg={"type": "IDABlock", "num_heads": 7}, **entry)
    assert error_of(config(backbone | {"plugins": [attention(**entry), layer]})) == (
        "model.backbone.plugins[1].cfg: num_heads must divide in_channels, got num_heads=7 and "
        f"in_channels={channels}"
    )
    layer["cfg"]["num_heads"] = 8
    check(config(backbone | {"plugins": [attention(**entry), layer]}))


def test_stage_without_the_layer_does_not_matter():
    layer = {"type": "IDABlock", "num_heads": 24}
    entry = attention(cfg=layer, position="after_linear_conv")
    mobilenet = {"type": "PluginMobileNetV2", "plugins": [entry]}
    assert "got num_heads=24 and in_channels=16" in error_of(config(mobilenet))
    entry["stages"] = tuple(stage == 5 for stage in range(1, 8))  # of 96 channels
    check(config(mobilenet))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_queries": 0}, "cfg: num_queries must be a positive integer, got 0"),
        ({"beta": 0.0}, "cfg: beta must be positive, got 0.0"),
        ({"queries": 8}, "cfg: IDABlock has no argument 'queries'; did you mean num_queries?"),
        ({"in_channels": 8}, "cfg.in_channels: leave it out; the backbone passes its own"),
    ],
)
def test_wrong_argument_of_ida_is_named(argument, message):
    layer = {"type": "IDABlock", **argument}
    assert error_of(config(resnet(plugins=[attention(cfg=layer)]))) == (
        f"model.backbone.plugins[0].{message}"
    )


def test_backbone_with_attention_stays_as_its_config_says():
    dcn = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": False}
    deformable = {"dcn": dcn, "stage_with_dcn": (False, True, True, True)}
    cfg = config(resnet(**deformable, plugins=[attention(cfg={"type": "IDABlock"})]))
    before = cfg.to_dict()
    check(cfg)
    assert cfg.to_dict() == before


def test_what_is_wrong_with_the_backbone_itself_is_left_to_mmdetection():
    layer = {"type": "IDABlock", "num_heads": 7}
    check(config(resnet(style="none", plugins=[attention(cfg=layer)])))


@pytest.mark.parametrize("position", ["after_conv4", "", None])
def test_unknown_position_is_named_with_those_that_exist(position):
    assert error_of(config(resnet(plugins=[attention(position=position)]))) == (
        f"model.backbone.plugins[0].position: {position!r} is none of after_conv1, after_conv2, "
        "after_conv3"
    )


def test_missing_position_is_named():
    entry = {"cfg": {"type": "TripletAttention"}}
    assert ".plugins[0].position: None is none of" in error_of(config(resnet(plugins=[entry])))


@pytest.mark.parametrize("stages", [(), (True,), (True,) * 5, ("res2", "res3"), True, 4])
def test_wrong_stages_are_named(stages):
    message = error_of(config(resnet(plugins=[attention(stages=stages)])))
    assert message == (
        "model.backbone.plugins[0].stages: expected 4 times True or False, one for each stage of "
        f"model.backbone, got {stages!r}"
    )


def test_stages_are_counted_as_the_backbone_has_them():
    stages = (True, False, True)
    check(config(resnet(num_stages=3, plugins=[attention(stages=stages)])))
    assert "expected 3 times" in error_of(
        config(resnet(num_stages=3, plugins=[attention(stages=(True,) * 4)]))
    )


def test_unknown_key_of_a_plugin_is_named():
    message = error_of(config(resnet(plugins=[attention(stage=(True,) * 4)])))
    assert message == "model.backbone.plugins[0]: unknown key stage"


@pytest.mark.parametrize("depth", [18, 34])
@pytest.mark.parametrize("kind", ["ResNet", "mmdet.ResNet"])
def test_small_resnet_that_takes_no_plugins_is_named_with_the_one_that_does(kind, depth):
    entry = attention(position="after_conv2")
    message = error_of(config({"type": kind, "depth": depth, "plugins": [entry]}))
    assert message == (
        f"model.backbone.type: MMDetection's ResNet-{depth} takes no plugins; "
        "use type='PluginResNet' and position='after_conv2'"
    )
    check(config({"type": "PluginResNet", "depth": depth, "plugins": [entry]}))
    check(config({"type": kind, "depth": depth}))


def test_position_that_a_small_plugin_resnet_lacks_is_named():
    entry = attention(position="after_conv3")
    message = error_of(config({"type": "PluginResNet", "depth": 18, "plugins": [entry]}))
    assert message.startswith("model.backbone.plugins[0].position: ")
    assert "'after_conv3'" in message and "after_conv2" in message


@pytest.mark.parametrize("kind", ["MobileNetV2", "mmdet.MobileNetV2"])
def test_mobilenet_that_takes_no_plugins_is_named_with_the_one_that_does(kind):
    assert error_of(config(mobilenet() | {"type": kind})) == (
        "model.backbone.type: MMDetection's MobileNetV2 takes no plugins; "
        "use type='PluginMobileNetV2' and position='after_linear_conv'"
    )
    check(config(mobilenet(stages=(True,) * 7)))
    check(config({"type": kind, "out_indices": (4, 7)}))


def test_position_that_a_mobilenet_lacks_is_named():
    assert error_of(config(mobilenet(position="after_conv3"))) == (
        "model.backbone.plugins[0].position: 'after_conv3' is none of after_linear_conv"
    )
    assert "'after_linear_conv' is none of after_conv1, after_conv2, after_conv3" in error_of(
        config(resnet(plugins=[attention(position="after_linear_conv")]))
    )


def test_stages_of_a_mobilenet_are_seven():
    message = error_of(config(mobilenet(stages=(True,) * 4)))
    assert message.startswith("model.backbone.plugins[0].stages: expected 7 times True or False")


def test_unknown_argument_of_a_mobilenet_is_named_with_the_likely_one():
    assert error_of(config(mobilenet() | {"out_indexes": (4, 7)})) == (
        "model.backbone: PluginMobileNetV2 has no argument 'out_indexes'; did you mean out_indices?"
    )


# ----------------------------------------------------------------------------------------- the head


def with_head(**arguments: Any) -> Config:
    return Config({"model": {"roi_head": {"bbox_head": {"type": "IDABBoxHead", **arguments}}}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_heads": 3},
            "num_heads must divide in_channels, got num_heads=3 and in_channels=256",
        ),
        (
            {"num_shared_convs": 1, "conv_out_channels": 18},
            "num_heads must divide in_channels, got num_heads=4 and in_channels=18",
        ),
        ({"num_head": 3}, "IDABBoxHead has no argument 'num_head'; did you mean num_heads"),
        ({"fc_out_channel": 3}, "IDABBoxHead has no argument 'fc_out_channel'; did you mean fc_"),
        ({"with_avg_pool": True}, "with_avg_pool must be False, as IDABBoxHead classifies"),
    ],
)
def test_wrong_argument_of_the_head_is_named(arguments, message):
    assert error_of(with_head(**arguments)).startswith(f"model.roi_head.bbox_head: {message}")


def test_head_of_a_cascades_stage_is_named():
    cfg = with_head()
    good = cfg.model.roi_head.bbox_head
    cfg.model.roi_head.bbox_head = [good, {**good, "num_heads": 3}]
    assert error_of(cfg).startswith("model.roi_head.bbox_head[1]: num_heads must divide")


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 8, "heavy": True, "init_cfg": None},
        {"loss_cls": {"type": "SeesawLoss", "num_classes": 80}, "reg_class_agnostic": True},
        {"loss_cls": {"type": "NoSuchLoss"}},  # MMDetection's affair
    ],
)
def test_head_that_can_be_built_passes_unchanged(arguments):
    cfg = with_head(**arguments)
    before = cfg.to_dict()
    check(cfg)
    assert cfg.to_dict() == before


# ------------------------------------------------------------------------------------------ weights


def test_weights_of_another_depth_are_refused(tmp_path):
    path = resnet_checkpoint(tmp_path / "r101.pth", (3, 4, 23, 3))
    message = error_of(config(load_from=path))
    assert message.startswith(f"load_from: {path!r} holds a ResNet-101, but model.backbone.depth")
    check(config(resnet(depth=101), load_from=path))


def test_missing_weights_are_refused_but_where_a_training_is_resumed():
    assert error_of(config(load_from="none.pth")) == "load_from: there is no checkpoint 'none.pth'"
    check(config(load_from="none.pth"), resumes=True)


@pytest.mark.parametrize("weights", ["torchvision://resnet50", "https://example.com/r.pth"])
def test_weights_to_download_are_left_to_mmdetection(weights):
    pretrained = {"type": "Pretrained", "checkpoint": weights}
    check(config(resnet(init_cfg=pretrained)))
    check(config(load_from=weights))


def test_pretrained_backbone_of_another_depth_is_refused(tmp_path):
    path = resnet_checkpoint(tmp_path / "r101.pth", (3, 4, 23, 3))
    cfg = config(resnet(init_cfg={"type": "Pretrained", "checkpoint": path}))
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
    check(config(resnet(init_cfg={"type": "Kaiming", "layer": "Conv2d"})))
    check(config(resnet(init_cfg=None)))


def test_names_that_mmdetection_does_not_load_are_refused_with_the_remedy(tmp_path):
    names = [f"backbone.bottom_up.res2.{b}.conv{i}.weight" for b in range(3) for i in (1, 2, 3)]
    path = str(tmp_path / "detectron2.pth")
    torch.save({"model": dict.fromkeys(names, torch.zeros(1))}, path)
    message = error_of(config(load_from=path))
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
        return config(load_from=path) if whole else config(resnet(init_cfg=pretrained))

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
    message = error_of(config(load_from=path))
    assert message.startswith("load_from: ") and "model.backbone.init_cfg=dict(" in message
    check(config(resnet(init_cfg={"type": "Pretrained", "checkpoint": path})))
