"""The VQA classifier with functional entropy and Learned-Mixin, and VQA-CP's files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from make_tiny_text_model import make_text_model
from tiny_vqa import settings, write_vqa_cp

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, MODELS
from mmpretrain.structures import DataSample

import mm_plugins  # noqa: F401
from mm_plugins.mmpretrain.datasets import prepare
from mm_plugins.mmpretrain.learned_mixin import LearnedMixin
from mm_plugins.mmpretrain.updn_vqa import RegionAttention
from mm_plugins.mmpretrain.vqa_cp import frequent_answers
from plugin_core import FunctionalEntropyRegularizer
from plugin_core.errors import ArgumentError


@pytest.fixture(scope="module")
def data(drawn_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    (folder / "words.txt").write_text(write_vqa_cp(drawn_coco, folder / "data"))
    make_text_model(folder / "bert", [folder / "words.txt"], hidden_size=16)
    return folder


def build(data: Path, **changes: Any) -> Any:
    answers = data / "data/vqa-cp/vqacp_v2_train_annotations.json"
    small = settings(data / "bert", answers)
    small["vision_backbone"] = {"type": "ResNet", "depth": 18, "frozen_stages": 4}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build({"type": "UpDnVQA", **small, **changes})


def batch(model: Any) -> tuple[torch.Tensor, list[DataSample]]:
    first = model.answers[0]
    samples = [
        DataSample(
            question="what is on the left?",
            question_type="what is on",
            gt_answer=[first, "unknown"],
            gt_answer_weight=[0.2, 0.8],
        ),
        DataSample(
            question="what is drawn",
            question_type="what is drawn",
            gt_answer=[model.answers[-1]],
            gt_answer_weight=[1.0],
        ),
        DataSample(
            question="left", question_type="what is on", gt_answer=["none"], gt_answer_weight=[1.0]
        ),
    ]
    return torch.rand(3, 3, 64, 64), samples


def test_the_dataset_reads_vqa_cps_lists(data: Path) -> None:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        dataset = DATASETS.build(
            {
                "type": "VQACP",
                "data_root": str(data / "data"),
                "data_prefix": "coco",
                "question_file": "vqa-cp/vqacp_v2_test_questions.json",
                "ann_file": "vqa-cp/vqacp_v2_test_annotations.json",
            }
        )
    questions = json.loads((data / "data/vqa-cp/vqacp_v2_test_questions.json").read_text())
    assert len(dataset) == len(questions)
    item = dataset.get_data_info(1)
    assert Path(item["img_path"]).is_file() and "val2014/COCO_val2014_0" in item["img_path"]
    assert item["question"] == "what is on the left?" and item["question_type"] == "what is on"
    assert item["gt_answer"][1] == "nothing" and item["gt_answer_weight"] == [0.8, 0.2]


def test_regions_are_weighted_by_how_they_fit_the_question() -> None:
    attention = RegionAttention(5, 4).eval()
    regions, question = torch.randn(2, 3, 5), torch.randn(2, 4)
    image, text = attention.image[0], attention.question[0]
    for i in range(2):
        asked = (text.weight @ question[i] + text.bias).relu()
        fits = [
            attention.weight.weight[0] @ ((image.weight @ v + image.bias).relu() * asked)
            for v in regions[i]
        ]
        expected = torch.stack(fits).softmax(0) @ regions[i]
        torch.testing.assert_close(attention(regions, question)[i], expected)


def test_answers_are_those_of_enough_questions() -> None:
    chosen = [{"multiple_choice_answer": x} for x in ("two", "yes", "yes", "no", "no", "no")]
    assert frequent_answers(chosen, 2) == ["no", "yes"]


def test_scores_are_vqas(data: Path) -> None:
    model = build(data)
    first, second = model.answers[:2]
    scores = model.scores([first, second, "unknown"], [0.2, 0.7, 0.1])
    expected = torch.zeros(len(model.answers))
    expected[0], expected[1] = 0.6, 1
    torch.testing.assert_close(scores, expected)


def test_the_losses_are_the_cross_entropy_and_the_methods_term(data: Path) -> None:
    model = build(data, functional_entropy={"samples": 3, "weight": 1e-3}).eval()
    images, samples = batch(model)
    torch.manual_seed(3)
    losses = model(images, samples, mode="loss")
    image, question = model.extract_feat(images, samples)
    logits = model.head(image, question)
    targets = torch.stack([model.scores(s.gt_answer, s.gt_answer_weight) for s in samples])
    expected = F.binary_cross_entropy_with_logits(logits, targets) * len(model.answers)
    torch.testing.assert_close(losses["loss_answer"], expected)

    torch.manual_seed(3)
    term, information = FunctionalEntropyRegularizer(3, weight=1e-3)(
        lambda noisy: model.head(noisy["image"], noisy["question"]),
        {"image": image, "question": question},
        logits,
    )
    torch.testing.assert_close(losses["loss_functional_entropy"], term)
    for name in ("image", "question"):
        assert information[name] > 0
        torch.testing.assert_close(losses[f"information_{name}"], information[name])

    losses["loss_functional_entropy"].backward()
    for module in (model.words, model.gru, model.attention, model.head):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in model.vision_backbone.parameters())  # it is frozen


def test_without_the_setting_there_is_no_term(data: Path) -> None:
    model = build(data)
    assert set(model(*batch(model), mode="loss")) == {"loss_answer"}


def test_padding_before_a_question_does_not_change_its_last_word(data: Path) -> None:
    model = build(data)
    seen: list[torch.Tensor] = []
    model.words.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.extract_feat(*batch(model))
    tokens = seen[0]
    assert tokens.shape == (3, 14)
    assert tokens[2].tolist()[:-1] == [0] * 13
    assert model.tokenizer.convert_ids_to_tokens(tokens[2, -1:]) == ["left"]


def test_predictions_are_answers_of_the_list(data: Path) -> None:
    model = build(data).eval()
    images, samples = batch(model)
    logits = model(images, samples)
    found = [sample.pred_answer for sample in model(images, samples, mode="predict")]
    assert found == [model.answers[i] for i in logits.argmax(1)]


def test_learned_mixin_is_the_authors_formula(data: Path) -> None:
    model = build(data, learned_mixin=0.36).eval()
    images, samples = batch(model)
    losses = model(images, samples, mode="loss")
    image, question = model.extract_feat(images, samples)
    fused = model.head.fuse(image, question)
    logits = model.head.classifier(fused)
    targets = torch.stack([model.scores(s.gt_answer, s.gt_answer_weight) for s in samples])

    # The types' mean scores, of the file
    file = data / "data/vqa-cp/vqacp_v2_train_annotations.json"
    bias = []
    for sample in samples:
        alike = [
            a for a in json.loads(file.read_text()) if a["question_type"] == sample.question_type
        ]
        share = [
            sum(a["multiple_choice_answer"] == x for a in alike) / len(alike) for x in model.answers
        ]
        bias.append(share)  # eight of ten annotators count as 1; "nothing" is in no list
    prior = torch.tensor(bias)
    smooth = torch.sigmoid(model.mixin.smoothing)
    g = F.softplus(fused @ model.mixin.factor.weight.T + model.mixin.factor.bias)
    yes, no = g * torch.log(prior + smooth), g * torch.log(1 - prior + smooth)
    p, q = logits.sigmoid() * yes.exp(), (1 - logits.sigmoid()) * no.exp()
    p, q = p / (p + q), q / (p + q)
    expected = -(targets * p.log() + (1 - targets) * q.log()).sum(1).mean()
    torch.testing.assert_close(losses["loss_answer"], expected)
    a, b = yes.exp() / (yes.exp() + no.exp()), no.exp() / (yes.exp() + no.exp())
    entropy = -(a * a.log() + b * b.log()).mean()
    torch.testing.assert_close(losses["loss_bias_entropy"], 0.36 * entropy)


def test_a_type_that_tells_nothing_leaves_the_cross_entropy() -> None:
    mixin = LearnedMixin(4, torch.full((1, 5), 0.5), 2.0)
    logits, targets = torch.randn(3, 5), torch.rand(3, 5)
    losses = mixin(torch.randn(3, 4), logits, targets, torch.zeros(3, dtype=torch.long))
    expected = F.binary_cross_entropy_with_logits(logits, targets) * 5
    torch.testing.assert_close(losses["loss_answer"], expected)
    assert losses["loss_bias_entropy"].item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answers": "no/such.json"}, r"answers must be a file of annotations .*'no/such.json'"),
        ({"answers": __file__}, r"answers must be a file of annotations .*JSONDecodeError"),
        ({"min_count": 1000}, "min_count must be a count that answers of .* have, got 1000"),
        ({"min_count": 0}, "min_count must be a positive integer, got 0"),
        ({"max_words": 0}, "max_words must be a positive integer, got 0"),
        ({"max_words": "a"}, "max_words must be a positive integer, got 'a'"),
        ({"channels": -1}, "channels must be a positive integer, got -1"),
        ({"learned_mixin": -1}, "learned_mixin must be a finite number ≥ 0, got -1"),
        ({"functional_entropy": {"samples": 0}}, r"functional_entropy\.samples must be a positive"),
        (
            {"tokenizer": {"type": "BertTokenizer", "name_or_path": "no-such-model"}},
            r"tokenizer\.name_or_path must be the folder of a text model, got 'no-such-model'",
        ),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    data: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ArgumentError, match=expected):
        build(data, **changes)


def vqa_cp(data: Path, **changes: Any) -> Any:
    files = {
        "question_file": "vqa-cp/vqacp_v2_test_questions.json",
        "ann_file": "vqa-cp/vqacp_v2_test_annotations.json",
    }
    settings = {"type": "VQACP", "data_root": str(data / "data"), "data_prefix": "coco"}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return DATASETS.build(settings | files | changes)


@pytest.mark.parametrize(
    ("setting", "content", "expected"),
    [
        ("question_file", None, r"must be a file of questions .*\(FileNotFoundError"),
        ("ann_file", None, r"must be a file of annotations .*\(FileNotFoundError"),
        ("ann_file", "[", r"must be a file of annotations .*\(JSONDecodeError"),
        ("question_file", "[]", r"must be a file of questions .*, which lists none"),
        ("question_file", '{"questions": [{"question_id": 1}]}', r"\(KeyError: 'image_id'\)"),
        (
            "question_file",
            '[{"question_id": 1, "image_id": "1", "coco_split": "val2014", "question": "?"}]',
            r"\(TypeError: 'image_id' of number 0 is '1'\)",
        ),
        (
            "ann_file",
            '[{"question_id": 1, "question_type": "what", "answers": ["a"]}]',
            r"must be a file of annotations .*\(TypeError",
        ),
        (
            "ann_file",
            '[{"question_id": -1, "question_type": "what", "answers": [{"answer": "a"}]}]',
            r"must have an annotation of each question of .*\.json' has none of question 0",
        ),
    ],
)
def test_a_wrong_file_of_vqa_cp_is_one_clear_line(
    data: Path, tmp_path: Path, setting: str, content: str | None, expected: str
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArgumentError, match=expected) as error:
        vqa_cp(data, **{setting: str(path)})
    assert error.value.argument == setting and "\n" not in str(error.value)


def test_learned_mixin_needs_the_types_of_the_questions(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text('[{"multiple_choice_answer": "a", "answers": [{"answer": "a"}]}]')
    assert build(data, answers=str(path)).answers == ["a"]
    with pytest.raises(ArgumentError, match=r"^answers must be .*\(KeyError: 'question_type'\)"):
        build(data, answers=str(path), learned_mixin=0.36)
    model = build(data, learned_mixin=0.36)
    images, samples = batch(model)
    samples[1].question_type = "how many"
    with pytest.raises(ArgumentError, match=r"^answers must be .* of a sample, 'how many'"):
        model(images, samples, mode="loss")


def test_channels_that_are_not_the_backbones_are_told_before_the_training(data: Path) -> None:
    model, right = build(data, in_channels=256), build(data)
    cfg = Config({"model": {}})
    expected = "in_channels: must be 512, the channels of the backbone's last map, got 256"
    with pytest.raises(ValueError, match=f"^model.{expected}$"):
        prepare(cfg, model, train=True)
    assert prepare(cfg, right, train=True) == {}
    with pytest.raises(ArgumentError, match="^in_channels must be 512"):
        model(*batch(model))
