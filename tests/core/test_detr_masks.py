"""DETR's mask head and its segments, by hand and against the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plugin_core.methods.detr_masks import DETRMasks, panoptic_segments


def inputs(batch: int = 2) -> dict[str, Tensor | list[Tensor]]:
    return {
        "memory": torch.randn(batch, 128, 3, 4),
        "source": torch.randn(batch, 128, 3, 4),
        "maps": [torch.randn(batch, c, 3 * n, 4 * n) for c, n in ((64, 8), (128, 4), (256, 2))],
    }


def test_attention_is_a_softmax_over_heads_and_positions_without_padding():
    head, memory = DETRMasks(128, 8, (64, 128, 256)), torch.randn(2, 128, 3, 4)
    queries, images = torch.randn(3, 128), torch.tensor([0, 1, 1])
    padding = torch.zeros(2, 3, 4, dtype=torch.bool)
    padding[1, :, 2:] = True
    weights = head.attention(queries, images, memory, padding)
    for n, image in enumerate(images.tolist()):
        q = head.query_proj(queries[n]).view(8, 16)
        k = head.key_proj(memory[image].flatten(1).T).T.reshape(8, 16, 3, 4)
        scores = (q[:, :, None, None] * k).sum(1) / 4
        e = scores.exp() * ~padding[image]
        torch.testing.assert_close(weights[n], e / e.sum())


def test_mask_of_a_query_depends_on_no_other():
    head, given = DETRMasks(128, 8, (64, 128, 256)), inputs()
    queries, images = torch.randn(5, 128), torch.tensor([0, 0, 1, 1, 1])
    every = head(queries, images, **given)
    assert every.shape == (5, 24, 32)
    torch.testing.assert_close(head(queries[[3, 0]], images[[3, 0]], **given), every[[3, 0]])
    assert head(queries[:0], images[:0], **given).shape == (0, 24, 32)


def test_repeated_batch_has_the_masks_of_its_images():
    head, given = DETRMasks(128, 8, (64, 128, 256)), inputs()
    queries, images = torch.randn(4, 128), torch.tensor([0, 1, 2, 3])
    streams = {**given, "memory": torch.randn(4, 128, 3, 4)}
    twice = {
        "memory": streams["memory"],
        "source": given["source"].repeat(2, 1, 1, 1),
        "maps": [level.repeat(2, 1, 1, 1) for level in given["maps"]],
    }
    torch.testing.assert_close(head(queries, images, **streams), head(queries, images, **twice))


def logits_of(*owners: str) -> Tensor:
    """Masks (N, H, W) whose largest logit at each pixel is that of the letter's place, a = 0.

    A capital letter's is so by far, and where it is gone, "a" is the next.
    """
    size = len(owners), len(owners[0])
    letters = [["abcde".index(letter.lower()) for letter in row] for row in owners]
    logits = torch.zeros(5, *size)
    logits[0] = 1
    return logits.scatter_(0, torch.tensor([letters]), 2.0)


def test_stuff_of_one_class_loses_its_pixels_to_others_and_small_masks_vanish():
    logits = logits_of("aaaabbbb", "aaaabbbb", "ccccddde", "ccccdddd")
    labels = torch.tensor([1, 2, 3, 2, 4])
    is_thing = torch.tensor([True, False, True, False, True])
    places, kept = panoptic_segments(logits, labels, is_thing, (4, 8))
    # b and d are the same stuff: d counts as b, and so is empty. e is a pixel. Both go to a.
    assert kept.tolist() == [0, 1, 2]
    expected = [[0] * 4 + [1] * 4] * 2 + [[2] * 4 + [0] * 4] * 2
    assert places.tolist() == expected


def test_things_of_one_class_stay_apart():
    logits = logits_of("aaaabbbb", "aaaabbbb")[:2]
    places, kept = panoptic_segments(logits, torch.tensor([1, 1]), torch.ones(2).bool(), (2, 8))
    assert kept.tolist() == [0, 1] and places.unique().tolist() == [0, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_found_is_a_map_of_nothing(count):
    logits = torch.zeros(count, 2, 2)  # its area is 4, which is too small
    places, kept = panoptic_segments(
        logits, torch.ones(count).long(), torch.ones(count).bool(), (2, 2)
    )
    assert kept.tolist() == [] and (places == -1).all()


def test_segments_are_resized_as_pillow_does():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    logits = torch.randn(4, 31, 62)
    owner = logits.argmax(0)
    for size in ((20, 25), (93, 100)):
        places, kept = panoptic_segments(
            logits, torch.arange(4), torch.ones(4).bool(), size, min_area=0
        )
        resized = image.fromarray(owner.byte().numpy()).resize(size[::-1], image.Resampling.NEAREST)
        assert kept.tolist() == [0, 1, 2, 3]
        assert torch.equal(places.byte(), torch.from_numpy(np.array(resized)))
