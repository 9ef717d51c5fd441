"""tools/train_net.py on real photographs: trains, resumes exactly, evaluates, refuses bad input.

The detector has triplet attention and IDA in its stages, and IDA as its classifier.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_sample import (
    CONFIG,
    IDA_HEAD,
    SMALL,
    arguments,
    losses,
    metrics,
    results,
    weights,
)


@pytest.fixture(scope="module")
def trained(photographs, run_tool, tmp_path_factory):
    """Folder of a training that was not interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("detectron2") / "whole"
    line = arguments(photographs, output, **IDA_HEAD)
    return output, run_tool("train_net.py", *line).stdout


def test_training_lowers_the_loss(trained):
    output, _ = trained
    assert losses(output) != [] and all(map(math.isfinite, losses(output)))
    assert loss_of_fixed_batch(weights(output)) < loss_of_fixed_batch(None)


def loss_of_fixed_batch(state: dict[str, torch.Tensor] | None) -> float:
    from detectron2.structures import Boxes, Instances

    from d2_plugins import add_plugin_config, merge_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    pairs = [part for pair in {**SMALL, **IDA_HEAD}.items() for part in pair]
    merge_config(cfg, CONFIG, [*pairs, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(7)
    model = build_model(cfg).train()
    if state is not None:
        model.load_state_dict(state)
    target = Instances((128, 128))
    target.gt_boxes = Boxes(torch.tensor([[20.0, 20.0, 100.0, 110.0]]))
    target.gt_classes = torch.tensor([0])
    image = torch.randint(0, 256, (3, 128, 128), generator=torch.Generator().manual_seed(0))
    with EventStorage(), torch.no_grad():
        return float(sum(model([{"image": image, "instances": target}] * 2).values()))


def test_training_moves_every_part_of_the_plugins(trained):
    output, _ = trained
    first, last = weights(output, "model_0000004.pth"), weights(output)
    alphas = [name for name in last if name.endswith(".alpha")]
    assert sum(name.endswith(".triplet_attention.alpha") for name in alphas) == 16
    assert sum(name.endswith(".ida.alpha") for name in alphas) == 2
    assert all(first[name] != 0 for name in alphas)
    # Not IDA's queries: their gradient has alpha as a factor, which is near 0 yet.
    moved = [name for name in last if name.endswith(".ida.proj.weight")]
    moved += [name for name in last if name.endswith("cls_score.head.0.weight")]
    assert len(moved) == 2 + 1
    assert all(not torch.equal(first[name], last[name]) for name in moved)


def test_evaluation_writes_results_for_every_image(trained, photographs):
    output, _ = trained
    annotations = json.loads((photographs / "annotations/instances_val2017.json").read_text())
    assert {r["image_id"] for r in results(output)} == {i["id"] for i in annotations["images"]}
    assert {r["category_id"] for r in results(output)} <= {
        c["id"] for c in annotations["categories"]
    }


def test_evaluating_the_checkpoint_gives_the_same_numbers(trained, photographs, run_tool, tmp_path):
    output, printed = trained
    options = {**IDA_HEAD, "MODEL.WEIGHTS": str(output / "model_final.pth")}
    line = arguments(photographs, tmp_path, "--eval-only", **options)
    again = run_tool("train_net.py", *line).stdout
    assert metrics(printed)[-2:] == metrics(again)[-2:]
    assert metrics(again)[-2] == "AP,AP50,AP75,APs,APm,APl"
    assert results(tmp_path) == results(output)


def test_contextual_bias_is_measured_from_the_results(trained, coco_sample, run_tool, tmp_path):
    annotations = coco_sample / "annotations"
    result = run_tool(
        "evaluate_context_bias.py",
        *("--annotations", annotations / "instances_val2017.json"),
        *("--train-annotations", annotations / "instances_train2017.json"),
        *("--results", trained[0] / "inference" / "coco_instances_results.json"),
        *("--out", tmp_path / "bias"),
    )
    assert "| person " in result.stdout
    assert {f.name for f in (tmp_path / "bias").iterdir()} == {
        f"context_bias.{kind}" for kind in ("json", "md", "png")
    }


PLUGINS = "MODEL.RESNETS.PLUGINS"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {PLUGINS: "[{'NAME': 'triplet_attention', 'STAGES': ['res6']}]"},
            [f"{PLUGINS}[0].STAGES", "'res6'", "res2, res3, res4, res5"],
        ),
        (
            {PLUGINS: "[{'NAME': 'ida', 'STAGES': ['res5'], 'NUM_HEADS': 5}]"},
            [f"{PLUGINS}[0].NUM_HEADS", "5", "256"],
        ),
        ({"MODEL.RESNETS.DEPTH": "42"}, ["MODEL.RESNETS.DEPTH", "42", "50"]),
        ({PLUGINS[:-1]: "[]"}, [PLUGINS[:-1], f"did you mean {PLUGINS}"]),
        ({"DATASETS.TRAIN": "('sample_trian',)"}, ["'sample_trian'", "sample_train"]),
        ({"MODEL.WEIGHTS": "resnet101.pth"}, ["MODEL.WEIGHTS", "resnet101.pth", "no checkpoint"]),
    ],
    ids=["stage", "heads", "depth", "key", "dataset", "weights"],
)
def test_a_wrong_setting_is_one_clear_line(
    options, expected, photographs, run_tool, earlier_run, assert_refused
):
    line = arguments(photographs, earlier_run, **options)
    assert_refused(run_tool("train_net.py", *line, check=False), expected)


@pytest.mark.parametrize("content", [None, "", '{"images": [], "annotations": []}', '{"images": ['])
def test_missing_and_empty_annotations_are_one_clear_line(
    content, run_tool, earlier_run, assert_refused, tmp_path
):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    if content is not None:
        file.write_text(content)
    result = run_tool("train_net.py", *arguments(tmp_path, earlier_run), check=False)
    assert_refused(result, [str(file), "sample_train"])


def test_a_checkpoint_of_another_depth_is_refused(
    trained, photographs, run_tool, earlier_run, assert_refused
):
    path = str(trained[0] / "model_final.pth")
    options = {"MODEL.RESNETS.DEPTH": "101", "MODEL.WEIGHTS": path}
    line = arguments(photographs, earlier_run, **options)
    result = run_tool("train_net.py", *line, check=False)
    assert_refused(result, [path, "ResNet-50", "MODEL.RESNETS.DEPTH", "101"])


def test_an_image_that_does_not_decode_is_named(broken_photographs, run_tool, tmp_path):
    line = arguments(broken_photographs, tmp_path / "out")
    result = run_tool("train_net.py", *line, check=False)
    assert result.returncode != 0
    error = result.stderr[result.stderr.index("error: DATASETS.TRAIN ") :]
    assert "images that cannot be read: image " in " ".join(error.split())
    assert not (tmp_path / "out").exists()
