"""tools/evaluate_context_bias.py --protocol singh2020: hand-made numbers, pairs, files, errors."""

from __future__ import annotations

import json
import os

import evaluate_context_bias
import numpy as np
import pytest
from context_bias_cases import (
    CUP,
    FILES,
    LAMP,
    TABLE,
    Inputs,
    detection,
    error_of,
    ground_truth,
    table,
)

from plugin_core.evaluation import biased_pairs

SINGH = ("--protocol", "singh2020")


@pytest.fixture
def images_of_cups(inputs: Inputs) -> Inputs:
    """Seven images; the best score of a cup in each is 0.9, 0.6, 0.3, none, 0.5, 0.2, none."""
    images = [[CUP, TABLE], [TABLE, CUP], [CUP], [CUP], [TABLE], [LAMP], []]
    inputs.truth = ground_truth(images, {CUP: "cup", TABLE: "table", LAMP: "lamp"})
    scores = [(1, 0.1), (1, 0.9), (2, 0.6), (3, 0.3), (5, 0.5), (6, 0.2)]
    inputs.results = [detection(image_id, CUP, score) for image_id, score in scores]
    inputs.results[1]["bbox"] = [40, 40, 9, 9]  # elsewhere; only the score counts
    return inputs


def test_pair_of_singh_2020_worked_out_by_hand(images_of_cups, run):
    rows = run(*images_of_cups.options(*SINGH))
    # A table is in 2 of 4 images of cups. Its bias is (0.9 + 0.6) / 2 over (0.3 + 0) / 2, that is
    # 0.75 / 0.15. Tables are never detected, so they have no bias; lamps are with nothing.
    # Negatives are images 5, 6 and 7, of 0.5, 0.2 and 0. Co-occurring: both cups are before them.
    # Exclusive: the cup of 0.3 is 2nd, so precision 1/2; the missed one and image 7 share the last
    # place, where 2 of 5 are cups. (1/2 + 2/5) / 2 = 45%.
    assert list(rows) == ["cup", "mean", "classes in the mean"]
    assert rows["cup"] == {
        "class": "cup",
        "context": "table",
        "bias": "5.00",
        "images co-occurring": "2",
        "images exclusive": "2",
        "AP co-occurring": "100.0",
        "AP exclusive": "45.0",
        "gap": "+55.0",
    }
    assert rows["mean"]["gap"] == "+55.0" and rows["classes in the mean"]["gap"] == "1"


def test_files_of_singh_2020_give_another_detector_the_same_pairs(images_of_cups, capsys):
    out = images_of_cups.folder / "out"
    evaluate_context_bias.main(images_of_cups.options(*SINGH, "--out", str(out)))
    printed = capsys.readouterr().out
    assert "as no --pairs or --held-out is given" in printed
    assert sorted(os.listdir(out)) == FILES
    assert table((out / "context_bias.md").read_text()) == table(printed)
    content = json.loads((out / "context_bias.json").read_text())
    assert content["settings"]["protocol"] == "singh2020"
    (cup,) = content["classes"]
    assert (cup["category_id"], cup["companion_id"]) == (CUP, TABLE)
    assert cup["bias"] == pytest.approx(5) and cup["images_without"] == 3
    assert content["mean"]["ap_exclusive"] == {"value": pytest.approx(45), "classes": 1}

    images_of_cups.results = [detection(3, CUP, 0.9)]
    pairs = ("--pairs", str(out / "context_bias.json"))
    evaluate_context_bias.main([*images_of_cups.options(*SINGH), *pairs])
    other = table(capsys.readouterr().out)["cup"]
    # All but image 3 share the last place: 2 of 5 co-occurring; 1 and 2 of 5 exclusive.
    assert (other["context"], other["bias"]) == ("table", "-")
    assert (other["AP co-occurring"], other["AP exclusive"]) == ("40.0", "70.0")


def test_held_out_images_choose_the_pairs_and_training_images_the_frequency(images_of_cups, capsys):
    folder = images_of_cups.folder
    # Other ids. Held out, a lamp triples the score of a cup; a table does nothing.
    held_out = ground_truth([[21, 22], [21, 23], [21]], {21: "cup", 22: "lamp", 23: "table"})
    scores = [detection(1, 21, 0.9), detection(2, 21, 0.3), detection(3, 21, 0.3)]
    (folder / "held_out.json").write_text(json.dumps(held_out))
    (folder / "scores.json").write_text(json.dumps(scores))
    files = ("--held-out", str(folder / "held_out.json"), str(folder / "scores.json"))

    def pair_of(number_of_cups: int) -> tuple[str, str]:
        images = [[21, 22, 23], *[[21, 23]] * (number_of_cups - 1)]
        images_of_cups.train = ground_truth(images, {21: "cup", 22: "lamp", 23: "table"})
        evaluate_context_bias.main(images_of_cups.options(*SINGH, "--train-annotations") + [*files])
        cup = table(capsys.readouterr().out)["cup"]
        return cup["context"], cup["bias"]

    assert pair_of(5) == ("lamp", "3.00")  # in 1 of 5 training images of cups
    assert pair_of(6) == ("table", "0.50")  # in 1 of 6; 0.3 over (0.9 + 0.3) / 2


def test_the_classes_of_the_highest_bias_are_reported_the_highest_first():
    # Class b is always seen with b + 100, and by half, a third, … without.
    train = [classes for b in range(1, 26) for classes in ({b, b + 100}, {b})]
    images = dict(enumerate(train))
    scores = {(i, b): 1 / b if len(images[i]) == 1 else 1.0 for i in images for b in images[i]}
    pairs = biased_pairs.most_biased_pairs(train, images, scores)
    assert list(pairs) == list(range(25, 5, -1))
    assert pairs[25] == (125, pytest.approx(25))


def test_image_ap_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 6, 30) / 5, rng.random(30) < 0.4  # many are equal
        ap = biased_pairs.average_precision(zip(scores, labels, strict=True))
        assert ap == pytest.approx(100 * metrics.average_precision_score(labels, scores))
    assert biased_pairs.average_precision([(0.5, False)]) is None


def test_singh_2020_without_a_pair_is_an_error(images_of_cups):
    images_of_cups.results = []
    assert "no pair of classes has a bias" in error_of(*images_of_cups.options(*SINGH))


def test_held_out_images_that_nothing_reads_are_an_error(inputs):
    held_out = ("--held-out", inputs.write("truth"), inputs.write("results"))
    assert "--held-out: of --protocol singh2020" in error_of(*inputs.options(*held_out))
    both = inputs.options(*SINGH, "--pairs") + [*held_out]
    assert "--held-out: chooses pairs, and --pairs gives them" in error_of(*both)
