"""tools/train_net.py on real photographs: trains, resumes exactly, evaluates, refuses bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2_sample import CONFIG, SMALL, arguments, metrics, results


@pytest.fixture(scope="module")
def trained(coco_sample, run_tool, tmp_path_factory):
    """Folder of a training that was not interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("detectron2") / "whole"
    return output, run_tool("train_net.py", *arguments(coco_sample, output)).stdout


def test_training_lowers_the_loss(trained):
    output, _ = trained
    final = torch.load(output / "model_final.pth")["model"]
    logged = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [record["total_loss"] for record in logged if "total_loss" in record]
    assert losses != [] and all(math.isfinite(loss) for loss in losses)
    assert loss_of_fixed_batch(final) < loss_of_fixed_batch(None)


def loss_of_fixed_batch(weights: dict[str, torch.Tensor] | None) -> float:
    from detectron2.structures import Boxes, Instances

    from d2_plugins import add_plugin_config, merge_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    pairs = [part for pair in SMALL.items() for part in pair]
    merge_config(cfg, CONFIG, [*pairs, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(7)
    model = build_model(cfg).train()
    if weights is not None:
        model.load_state_dict(weights)
    target = Instances((160, 160))
    target.gt_boxes = Boxes(torch.tensor([[20.0, 20.0, 120.0, 140.0]]))
    target.gt_classes = torch.tensor([0])
    image = torch.randint(0, 256, (3, 160, 160), generator=torch.Generator().manual_seed(0))
    with EventStorage(), torch.no_grad():
        return float(sum(model([{"image": image, "instances": target}] * 2).values()))


def test_evaluation_writes_results_for_every_image(trained, coco_sample):
    output, _ = trained
    annotations = json.loads((coco_sample / "annotations/instances_val2017.json").read_text())
    assert {r["image_id"] for r in results(output)} == {i["id"] for i in annotations["images"]}
    assert {r["category_id"] for r in results(output)} <= {
        c["id"] for c in annotations["categories"]
    }


def test_a_killed_and_resumed_training_ends_with_the_same_weights(
    trained, coco_sample, run_tool, kill_tool_when, assert_same_weights, tmp_path
):
    output = tmp_path / "killed"
    kill_tool_when(output / "last_checkpoint", "train_net.py", *arguments(coco_sample, output))
    assert (output / "last_checkpoint").read_text() == "model_0000009.pth"
    resumed = run_tool("train_net.py", *arguments(coco_sample, output, "--resume"))
    assert "Starting training from iteration 10" in resumed.stdout
    whole = torch.load(trained[0] / "model_final.pth")
    assert_same_weights(torch.load(output / "model_final.pth")["model"], whole["model"])


def test_evaluating_the_checkpoint_gives_the_same_numbers(trained, coco_sample, run_tool, tmp_path):
    output, printed = trained
    options = {"MODEL.WEIGHTS": str(output / "model_final.pth")}
    again = run_tool(
        "train_net.py", *arguments(coco_sample, tmp_path, "--eval-only", **options)
    ).stdout
    assert metrics(printed)[-2:] == metrics(again)[-2:]
    assert metrics(again)[-2] == "AP,AP50,AP75,APs,APm,APl"
    assert results(tmp_path) == results(output)


@pytest.fixture
def earlier_run(tmp_path):
    """An output folder with something in it that must stay as it is."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "config.yaml").write_text("kept")
    return folder


STAGES = "MODEL.RESNETS.TRIPLET_ATTENTION.STAGES"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({STAGES: "('res6',)"}, [STAGES, "'res6'", "res2, res3, res4, res5"]),
        ({"MODEL.RESNETS.DEPTH": "42"}, ["MODEL.RESNETS.DEPTH", "42", "50"]),
        ({STAGES[:-1]: "('res5',)"}, [STAGES[:-1], f"did you mean {STAGES}"]),
        ({"DATASETS.TRAIN": "('sample_trian',)"}, ["'sample_trian'", "sample_train"]),
        ({"MODEL.WEIGHTS": "resnet101.pth"}, ["MODEL.WEIGHTS", "resnet101.pth", "no checkpoint"]),
    ],
    ids=["stage", "depth", "key", "dataset", "weights"],
)
def test_a_wrong_setting_is_one_clear_line(options, expected, coco_sample, run_tool, earlier_run):
    result = run_tool("train_net.py", *arguments(coco_sample, earlier_run, **options), check=False)
    assert_refused(result, expected, earlier_run)


def assert_refused(result, expected: list[str], folder: Path) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert [text for text in expected if text not in line] == []
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == "kept"


@pytest.mark.parametrize("content", [None, "", '{"images": [], "annotations": []}', '{"images": ['])
def test_missing_and_empty_annotations_are_one_clear_line(content, run_tool, earlier_run, tmp_path):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    if content is not None:
        file.write_text(content)
    result = run_tool("train_net.py", *arguments(tmp_path, earlier_run), check=False)
    assert_refused(result, [str(file), "sample_train"], earlier_run)


def test_a_checkpoint_of_another_depth_is_refused(trained, coco_sample, run_tool, earlier_run):
    weights = str(trained[0] / "model_final.pth")
    options = {"MODEL.WEIGHTS": weights, "MODEL.RESNETS.DEPTH": "101"}
    result = run_tool("train_net.py", *arguments(coco_sample, earlier_run, **options), check=False)
    assert_refused(result, [weights, "ResNet-50", "MODEL.RESNETS.DEPTH", "101"], earlier_run)


def test_an_image_that_does_not_decode_is_named(broken_sample, run_tool, tmp_path):
    result = run_tool("train_net.py", *arguments(broken_sample, tmp_path / "out"), check=False)
    assert result.returncode != 0
    line = next(line for line in result.stderr.splitlines()[::-1] if "ValueError" in line)
    assert str(broken_sample / "train2017") in line
    assert "cannot be read" in line
