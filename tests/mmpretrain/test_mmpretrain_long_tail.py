"""Loss, metric and data of long-tailed recognition in MMPretrain."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmpretrain.datasets import CIFAR100, CustomDataset
from mmpretrain.registry import MODELS, TRANSFORMS

from mm_plugins.mmpretrain.balanced_softmax_loss import BalancedSoftmaxLoss
from mm_plugins.mmpretrain.cifar import CIFAR100LT
from mm_plugins.mmpretrain.class_counts import ClassCountsHook, count_classes
from mm_plugins.mmpretrain.long_tail import LongTailMetric
from mm_plugins.mmpretrain.resnet_cifar import ThinResNet_CIFAR
from mm_plugins.training_settings import told_no_counts
from plugin_core.errors import ArgumentError

ONE = {"pred_label": torch.tensor([0]), "gt_label": torch.tensor([0])}


def test_groups_are_a_brute_force_count() -> None:
    rng = np.random.default_rng(0)
    counts = [500, 101, 100, 60, 20, 19, 3]
    labels, predicted = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    metric = LongTailMetric(counts=counts)
    metric.process(
        None,
        [
            {"pred_label": torch.tensor([p]), "gt_label": torch.tensor([g])}
            for p, g in zip(predicted, labels, strict=True)
        ],
    )
    found = metric.evaluate(len(labels))
    expected = {"all": 100 * sum(predicted == labels) / len(labels)}
    for group, classes in {"many": (0, 1), "medium": (2, 3, 4), "few": (5, 6)}.items():
        shares = []
        for k in classes:
            right = sum(1 for p, g in zip(predicted, labels, strict=True) if p == g == k)
            shares.append(right / sum(1 for g in labels if g == k))
        expected[group] = 100 * sum(shares) / len(shares)
    assert found == pytest.approx({f"long-tail/{name}": x for name, x in expected.items()})


def test_a_group_that_no_image_is_of_is_left_out() -> None:
    metric = LongTailMetric(counts=[5, 4])
    metric.process(None, [ONE])
    assert metric.evaluate(1) == {"long-tail/all": 100.0, "long-tail/few": 100.0}


def test_balanced_softmax_of_equal_counts_is_cross_entropy() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    loss = BalancedSoftmaxLoss(counts=[7, 7, 7])
    torch.testing.assert_close(
        loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
    )


def test_balanced_softmax_is_worked_out_by_hand() -> None:
    # exp(0)·3 / (exp(0)·3 + exp(0)·1) = 3/4
    loss = BalancedSoftmaxLoss(counts=[3, 1])(torch.zeros(1, 2), torch.tensor([0]))
    assert loss.item() == pytest.approx(np.log(4 / 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_balanced_softmax_counts_more_images_than_half_precision_can(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=dtype, requires_grad=True)
    labels, counts = torch.tensor([1, 0]), [70000, 10]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        loss = BalancedSoftmaxLoss(counts=counts)(logits, labels)
    shifted = logits.detach().double() + torch.tensor(counts).double().log()
    expected = torch.nn.functional.cross_entropy(shifted, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("use_soft", [False, True])
def test_a_class_without_an_image_is_as_if_it_were_not_there(use_soft: bool) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0])
    loss = BalancedSoftmaxLoss(counts=[3, 1, 0], use_soft=use_soft)
    given = torch.nn.functional.one_hot(labels, 3).float() if use_soft else labels
    found = loss(logits, given)
    expected = BalancedSoftmaxLoss(counts=[3, 1])(logits[:, :2], labels)
    torch.testing.assert_close(found, expected)
    for own, theirs in zip(
        torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (torch.tensor([[1.0, 1.0]]), "one class for each image"),
        (torch.tensor([[0.5, 0.5]]), "one class for each image"),  # without use_soft
    ],
)
def test_several_labels_are_refused(label: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BalancedSoftmaxLoss(counts=[3, 1])(torch.zeros(1, 2), label)


def test_missing_and_misfitting_counts_are_named() -> None:
    with pytest.raises(ValueError, match="ClassCountsHook"):
        BalancedSoftmaxLoss()(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="the model's 2 classes, got 3 numbers"):
        BalancedSoftmaxLoss(counts=[1, 1, 1])(torch.zeros(1, 2), torch.tensor([0]))
    metric = LongTailMetric()
    metric.process(None, [ONE])
    with pytest.raises(ValueError, match="ClassCountsHook"):
        metric.evaluate(1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LongTailMetric(many=10, few=20), "few must be at most"),
        (lambda: LongTailMetric(many=-1), "many must be a number"),
        (lambda: LongTailMetric(counts="abc"), "counts must be the training images of each class"),
        (lambda: LongTailMetric(counts=5), "counts must be the training images of each class"),
        (lambda: LongTailMetric(counts=[1, -2, "x"]), "counts must be at least 0 .*, got -2 for 1"),
        (lambda: CIFAR100LT(imbalance_factor=0.5), "imbalance_factor must be at least 1"),
        (lambda: CIFAR100LT(seed=-1), "seed must be"),
    ],
)
def test_a_wrong_argument_is_named(make: Any, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        make()


def list_file(folder: Path, labels: list[int]) -> CustomDataset:
    path = folder / "list.txt"
    path.write_text("".join(f"a/{i}.jpg {label}\n" for i, label in enumerate(labels)))
    return CustomDataset(data_root=str(folder), ann_file="list.txt")


def test_the_fields_lists_are_read_and_counted_however_they_are_repeated(tmp_path: Path) -> None:
    dataset = list_file(tmp_path, [0, 0, 3, 1, 0])
    assert dataset.get_data_info(2)["img_path"].endswith("a/2.jpg")
    assert count_classes(dataset) == [3, 1, 0, 1]
    assert count_classes(RepeatDataset(dataset, 4), 5) == [3, 1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"class 3, and model.head.num_classes is 2"):
        count_classes(dataset, 2)


def test_parts_are_counted_together_though_their_highest_labels_differ(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    parts = [list_file(folders[0], [0, 0, 3]), list_file(folders[1], [1])]
    assert count_classes(ConcatDataset(parts)) == [2, 1, 0, 1]


@pytest.mark.parametrize("labels", [[[0], [1, 2]], [[0, 1], [1, 2]]])
def test_images_of_several_labels_are_not_counted(labels: list[list[int]]) -> None:
    class Images:
        def __len__(self) -> int:
            return len(labels)

        def get_data_info(self, i: int) -> dict[str, Any]:
            return {"gt_label": labels[i]}

    with pytest.raises(ValueError, match=r"^train_dataloader.dataset: each image must have one la"):
        count_classes(Images())


def test_a_test_without_a_training_set_names_the_setting() -> None:
    evaluator = SimpleNamespace(metrics=[LongTailMetric()])
    runner: Any = SimpleNamespace(cfg={}, test_loop=SimpleNamespace(evaluator=evaluator))
    with pytest.raises(ValueError, match="^LongTailMetric: counts: .* those of train_dataloader$"):
        ClassCountsHook().before_test(runner)
    cfg = Config({"custom_hooks": [{"type": "ClassCountsHook"}]})
    assert told_no_counts(LongTailMetric, None, cfg).endswith("those of train_dataloader")
    cfg.train_dataloader = {}
    assert not told_no_counts(LongTailMetric, None, cfg)


def test_the_hook_tells_the_loss_and_the_metric_what_the_config_does_not(tmp_path: Path) -> None:
    dataset = list_file(tmp_path, [0, 0, 1])
    model = torch.nn.ModuleDict({"loss": BalancedSoftmaxLoss()})
    metric, other = LongTailMetric(), LongTailMetric(counts=[9, 9])
    runner: Any = SimpleNamespace(
        model=model,
        train_dataloader=SimpleNamespace(dataset=dataset),
        val_loop=SimpleNamespace(evaluator=SimpleNamespace(metrics=[metric, other])),
    )
    hook = ClassCountsHook()
    hook.before_train(runner)
    hook.before_val(runner)
    assert model["loss"].counts == metric.counts == [2, 1]
    assert other.counts == [9, 9]


def test_cifar100_lt_has_the_published_numbers_and_the_fields_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = np.tile(np.arange(100), 500)
    images = [{"img": i, "gt_label": int(label)} for i, label in enumerate(labels)]
    monkeypatch.setattr(CIFAR100, "load_data_list", lambda self: images)
    dataset = CIFAR100LT(data_root="data", split="train")
    counts = count_classes(dataset)
    assert counts[:6] == [500, 477, 455, 434, 415, 396]  # as in the authors' cls_freq
    assert counts[-6:] == [6, 6, 5, 5, 5, 5]
    assert sum(counts) == 10847
    assert len(CIFAR100LT(data_root="data", split="test")) == 50000
    # LDAM's code: numpy's seed 0, and a shuffle for each class in turn
    state, orders = np.random.RandomState(0), [np.flatnonzero(labels == k) for k in (0, 1)]
    for order in orders:
        state.shuffle(order)
    assert [dataset.get_data_info(500 + i)["img"] for i in range(477)] == orders[1][:477].tolist()


def test_thin_resnet_is_the_papers() -> None:
    network = ThinResNet_CIFAR(depth=32)
    linear = 64 * 10 + 10
    assert sum(p.numel() for p in network.parameters()) + linear == 464154
    (features,) = network(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 64, 8, 8)


def test_resnet_10_is_a_resnet_18_with_a_block_in_each_stage() -> None:
    network = MODELS.build({"type": "PluginResNet", "depth": 10})
    assert [len(getattr(network, name)) for name in network.res_layers] == [1, 1, 1, 1]
    assert sum(p.numel() for p in network.parameters()) == 4905792  # torchvision's [1, 1, 1, 1]


def test_autoaugment_of_cifar_keeps_an_image_an_image() -> None:
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    results = TRANSFORMS.build({"type": "CIFARAutoAugment"})({"img": image, "gt_label": 3})
    assert results["img"].shape == image.shape
    assert results["img"].dtype == np.uint8
    assert results["gt_label"] == 3
