"""tools/visualize_attention.py with an ImageNet classifier: network, pictures, errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import visualize_attention
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from plugin_core import TripletAttention
from plugin_core.inspection.attention_maps import run
from plugin_core.inspection.classifier import Classifier
from plugin_core.inspection.grad_cam import make_cam

PUBLISHED = {"cw.conv.": "ChannelGateH.spatial.", "hc.conv.": "ChannelGateW.spatial."}
PUBLISHED |= {"hw.conv.": "SpatialGate.spatial."}


class PublishedBlock(BasicBlock):
    """The block of the published classifiers: attention after the last norm, before the sum."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.triplet_attention = TripletAttention()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.triplet_attention(self.bn2(self.conv2(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def classifier(block: type[nn.Module], num_classes: int = 1000) -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.ResNet(block, [2, 2, 2, 2], num_classes=num_classes)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    nn.init.normal_(net.fc.bias, -9, 1)  # so that all logits may be negative
    return net.eval()


def published(net: nn.Module, path: Path) -> str:
    """Save as the authors do: of a parallel training, in the names of their classifiers."""
    state = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in PUBLISHED.items():
            name = name.replace(f"triplet_attention.{ours}", f"triplet_attention.{theirs}")
        state[f"module.{name}"] = tensor
    torch.save({"epoch": 90, "arch": "resnet", "state_dict": state}, path)
    return str(path)


@pytest.fixture
def image(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((480, 320), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_classifier_of_the_authors_computes_its_logits_and_grad_cam(image, tmp_path):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    net = classifier(PublishedBlock)
    detector = Classifier("classifier", published(net, tmp_path / "net.pth.tar"))
    assert detector.class_names[1] == "goldfish"

    picture = detector.read(image)
    evaluation = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    with Image.open(image) as file:
        x = evaluation(file.convert("RGB"))[None]
    found = detector.detect(picture, picture.pixels)
    torch.testing.assert_close(found.scores, net(x)[0], atol=1e-4, rtol=1e-4)

    # Grad-CAM: channels of the last stage by the mean gradient of the class's logit
    features: list[Tensor] = []
    net.layer4.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    logits = net(x)[0]
    assert logits.max() < 0  # and yet the wanted class is found
    class_id = 7
    (gradient,) = torch.autograd.grad(logits[class_id], features[0])
    cam = (gradient.mean((2, 3), keepdim=True) * features[0]).sum(1)[0].relu()
    cam = F.interpolate(cam[None, None], (224, 224), mode="bilinear")[0, 0]
    cam = ((cam - cam.min()) / (cam.max() - cam.min())).detach()
    layer = detector.model.get_submodule(detector.last_stage())
    done = run(detector, picture, [layer])
    index = done.detections.best(class_id)
    assert index == class_id
    heat = make_cam("gradcam", detector, done, index, layer)
    torch.testing.assert_close(heat, cam, atol=2e-3, rtol=0, check_dtype=False)


def test_pictures_of_a_classifier_and_its_plain_baseline_are_written(image, tmp_path):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    weights = published(classifier(PublishedBlock), tmp_path / "net.pth.tar")
    torch.save(classifier(BasicBlock).state_dict(), tmp_path / "plain.pth")
    argv = ["classifier", image, "--weights", weights, "--out", str(tmp_path / "out")]
    argv += ["--class", "goldfish", "--baseline", "classifier", str(tmp_path / "plain.pth")]
    visualize_attention.main(argv)
    cams = ("gradcam", "gradcam++")
    names = {"attention", "triplet-hw", *cams, *(f"baseline_{cam}" for cam in cams)}
    assert set(os.listdir(tmp_path / "out")) == {f"a_{name}.png" for name in names}
    assert Image.open(tmp_path / "out/a_gradcam.png").size == (224, 224)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (lambda name: not name.startswith("fc."), "with an fc"),
        (lambda name: name != "layer4.1.bn2.weight", "it lacks layer4.1.bn2.weight"),
        (lambda name: "layer" not in name, "no ResNet"),
    ],
)
def test_file_without_a_whole_classifier_is_an_error_that_names_it(image, tmp_path, names, said):
    state = classifier(BasicBlock, 3).state_dict()
    torch.save({k: v for k, v in state.items() if names(k)}, tmp_path / "part.pth")
    weights = ["--weights", str(tmp_path / "part.pth"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        visualize_attention.main(["classifier", image, *weights])
    assert "part.pth" in str(stop.value) and said in str(stop.value)


def test_block_of_an_unknown_kind_is_an_error(tmp_path):
    state = classifier(BasicBlock, 3).state_dict()
    torch.save(state | {"layer1.0.odd.weight": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"'odd', which is no block plugin's name$"):
        Classifier("classifier", str(tmp_path / "odd.pth"))
