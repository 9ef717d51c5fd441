"""Costs of compared detectors: how they are timed and laid out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plugin_core.evaluation.comparison import costs
from plugin_core.evaluation.comparison.costs import (
    Cost,
    cost_section,
    measure_costs,
    pick_images,
    time_in_turn,
)
from plugin_core.evaluation.comparison.evaluations import Checkpoint, read_models
from plugin_core.inspection.cost import Cost as Counts
from plugin_core.inspection.cost import Report


def test_every_round_times_each_detector_once_in_alternating_order(monkeypatch):
    monkeypatch.setattr(costs, "ROUNDS", (2, 3))
    calls: list[tuple[str, int]] = []

    def call(name: str) -> Callable[[int], None]:
        return lambda number: calls.append((name, number))

    times = time_in_turn({"a": call("a"), "b": call("b")}, seconds=60)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [len(rounds) for rounds in times.values()] == [3, 3]
    assert all(second >= 0 for rounds in times.values() for second in rounds)
    assert [len(rounds) for rounds in time_in_turn({"a": call("a")}, seconds=0).values()] == [2]


def test_config_alone_is_counted_and_not_timed(monkeypatch, tmp_path):
    config = tmp_path / "a.yaml"
    config.touch()
    report = Report((64, 96), {}, {"backbone": Counts(1_000, 2_000_000_000)}, 0, Counts())
    monkeypatch.setattr(costs, "count", lambda *_args, **_kwargs: report)
    found = measure_costs({"plain": Checkpoint(str(config), "")}, [])
    assert found == {"plain": Cost(1_000, 2_000_000_000, (64, 96))}
    section = cost_section(found, {"plain": 30.0}, "AP", "noise")
    assert section.tables[0].rows == [["plain", 1_000, 2.0, "64×96", None, None, None]]
    assert "Nothing was timed" in section.text and not section.figures


def test_what_cannot_be_measured_is_said_and_the_report_goes_on(tmp_path):
    config, weights = tmp_path / "a.yaml", tmp_path / "a.pth"
    config.write_text("MODEL: {NO_SUCH: 1}")
    weights.touch()
    found = measure_costs({"a": Checkpoint(str(config), str(weights))}, [])
    assert [note.partition(":")[0] for note in found["a"].notes] == ["not counted", "not timed"]


def test_table_has_medians_and_quartiles_and_a_figure_of_what_two_have():
    found = {
        "a": Cost(10, 10**9, (64, 64), 2**20, "GPU", {1: [0.1, 0.2, 0.3, 0.4, 0.5], 4: [0.05]}),
        "b": Cost(20, 2 * 10**9, (64, 64), 2**21, "GPU", {1: [0.1]}),
    }
    section = cost_section(found, {"a": 30.0, "b": 31.0}, "AP", "noise")
    (first, second), batches = section.tables[0].rows, section.tables[1].rows
    assert first[:4] == ["a", 10, 1.0, "64×64"] and first[4:] == pytest.approx([300, 200, 1])
    assert second[4:] == pytest.approx([100, 0, 2])
    assert batches[0][:2] == ["a", 4] and batches[0][2:] == pytest.approx([50, 0])
    assert "on GPU, from" in section.text and "the median of 5 rounds" in section.text
    assert section.figures[0].png.startswith(b"\x89PNG")


def test_images_are_spread_over_the_ground_truth(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.png").touch()
    content = {"images": [{"file_name": f"{number:02}.png"} for number in range(30)]}
    picked = [path.stem for path in pick_images(content, tmp_path)]
    assert picked == ["00", "02", "05", "07", "10", "12", "15", "17"]
    assert pick_images(content, None) == []


def test_config_is_of_a_detector_that_has_none(tmp_path):
    config = str(tmp_path / "a.yaml")
    Path(config).touch()
    seeds = {"a": ["a.json"], "b": [Checkpoint("b.yaml", "b.pth"), Checkpoint("b.yaml", "c.pth")]}
    assert read_models([f"a={config}"], seeds) == {
        "a": Checkpoint(config, ""),
        "b": Checkpoint("b.yaml", "b.pth"),
    }
    for option, message in [
        (f"c={config}", "no --detector is called 'c'"),
        (f"b={config}", "--config b: the detector has a config already"),
        ("a=none.yaml", "--config a: none.yaml: there is no such config file"),
        (f"a={config}:a.pth", "--config a: there is no checkpoint 'a.pth'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_models([option], seeds)
