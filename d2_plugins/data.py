"""Loaders of training data that go on in the middle of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    build_detection_train_loader,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import Dataset, Sampler


class PluginDatasetMapper(DatasetMapper):
    """Detectron2's mapper, naming the image that does not decode."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(dataset_dict)
        except (OSError, SyntaxError) as error:  # of Pillow, for a broken image
            raise ValueError(
                f"image {dataset_dict['file_name']!r} cannot be read ({error}); restore the file, "
                "or take the image out of the dataset's annotations"
            ) from error


class ResumableTrainLoader:
    """Detectron2's train loader, able to go on where a training stopped.

    When a training is resumed, Detectron2 begins its stream of samples anew, and random numbers
    depend on earlier work. With a seed in the config, this loader goes on with the next batches of
    the stopped training, with the same augmentation, whatever the number of workers. It seeds
    PyTorch anew for each batch, as proposals are sampled at random. It does not load the samples
    that it leaves out. Without a seed (``cfg.SEED`` negative) it is Detectron2's loader.

    Args:
        cfg: the whole config.

    Attributes:
        start_iter: batches to leave out; may be set until the first batch is taken.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.start_iter = 0
        self._seed = cfg.SEED
        self._stream: _SampleStream | None = None
        mapper = PluginDatasetMapper(cfg, is_train=True)
        if self._seed < 0:
            self._loader = build_detection_train_loader(cfg, mapper=mapper)
            return
        random_state = np.random.get_state()
        np.random.seed(derive_seed(self._seed))  # the sampler draws its own seed from NumPy
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
        np.random.set_state(random_state)
        samples, mapper, sampler = (parts.pop(k) for k in ("dataset", "mapper", "sampler"))
        if not samples:
            raise ValueError(
                f"DATASETS.TRAIN: of {cfg.DATASETS.TRAIN} no image has annotations that this model "
                "trains on (DATALOADER.FILTER_EMPTY_ANNOTATIONS, and for keypoints "
                "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)"
            )
        self._batch_size = parts["total_batch_size"] // comm.get_world_size()
        self._grouped = parts["aspect_ratio_grouping"]
        if self._grouped:
            groups = [s.get("width", 0) > s.get("height", 0) for s in samples]
        else:
            groups = [False] * len(samples)
            # Each worker would fill batches of its own, so that batches depended on the number of
            # workers. One by one, the samples come in the stream's order.
            parts["total_batch_size"] = comm.get_world_size()
        self._stream = _SampleStream(sampler, groups, self._batch_size)
        mapped = MapDataset(DatasetFromList(samples, copy=False), mapper)
        dataset = _SeededDataset(mapped, self._seed, comm.get_rank())
        self._loader = build_detection_train_loader(
            dataset=dataset, mapper=None, sampler=self._stream, **parts
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A generator: workers start at the first batch, when `start_iter` is known.
        if self._stream is None:
            yield from self._loader
            return
        self._stream.batches_done = self.start_iter
        if self._grouped:
            batches = iter(self._loader)
        else:
            samples = itertools.chain.from_iterable(self._loader)
            batches = iter(lambda: list(itertools.islice(samples, self._batch_size)), [])
        for iteration, batch in enumerate(batches, self.start_iter):
            torch.manual_seed(derive_seed(self._seed, comm.get_rank(), iteration, 1))
            yield batch


class _SampleStream(Sampler):
    """The samples of a process in turn, as (place in the stream, index into the dataset).

    Args:
        sampler: gives an endless stream of indices, the same each time that it is iterated over.
        groups: group of each sample of the dataset; a batch holds samples of one group.
        batch_size: samples in a batch of this process.
    """

    def __init__(self, sampler: Sampler[int], groups: list[bool], batch_size: int) -> None:
        self.sampler = sampler
        self.groups = groups
        self.batch_size = batch_size
        self.batches_done = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        stream = enumerate(iter(self.sampler))
        # Each group fills batches of its own. So a stopped training also held samples that waited
        # for their group's next batch. These come first now.
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        batches = 0
        while batches < self.batches_done:
            place, index = next(stream)
            group = waiting[self.groups[index]]
            group.append((place, index))
            if len(group) == self.batch_size:
                group.clear()
                batches += 1
        return itertools.chain(sorted(waiting[False] + waiting[True]), stream)


class _SeededDataset(Dataset):
    """Loads a sample with random numbers that depend on its place in the stream only."""

    def __init__(self, dataset: MapDataset, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        place, index = sample
        seed_all_rng(derive_seed(self.seed, self.rank, place))
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def derive_seed(*numbers: int) -> int:
    """Derive a 31-bit seed from all of ``numbers``, which must not be negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)
