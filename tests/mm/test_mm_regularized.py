"""Auxiliary losses of MMDetection's detectors: the detector and its own losses stay as they are."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from batchformer_detectors import skip_where_it_cannot_run
from grounding_detectors import build, images, kind_of, loss, model_config, regularized, samples
from mmdet.utils import register_all_modules
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from regularized_detectors import AMC, ENTROPY, GROUNDING, total

pytestmark = pytest.mark.usefixtures("no_iteration_of_another_test")


@pytest.mark.parametrize("name", [*GROUNDING, "faster-rcnn"])
def test_parameters_and_predictions_are_the_plain_detectors(name, config):
    plain = build(config(name)).eval()
    settings = {**AMC, **(ENTROPY if name in GROUNDING else {})}
    detector = build(regularized(config(name), **settings)).eval()
    assert detector.load_state_dict(plain.state_dict()) is not None
    with torch.no_grad():
        expected = plain.predict(images(), samples(kind_of(name), test=True))
        predicted = detector.predict(images(), samples(kind_of(name), test=True))
    for mine, other in zip(predicted, expected, strict=True):
        assert "phrase_heatmaps" not in mine
        assert torch.equal(mine.pred_instances.bboxes, other.pred_instances.bboxes)
        assert torch.equal(mine.pred_instances.scores, other.pred_instances.scores)


@pytest.mark.parametrize("name", ["grounding-dino", "faster-rcnn"])
def test_the_detectors_own_losses_stay_as_they_are(name, config):
    plain = build(config(name))
    detector = build(regularized(config(name), **AMC))
    expected = loss(plain, samples(kind_of(name)))
    losses = loss(detector, samples(kind_of(name)))
    assert set(losses) - set(expected) == {"loss_amc_mean", "loss_amc_max"}
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, atol=1e-4, rtol=1e-4)


def test_copies_and_pickles_are_of_their_own(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert type(other) is type(detector)
        nn.init.zeros_(other.text_feat_map.weight)
        assert "loss_amc_max" in loss(other, samples("phrases"))
    assert detector.text_feat_map.weight.any()


def traces(detector: nn.Module) -> list[Any]:
    """Whatever of a module can be exchanged for a step."""
    return [
        (type(m), list(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in detector.modules()
    ]


def test_nothing_that_is_exchanged_for_a_step_stays_also_after_an_error(config, monkeypatch):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    loss(detector, samples("phrases"))  # in which MMDetection's head gets attributes of its own
    before = traces(detector)
    assert not any(kind.__name__.startswith("_") for kind, *_ in before)
    loss(detector, samples("phrases"))
    assert traces(detector) == before

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(detector.encoder.fusion_layers[-1].attn, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        loss(detector, samples("phrases"))
    monkeypatch.undo()
    assert traces(detector) == before


def test_nothing_of_a_step_stays_alive(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    seen: list[Any] = []
    attention = detector.encoder.fusion_layers[-1].attn
    handle = attention.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y[0])))
    gc.disable()  # nothing that only the collector would find
    try:
        total(loss(detector, samples("phrases"))).backward()
        assert seen and all(reference() is None for reference in seen)
    finally:
        gc.enable()
        handle.remove()


def test_it_trains_in_bfloat16(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(detector, samples("phrases"))
    total(losses).backward()
    assert losses["loss_amc_max"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_an_empty_caption_is_warned_of_and_the_rest_trains(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    said: list[str] = []
    detector._warn = lambda kind, text: said.append(text)
    batch = samples("phrases")
    batch[0].set_metainfo({"text": "", "tokens_positive": {0: [[0, 0]], 1: [[0, 0]]}})
    losses = loss(detector, batch)
    assert total(losses).isfinite() and losses["loss_amc_max"] > 0
    assert len(said) == 1
    assert "image0.jpg: the spans [[0, 0]] of phrase 0 are no part of its text ''" in said[0]
    assert len(batch[0].gt_instances) == 0


def test_without_gradients_there_is_the_plain_loss(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    with torch.no_grad():
        losses = loss(detector, samples("phrases"))
    assert not {"loss_amc_max", "loss_functional_entropy"} & set(losses)
    assert total(losses) > 0


def test_it_is_taken_in_every_nth_step_of_the_run(config):
    detector = build(
        regularized(
            config("grounding-dino"),
            attention_mask_consistency={"every": 2},
            functional_entropy={"every": 3, "samples": 1},
        )
    )
    hub = MessageHub.get_current_instance()
    for step, amc, entropy in ((0, True, True), (3, False, True), (4, True, False)):
        hub.update_info("iter", step)
        losses = loss(detector, samples("phrases"))
        assert ("loss_amc_max" in losses, "loss_functional_entropy" in losses) == (amc, entropy)
    del hub.runtime_info["iter"]  # without a runner it counts itself
    taken = ["loss_amc_max" in loss(detector, samples("phrases")) for _ in range(3)]
    assert taken in ([True, False, True], [False, True, False])


def step(rank: int, text_model: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Take a step in a process whose images have boxes, or have none."""
    register_all_modules()
    detector = build(regularized(model_config("grounding-dino", text_model), **AMC, **ENTROPY))
    joined = MMDistributedDataParallel(detector.train(), find_unused_parameters=True)
    boxes = ((8.0, 8, 40, 40), (30.0, 20, 60, 62)) if rank == 0 else ()
    torch.manual_seed(rank)
    losses = joined(images(1), samples("phrases", boxes=boxes, count=1), mode="loss")
    total(losses).backward()
    gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
    return sorted(losses), gradients


def test_processes_train_together_though_one_has_no_phrases(tmp_path, text_models):
    skip_where_it_cannot_run("grounding-dino")
    function = partial(step, text_model=text_models["grounding-dino"])
    (names, mine), (other_names, others) = two_processes.run(function, tmp_path)
    assert names == other_names, "of losses, which are averaged by name"
    assert mine.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in mine.items())
    assert any(g.any() for n, g in mine.items() if n.startswith("language_model"))
