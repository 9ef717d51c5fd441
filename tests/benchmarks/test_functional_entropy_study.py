"""benchmarks/functional_entropy.py: its data, what it writes, and that both trainings are alike."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    path = ROOT / "benchmarks" / "functional_entropy.py"
    spec = importlib.util.spec_from_file_location("functional_entropy_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["benchmarks/functional_entropy.py"])
    return module


def test_without_the_shortcut_only_texts_change_and_tell_nothing(benchmark):
    generator = torch.Generator().manual_seed(0)
    world = benchmark.World(generator)
    samples = world.draw(4000)
    permuted = samples.without_shortcut(generator)

    def named(samples):
        """Classes of the nearest words."""
        return torch.cdist(samples.features["text"], world.words).argmin(1)

    assert torch.equal(permuted.features["image"], samples.features["image"])
    assert torch.equal(permuted.classes, samples.classes)
    # A random word is right in one of five cases.
    for found, share in ((samples, 0.95 + 0.05 / 5), (permuted, 1 / 5)):
        right = (named(found) == found.classes).float().mean().item()
        assert right == pytest.approx(share, abs=0.03)
    for name in ("image", "text"):
        assert samples.features[name].var() == pytest.approx(1, abs=0.35)


def test_trainings_with_and_without_the_term_start_alike(benchmark, monkeypatch):
    seen = []
    forward = benchmark.Classifier.forward

    def watched(self, x):
        seen.append((self.head.weight.detach().clone(), x["image"].detach()))
        return forward(self, x)

    monkeypatch.setattr(benchmark.Classifier, "forward", watched)
    samples = benchmark.World(torch.Generator().manual_seed(0)).draw(100)
    plain = benchmark.train(samples, 0.0, 1, seed=3)
    weighted = benchmark.train(samples, 1e-9, 1, seed=3)
    # The clean batch of each; the term adds its perturbed copies.
    assert [len(x) for _, x in seen] == [64, 64, 64 * benchmark.SAMPLES]
    for a, b in zip(seen[0], seen[1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(plain.head.weight, weighted.head.weight)


def test_choice_is_made_on_validation_samples(benchmark):
    def numbers(val_without, val_with, test):
        return {
            0: {
                benchmark.VAL_WITHOUT: val_without,
                benchmark.VAL_WITH: val_with,
                benchmark.WITHOUT: test,
            }
        }

    runs = {
        "plain": numbers(50, 99, 50),
        "small": numbers(70, 98, 60),
        "large": numbers(60, 97, 90),
    }
    trainings = {"plain": (0.0, 4), "small": (0.1, 4), "large": (1.0, 4)}
    rows = benchmark.choices(runs, trainings).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells == [
        [benchmark.VAL_WITHOUT, "small", "10.0", "10.0"],
        [benchmark.VAL_WITH, "plain", "0.0", "0.0"],
    ]


def test_report_holds_all_trainings_and_findings_stay(benchmark, monkeypatch, tmp_path, capsys):
    for name, value in (("TRAIN", 100), ("VAL", 50), ("TEST", 150)):
        monkeypatch.setattr(benchmark, name, value)
    path = tmp_path / "results" / "study"
    arguments = ["--quick", "--seeds", "0", "1", "--out", str(path)]
    benchmark.main(arguments)
    markdown = path.with_suffix(".md")
    markdown.write_text(markdown.read_text() + "\nWritten by hand.\n")
    first = json.loads(path.with_suffix(".json").read_text())
    benchmark.main(arguments)

    text = markdown.read_text()
    assert text.endswith(f"{benchmark.study.FINDINGS}\nWritten by hand.\n")
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["runs"] == first["runs"]  # all that is drawn depends on the seed
    assert [n for n in content["trainings"] if n.startswith("plain")] == [
        "plain, 10 steps",
        "plain, 40 steps",
    ]
    for name, by_seed in content["runs"].items():
        assert text.count(f"| {name} ") >= 3  # the mean, and each seed
        for numbers in by_seed.values():
            assert all(0 <= numbers[m] <= 100 for m in (benchmark.WITH, benchmark.WITHOUT))
            assert numbers[benchmark.IMAGE] > 0 and numbers[benchmark.TEXT] > 0
    assert path.with_suffix(".png").stat().st_size > 1000
