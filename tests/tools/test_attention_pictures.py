"""The rows and panels of attention pictures, by hand and with a detector of our own."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plugin_core import BlockPlugin, build_block_plugin
from plugin_core.inspection import sheets
from plugin_core.inspection.attention_maps import (
    Call,
    Detections,
    Detector,
    Frame,
    Picture,
    Run,
    run,
)
from plugin_core.inspection.choices import (
    attention_names,
    choose_baseline_layer,
    choose_layers,
    find_class,
)
from plugin_core.inspection.grad_cam import make_cam
from plugin_core.inspection.pictures import plugin_row


class TinyDetector(Detector):
    """One detection; its network pads an image of 12x16 pixels to 16x16."""

    class_names = ("0",)

    def __init__(self) -> None:
        self.model = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 4, stride=4)})
        self.model.eval().requires_grad_(False)
        nn.init.constant_(self.model["backbone"].bias, 0.5)

    def read(self, path: str) -> Picture:
        return Picture(np.zeros((24, 32, 3), np.uint8), torch.rand(1, 3, 12, 16), (12, 16))

    def detect(self, picture: Picture, pixels: Tensor) -> Detections:
        assert pixels.shape[2:] == (12, 16)
        features = self.model["backbone"](nn.functional.pad(pixels, (0, 0, 0, 4)))
        score = (features * torch.linspace(-0.2, 1, 64).reshape(1, 4, 4, 4)).mean().sigmoid()
        return Detections(torch.tensor([[4.0, 4, 12, 12]]), score[None], torch.tensor([0]))

    def last_stage(self) -> str:
        return "backbone"

    def region_extractors(self) -> list[nn.Module]:
        return []

    def regions(self, call: Call) -> Tensor:
        raise AssertionError


def test_grad_cam_is_its_formula_laid_over_the_image():
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    detector = TinyDetector()
    done = run(detector, detector.read(""), [detector.model["backbone"]])
    heat = make_cam("gradcam", detector, done, 0, detector.model["backbone"])
    activation = done.calls[0].output
    (gradient,) = torch.autograd.grad(done.detections.scores[0], activation)
    cam = (gradient.mean((2, 3), keepdim=True) * activation).sum(1)[0].relu()
    padded = nn.functional.interpolate(cam[None, None], (16, 16), mode="bilinear")[0, 0]
    padded = (padded - padded.min()) / (padded.max() - padded.min())
    assert heat.shape == (24, 32)
    expected = done.frame.over_image(padded)
    torch.testing.assert_close(heat, expected, atol=1e-4, rtol=0, check_dtype=False)


class Shown(nn.Module):
    """A module of no attention that has maps."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.maps = lambda _: maps


def row_of(plugin: BlockPlugin) -> sheets.Row:
    """The plugin's row of an image of two cells, of which a box covers the first."""
    picture = Picture(np.zeros((4, 8, 3), np.uint8), torch.zeros(1, 3, 4, 8), (4, 8))
    found = Detections(torch.tensor([[0.0, 0, 4, 4]]), torch.ones(1), torch.zeros(1))
    calls = [Call(plugin, (torch.rand(1, 4, 1, 2),), None)]
    done = Run(picture, Frame((4, 8), (4, 8), (4, 8)), found, calls)
    detector = TinyDetector()
    detector.model["plugin"] = plugin.eval()
    return plugin_row(detector, done, 0, "plugin")


def test_many_maps_are_ranked_by_their_share_in_the_box():
    shares = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5, 0.2])
    maps = torch.stack((shares, 1 - shares), dim=1)[:, None, None]
    plugin = BlockPlugin(Shown({f"query {k}": map_ for k, map_ in enumerate(maps)}), "ida", True)
    row = row_of(plugin)
    expected = [(1, 90), (3, 70), (4, 50), (2, 30)]
    titles = [f"query {k}\n{share}.0% of it in the box" for k, share in expected]
    assert [panel.title for panel in row.panels] == titles
    assert row.title == "ida, alpha 0\nplugin\nthe box is 50.0% of the input"
    assert [panel.file for panel in row.panels] == ["ida-queries", None, None, None]


def test_block_plugin_has_a_row_of_the_maps_that_it_offers():
    row = row_of(build_block_plugin("triplet_attention", 4))
    assert row.title == "triplet attention\nplugin"
    titles = [panel.title.partition("\n")[0] for panel in row.panels]
    assert titles == ["gate hw", "gate cw, mean over C", "gate hc, mean over C"]
    assert [panel.file for panel in row.panels] == ["triplet-hw", None, None]
    assert {panel.picture.shape for panel in row.panels} == {(4, 8, 3)}
    row = row_of(BlockPlugin(Shown({"space": torch.tensor([[[0.25, 0.5]]])}), "a.b:MyGate"))
    assert [(p.title, p.file) for p in row.panels] == [("space\n0.25 … 0.5", "my_gate-space")]


def test_block_plugin_is_drawn_where_it_offers_maps_and_sees_the_image():
    detector = TinyDetector()
    detector.model["backbone"] = nn.Sequential(
        BlockPlugin(Shown({}), "a.b:MyGate"), BlockPlugin(nn.Identity(), "timm:eca")
    )
    detector.model["roi_heads"] = build_block_plugin("ida", 16)
    chosen = {"my_gate": "backbone.0"}
    assert choose_layers(detector, ["my_gate"], []) == chosen
    assert attention_names(detector) == {"my_gate": ["backbone.0"]}
    with pytest.raises(ValueError, match="no IDABlock for it; there are gradcam, gradcam.., my_g"):
        choose_layers(detector, ["ida-queries"], [])
    with pytest.raises(ValueError, match="--layer roi_heads: it works on regions"):
        choose_layers(detector, None, ["roi_heads"])
    with pytest.raises(ValueError, match="layer plugin: it offers no maps"):
        row_of(detector.model["backbone"][0])


def test_map_is_coloured_where_it_is_known_only():
    image, box = np.full((4, 8, 3), 10, np.uint8), torch.tensor([7.0, 3, 7, 3])
    heat = torch.full((4, 8), torch.nan)
    heat[1, 2], heat[1, 3] = 0.5, 0.7
    drawn = sheets.overlay(image, heat, box).astype(int)
    changed = (drawn != 10).any(2).nonzero()
    assert list(zip(*changed, strict=True)) == [(1, 2), (1, 3), (3, 7)]
    assert drawn[1, 3, 0] > drawn[1, 2, 0]  # the greater is redder
    assert (image == 10).all()
    assert (sheets.overlay(image, heat * torch.nan, box)[:3] == 10).all()


def test_missing_grad_cam_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ValueError, match=r"pip install -e .\[visualization\], or leave them out"):
        choose_layers(TinyDetector(), None, [])


def test_class_without_names_is_asked_for_by_its_id():
    assert find_class("1", ("0", "1", "2")) == 1
    with pytest.raises(ValueError, match="names are not known, give an id from 0 to 2"):
        find_class("dog", ("0", "1", "2"))


def test_baseline_with_other_classes_is_an_error():
    other = TinyDetector()
    other.class_names = ("0", "1")
    layers = {"gradcam": "backbone"}
    with pytest.raises(ValueError, match="has 2 classes, the model has 1"):
        choose_baseline_layer(TinyDetector(), other, layers, [])
    with pytest.raises(ValueError, match="only for gradcam"):
        choose_baseline_layer(TinyDetector(), TinyDetector(), {}, [])
