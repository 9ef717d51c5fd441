"""Recording a detector's attention and laying it over the image, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plugin_core import IDAClassifier, TripletAttention
from plugin_core.inspection.attention_maps import (
    Call,
    Detections,
    Detector,
    Frame,
    Picture,
    Run,
    check_depends_on,
    load_weights,
    record_calls,
    region_attention,
    run,
    spatial_attention,
)

REGIONS = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8]])


class Pooler(nn.Module):
    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        return torch.cat(
            [features[..., int(y) : int(y) + 4, int(x) : int(x) + 4] for x, y, *_ in regions]
        )


class TinyDetector(Detector):
    """Classifies three regions of an image of 8x8 pixels, and lists the last one first."""

    class_names = ("cat", "dog")

    def __init__(self) -> None:
        self.model = nn.ModuleDict(
            {
                "backbone": nn.Conv2d(3, 8, 3, padding=1),
                "pooler": Pooler(),
                "classifier": IDAClassifier(8, 3, num_heads=2),
                "unused": nn.Conv2d(8, 8, 1),
            }
        )
        self.model.eval().requires_grad_(False)

    def read(self, path: str) -> Picture:
        pixels = torch.rand(1, 3, 8, 8) * 255
        return Picture(np.zeros((16, 16, 3), np.uint8), pixels, (8, 8))

    def detect(self, picture: Picture, pixels: Tensor) -> Detections:
        features = self.model["backbone"](pixels / 255)
        self.model["unused"](features)
        logits = self.model["classifier"](self.model["pooler"](features, REGIONS))
        self.model["pooler"](features, REGIONS.flip(0))  # as a mask head does afterwards
        probabilities = logits.softmax(1).flip(0)
        return Detections(REGIONS.flip(0) * 2, probabilities[:, 1], torch.tensor([1, 1, 1]))

    def last_stage(self) -> str:
        return "backbone"

    def region_extractors(self) -> list[nn.Module]:
        return [self.model["pooler"]]

    def regions(self, call: Call) -> Tensor:
        return call.args[1]


def run_tiny(*names: str) -> tuple[TinyDetector, Run]:
    detector = TinyDetector()
    modules = [detector.model.get_submodule(name) for name in names]
    return detector, run(detector, detector.read(""), modules)


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


# --------------------------------------------------------------------------------------- recording


def test_calls_are_recorded_in_their_order_without_changing_the_output():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    net, x = nn.Sequential(first, second, first), torch.rand(1, 2)
    expected = net(x)
    with record_calls([second, first, first]) as calls:
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    assert [call.module for call in calls] == [first, second, first]
    assert calls[0].args[0] is x
    torch.testing.assert_close(calls[2].output, expected)


def test_hooks_are_gone_after_an_exception_too():
    net = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), record_calls([net]):
        assert hooks_of(net)
        net(torch.rand(1, 3))
    assert not hooks_of(net)


def test_run_leaves_no_hook_and_knows_the_padded_size():
    detector, done = run_tiny("classifier")
    assert not hooks_of(detector.model)
    assert done.frame == Frame((16, 16), (8, 8), (8, 8))
    with pytest.raises(ValueError, match="not called"):
        done.call_of(nn.Identity())


def test_best_detection_is_of_the_class_or_of_all():
    found = Detections(torch.zeros(3, 4), torch.tensor([0.2, 0.9, 0.5]), torch.tensor([1, 0, 1]))
    assert (found.best(), found.best(0), found.best(1), found.best(7)) == (1, 1, 2, None)
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))
    assert empty.best() is None


# ---------------------------------------------------------------------------------------- geometry


def test_map_is_laid_over_the_image_without_the_padding():
    # An image of 2x2 pixels at twice its size in an input of 8x8: a pixel is the mean of four cells
    frame = Frame((2, 2), (4, 4), (8, 8))
    cells = torch.arange(64.0).reshape(8, 8)
    expected = torch.tensor([[4.5, 6.5], [20.5, 22.5]])
    torch.testing.assert_close(frame.over_image(cells), expected)
    both = frame.over_image(torch.stack((cells, 2 * cells)))
    torch.testing.assert_close(both, torch.stack((expected, 2 * expected)))


def test_region_is_pasted_at_its_pixels():
    # Two cells on four pixels: their middles are at x = 3 and x = 5, pixels' at 2.5, 3.5, …
    frame = Frame((4, 8), (4, 8), (4, 8))
    pasted = frame.paste(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([2.0, 1, 6, 3]))
    nan = torch.nan
    row = [nan, nan, 0, 0.25, 0.75, 1, nan, nan]
    expected = torch.tensor([[nan] * 8, row, row, [nan] * 8])
    torch.testing.assert_close(pasted, expected, equal_nan=True)


def test_region_of_a_resized_input_is_pasted_at_the_pixels_of_the_image():
    frame = Frame((4, 8), (8, 24), (32, 32))  # twice as high, three times as wide
    pasted = frame.paste(torch.ones(3, 2, 2), torch.tensor([6.0, 2, 18, 6]))
    assert pasted.shape == (3, 4, 8)
    known = ~pasted[0].isnan()
    assert known.nonzero().tolist() == [[y, x] for y in (1, 2) for x in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("box", "share"),
    [
        ((0, 0, 8, 8), 1.0),
        ((0, 0, 4, 8), 0.4),  # the left column: (1 + 3) / 10
        ((4, 4, 8, 8), 0.4),  # the last cell
        ((2, 0, 6, 4), 0.15),  # half of the first two: (0.5 + 1) / 10
        ((0, 6, 8, 8), 0.35),  # half of the last row
        ((3, 3, 3, 5), 0.0),
    ],
)
def test_share_in_a_box_counts_cells_by_their_area(box, share):
    frame = Frame((8, 8), (16, 16), (16, 16))
    maps = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(5, 2, 2)
    shares = frame.share_in_box(maps, torch.tensor(box, dtype=torch.float))
    torch.testing.assert_close(shares, torch.full((5,), share))


def test_attention_to_the_padding_is_in_no_box():
    frame = Frame((8, 8), (8, 8), (8, 16))
    share = frame.share_in_box(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0, 0, 8, 8]))
    assert float(share) == 0.25


# --------------------------------------------------------------------------------------- attention


def test_spatial_attention_adds_up_to_one_over_the_positions():
    maps = spatial_attention(IDAClassifier(8, 5, num_heads=2).eval(), torch.randn(1, 8, 4, 3))
    assert maps.shape == (2, 5, 4, 3)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 5))


@pytest.mark.parametrize("detection", [0, 1, 2])
def test_region_of_a_detection_is_the_one_that_its_score_depends_on(detection):
    detector, done = run_tiny("classifier")
    classifier = detector.model["classifier"]
    maps, region = region_attention(detector, done, classifier, detection)
    assert region.tolist() == REGIONS[2 - detection].tolist()
    pooled = detector.model["pooler"](done.calls[0].output, REGIONS[2 - detection :][:1])
    torch.testing.assert_close(maps, spatial_attention(classifier, pooled)[:, 1])


def test_saturated_score_belongs_to_no_region():
    detector, done = run_tiny("classifier")
    found = done.detections
    flat = Detections(
        found.boxes, 0 * found.scores + 1, found.classes
    )  # no gradient, as in float32
    done = Run(done.picture, done.frame, flat, done.calls)
    with pytest.raises(ValueError, match="score 1 has no gradient there: it is saturated"):
        region_attention(detector, done, detector.model["classifier"], 0)


def test_classifier_of_whole_images_has_no_regions(monkeypatch):
    detector, done = run_tiny("classifier")
    monkeypatch.setattr(detector, "region_extractors", list)
    with pytest.raises(ValueError, match="no regions"):
        region_attention(detector, done, detector.model["classifier"], 0)


def test_feature_map_that_the_score_depends_on_can_be_explained():
    detector, done = run_tiny("backbone")
    check_depends_on(done, detector.model["backbone"], 0)


def test_detector_that_cuts_gradients_off_cannot_be_explained():
    detector, done = run_tiny("backbone")
    found = done.detections
    cut = Detections(found.boxes, found.scores.detach(), found.classes)
    with pytest.raises(ValueError, match="cuts gradients off"):
        check_depends_on(
            Run(done.picture, done.frame, cut, done.calls), detector.model["backbone"], 0
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unused", "has no gradient there: .* does not depend on it"),
        ("pooler", "is called 2 times"),
        ("classifier", r"puts out \(3, 3\), expected a feature map"),
    ],
)
def test_module_without_a_map_of_the_image_cannot_be_explained(name, reason):
    detector, done = run_tiny(name)
    with pytest.raises(ValueError, match=reason):
        check_depends_on(done, detector.model[name], 0)


# ----------------------------------------------------------------------------------------- weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), TripletAttention())


def test_whole_checkpoint_is_loaded(tmp_path):
    trained, net = network(), network()
    torch.save({"model": trained.state_dict(), "iteration": 7}, tmp_path / "w.pth")
    assert load_weights(net, str(tmp_path / "w.pth"))["iteration"] == 7
    for name, value in net.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


def test_version_of_the_names_reaches_the_modules(tmp_path):
    # As DETR's head does, which renames what is older
    class Versioned(nn.Linear):
        _version = 2
        seen = None

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
            self.seen = metadata.get("version")
            super()._load_from_state_dict(state, prefix, metadata, *args)

    net = Versioned(2, 2)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    load_weights(net, str(tmp_path / "w.pth"))
    assert net.seen == 2


def test_attention_that_was_never_trained_is_an_error(tmp_path):
    plain = {k: v for k, v in network().state_dict().items() if k.startswith("0.")}
    torch.save({"model": plain}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain.pth' lacks 15 tensors \(1.cw.conv.conv.weight"):
        load_weights(network(), str(tmp_path / "plain.pth"))


def test_weights_of_another_shape_are_an_error_of_one_line(tmp_path):
    torch.save(
        nn.Sequential(nn.Conv2d(3, 5, 1), TripletAttention()).state_dict(), tmp_path / "w.pth"
    )
    with pytest.raises(ValueError, match="does not fit the config: size mismatch for 0.") as error:
        load_weights(network(), str(tmp_path / "w.pth"))
    assert "\n" not in str(error.value)


def test_tensors_without_a_place_are_logged(tmp_path, caplog):
    state = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "2.extra": torch.zeros(1),
        **network().state_dict(),
    }
    torch.save(state, tmp_path / "w.pth")
    load_weights(network(), str(tmp_path / "w.pth"))
    assert "has 1 tensors (2.extra) that the config has no place for" in caplog.text
