"""Loaders of training data that go on in the middle of an epoch."""

from __future__ import annotations

import itertools
import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch.utils.data import Dataset, Sampler

from plugin_core.training.unreadable_images import UnreadableImage

logger = logging.getLogger("detectron2.plugins")

_MOST_IN_A_ROW = 1000


class NamingMapper:
    """Any mapper, naming the image that cannot be read; raises UnreadableImage.

    Args:
        mapper: of a sample.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self.mapper = mapper

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        name = dataset_dict.get("file_name")
        try:
            return self.mapper(dataset_dict)
        except SizeMismatchError as error:
            message = f"image {name!r} does not fit its annotations: {error}"
            raise UnreadableImage(message) from error
        except (
            OSError,
            SyntaxError,
            EOFError,
            struct.error,
            Image.DecompressionBombError,
        ) as error:
            # of Pillow, for a broken image
            raise UnreadableImage(
                f"image {name!r} cannot be read ({error}); restore the file, or take the image "
                "out of the dataset's annotations"
            ) from error


class TrainLoader:
    """A loader that tells of the images that :class:`ReadableDataset` left out.

    Args:
        loader: gives batches, which are lists of samples.

    Attributes:
        left_out: how often each image was left out.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Any]:
        return map(self._tell, self._loader)

    def _tell(self, batch: Any) -> Any:
        for sample in batch if isinstance(batch, list) else ():
            reasons = sample.pop("left_out", {}) if isinstance(sample, dict) else {}
            for name, reason in reasons.items():
                if name not in self.left_out:
                    logger.warning("Left out: %s", reason)
                self.left_out[name] += 1
        return batch


class ReadableDataset(Dataset):
    """Gives another sample, drawn by NumPy's random numbers, in the place of an unreadable one.

    Args:
        samples: of Detectron2's kind.
        mapper: of a sample; raises UnreadableImage where an image cannot be read.
    """

    def __init__(self, samples: Sequence[dict[str, Any]], mapper: Callable) -> None:
        self.samples = DatasetFromList(list(samples), copy=False)
        self.mapped = MapDataset(self.samples, mapper)
        self.wide = [s.get("width", 0) > s.get("height", 0) for s in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.mapped[index]
        except UnreadableImage as error:
            left_out, last = {self.samples[index]["file_name"]: str(error)}, error
        others = np.random.permutation(len(self))
        others = others[others != index]
        # Batches are grouped by shape. So one of the same shape comes first.
        for other in sorted(others, key=lambda i: self.wide[i] != self.wide[index])[
            : _MOST_IN_A_ROW - 1
        ]:
            try:
                sample = self.mapped[int(other)]
            except UnreadableImage as error:
                left_out[self.samples[int(other)]["file_name"]], last = str(error), error
                continue
            # It joins the batch that waits for the unreadable one.
            shape = {k: v for k, v in self.samples[index].items() if k in ("width", "height")}
            return {**sample, **shape, "left_out": left_out}
        raise UnreadableImage(
            f"all of {len(left_out)} images in turn cannot be read; the last: {last}"
        )


class ResumableTrainLoader(TrainLoader):
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
        super().__init__(None)
        self.start_iter = 0
        self._seed = cfg.SEED
        self._stream: _SampleStream | None = None
        mapper: Any = NamingMapper(DatasetMapper(cfg, is_train=True))
        if self._seed < 0:
            parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
            if cfg.INPUT.SKIP_BAD_IMAGES and parts["dataset"]:
                parts["dataset"] = ReadableDataset(parts["dataset"], parts.pop("mapper"))
            self._loader = build_detection_train_loader(**{"mapper": None, **parts})
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
        # Workers would take shares of the stream as long as a batch, or fill batches of their own,
        # so that batches depended on the number of workers. One by one, the samples come in the
        # stream's order, and are put into batches here.
        parts.update(total_batch_size=comm.get_world_size(), aspect_ratio_grouping=False)
        self._stream = _SampleStream(sampler, groups, self._batch_size)
        mapped: Any = MapDataset(DatasetFromList(samples, copy=False), mapper)
        if cfg.INPUT.SKIP_BAD_IMAGES:
            mapped = ReadableDataset(samples, mapper)
        dataset = _SeededDataset(mapped, self._seed, comm.get_rank())
        self._loader = build_detection_train_loader(
            dataset=dataset, mapper=None, sampler=self._stream, **parts
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A generator: workers start at the first batch, when `start_iter` is known.
        if self._stream is None:
            yield from super().__iter__()
            return
        self._stream.batches_done = self.start_iter
        samples = itertools.chain.from_iterable(self._loader)
        if self._grouped:
            batches = iter(AspectRatioGroupedDataset(samples, self._batch_size))
        else:
            batches = iter(lambda: list(itertools.islice(samples, self._batch_size)), [])
        for iteration, batch in enumerate(batches, self.start_iter):
            torch.manual_seed(derive_seed(self._seed, comm.get_rank(), iteration, 1))
            yield self._tell(batch)


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

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
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
