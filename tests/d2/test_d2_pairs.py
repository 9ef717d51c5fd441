"""Every two methods that can meet in a detector of Detectron2's train a step together."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from small_rcnn import example, shrink

from d2_plugins.preflight import check_config
from plugin_core import BatchFormer, BlockPlugin, IDAClassifier

STAGE_PLUGINS: dict[str, list[dict[str, Any]]] = {
    "no plugin": [],
    "triplet attention": [{"NAME": "triplet_attention", "WARM_START": True}],
    "IDA": [{"NAME": "ida", "NUM_QUERIES": 5}],
    "SE": [{"NAME": "timm:se", "WARM_START": True}],
    "triplet attention and IDA": [
        {"NAME": "triplet_attention", "WARM_START": True},
        {"NAME": "ida", "NUM_QUERIES": 5, "WARM_START": True},
    ],
}
BOX_HEADS = {
    "plain": {},
    "IDA": {"NAME": "IDABoxHead"},
    "BatchFormer": {"BATCHFORMER.ENABLED": True},
}
DETECTORS = {
    "Faster R-CNN": "Standard",
    "Mask R-CNN": "Standard",
    "Cascade R-CNN": "Cascade",
    "RetinaNet": "",
}


def detector(
    cfg: CfgNode, kind: str, plugin: str, box_head: str = "plain", amc: bool = False
) -> CfgNode:
    """Make ``cfg`` that of a small detector with methods; the stages' one is in res5."""
    shrink(cfg, DETECTORS[kind] or "Standard")
    cfg.MODEL.MASK_ON = kind == "Mask R-CNN"
    architecture = "GeneralizedRCNN"
    if kind == "RetinaNet":
        architecture = "RetinaNet"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
        cfg.MODEL.RETINANET.IN_FEATURES = ["p4", "p5", "p6", "p7"]
        cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 3, 1
    retina = "retinanet_" if kind == "RetinaNet" else ""
    cfg.MODEL.BACKBONE.NAME = f"build_{retina}resnet_plugin_fpn_backbone"
    cfg.MODEL.META_ARCHITECTURE = f"AMC{architecture}" if amc else architecture
    if amc:
        cfg.MODEL.AMC.ACTIVATION = "backbone.bottom_up.res4"
        cfg.MODEL.AMC.MEAN_MARGIN = cfg.MODEL.AMC.MAX_MARGIN = 1.0
    cfg.MODEL.RESNETS.PLUGINS = [
        {**one, "STAGES": ["res5"], "BLOCKS": "all"} for one in STAGE_PLUGINS[plugin]
    ]
    for key, value in BOX_HEADS[box_head].items():
        cfg.merge_from_list([f"MODEL.ROI_BOX_HEAD.{key}", value])
    return cfg


PAIRS = [
    pytest.param(kind, plugin, box_head, amc, id=f"{kind}-{plugin}-{box_head} head-{with_amc}")
    for kind, plugin, box_head, (amc, with_amc) in product(
        DETECTORS, STAGE_PLUGINS, BOX_HEADS, ((False, "no AMC"), (True, "AMC"))
    )
    if (kind != "RetinaNet" or box_head == "plain")
    # Of each detector those that add a pair; a mask head has no part in any
    and (kind == "Faster R-CNN" or kind == "RetinaNet" or plugin in ("IDA", "triplet attention"))
    and (plugin != "no plugin") + (box_head != "plain") + amc >= 2
]


@pytest.mark.parametrize(("kind", "plugin", "box_head", "amc"), PAIRS)
def test_methods_train_a_step_together(cfg, kind, plugin, box_head, amc):
    if plugin == "SE":
        pytest.importorskip("timm", reason="timm is not installed")
    model: Any = build_model(detector(cfg, kind, plugin, box_head, amc)).train()
    plugins = [module for module in model.modules() if isinstance(module, BlockPlugin)]
    for one in plugins:
        if one.alpha is not None:
            nn.init.constant_(one.alpha, 0.5)  # of a warm start that has begun to learn
    heads = [m for m in model.modules() if isinstance(m, (IDAClassifier, BatchFormer))]
    with EventStorage():
        losses = model([example(), example()])
    assert {name for name in losses if "amc" in name} == (
        {"loss_amc_mean", "loss_amc_max"} if amc else set()
    )
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert len(plugins) == 3 * len(STAGE_PLUGINS[plugin])
    assert len(heads) == (0 if box_head == "plain" else 3 if kind == "Cascade R-CNN" else 1)
    for module in (*plugins, *heads):
        for name, parameter in module.named_parameters():
            where = f"{type(module).__name__}.{name}"
            assert parameter.grad is not None and parameter.grad.isfinite().all(), where
            # A bias of all keys alike moves no softmax, and of a fresh projection nothing
            assert parameter.grad.any() or name.endswith(("k_proj.bias", "in_proj_bias")), where
    if amc:
        taught = model.backbone.bottom_up.res4[0].conv1.weight
        amc_alone = [p.grad for p in model.backbone.parameters() if p.grad is not None]
        assert taught.grad.any() and all(gradient.isfinite().all() for gradient in amc_alone)


APART = {
    "IDA's box head with BatchFormer": (
        {"MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead", "MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED": True},
        "MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED: True, but 'IDABoxHead' classifies a map",
    ),
    "IDA's box head in a RetinaNet": (
        {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead"},
        "MODEL.ROI_BOX_HEAD.NAME 'IDABoxHead': a RetinaNet has no RoI heads, which read it",
    ),
    "BatchFormer in a RetinaNet with AMC": (
        {
            "MODEL.META_ARCHITECTURE": "AMCRetinaNet",
            "MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED": True,
        },
        "MODEL.ROI_BOX_HEAD.BATCHFORMER: an AMCRetinaNet has no RoI heads, which read it",
    ),
    "IDA's box head in a C4 detector": (
        {
            "MODEL.ROI_HEADS.NAME": "Res5PluginROIHeads",
            "MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead",
        },
        "MODEL.ROI_HEADS.NAME: 'Res5PluginROIHeads' takes no MODEL.ROI_BOX_HEAD.NAME 'IDABoxHead'",
    ),
    "AMC with RoIPool": (
        {
            "MODEL.META_ARCHITECTURE": "AMCGeneralizedRCNN",
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool",
        },
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE: AMC differentiates twice through RoIAlign",
    ),
    "AMC in a plain R-CNN": (
        {"MODEL.AMC.EVERY": 2},
        "MODEL.AMC is set, but MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'",
    ),
    "a block plugin in a detector of MMDetection": (
        {"MODEL.META_ARCHITECTURE": "MMDetDetector"},
        "MODEL.RESNETS.PLUGINS is set, but MODEL.META_ARCHITECTURE is 'MMDetDetector'",
    ),
}


@pytest.mark.parametrize(("settings", "said"), APART.values(), ids=APART)
def test_methods_that_cannot_meet_say_so_in_one_line(cfg, settings, said):
    detector(cfg, "Faster R-CNN", "triplet attention")
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        check_config(cfg, eval_only=True, resume=False)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
