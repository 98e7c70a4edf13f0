"""Loaders and the evaluator of a registered dataset.

Everything here takes the name of a dataset in detectron2's catalog, whether it was registered by
this package or by detectron2 itself ("coco_2017_val").
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import random
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..distill.contract import UNLABELLED
from ..errors import UserError
from .evaluator import Evaluator, write_ground_truth
from .fit import fit_to_mapper
from .images import ReadableMapper
from .padding import MarkPadding
from .reader import file_stem
from .registered import class_names, dataset_dicts, dataset_report

logger = logging.getLogger(__name__)


def build_train_loader(
    *,
    dataset: str,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    num_workers: int = 0,
    seed: int | None = None,
    aspect_ratio_grouping: bool = True,
    filter_empty: bool = True,
    unlabelled: str | None = None,
    unlabelled_batch_size: int = 0,
) -> Iterable[list[dict]]:
    """An endless loader of training batches that depend on ``seed`` and on nothing else.

    The order of the images is that of detectron2's ``TrainingSampler(seed=seed)``. Each image is
    augmented with the generators of numpy, random and torch seeded from ``seed`` and the position
    of the image in the stream, and put back to their state afterwards. So two runs of one seed see
    the same augmented images in the same batches, whatever the model draws in between and whatever
    ``num_workers`` is. Over several processes the stream is dealt out in turn. The stream starts
    anew with every iteration over the loader, unless :func:`skip_batches` says where.

    Args:
        dataset: a registered name.
        mapper: turns a record into a model's input, e.g. detectron2's ``DatasetMapper``. Where it
            returns None, the next record of the dataset takes the place. Pixels that it pads are
            marked, see ``MarkPadding``. If it has a method ``bind``, a copy of it is given all
            records and the seed once, ``bind(records, seed)``, for a mapper that makes one picture
            of several images. If it has a method ``at_batch``, it is told the number of the batch,
            from 0, before each record: ``at_batch(number)``.
        total_batch_size: images per step over all processes.
        num_workers: worker processes of each process; 0 loads in the training process.
        seed: at least 0; None or a negative number draws one, the same for all processes.
        aspect_ratio_grouping: batch wide images with wide ones and tall ones with tall ones.
        filter_empty: leave out images without objects.
        unlabelled: a registered name whose images are only distilled; labels, if it has any, are
            not looked at. They go through the same mapper.
        unlabelled_batch_size: so many of them are added to each step, over all processes; 0: none.

    Returns:
        An iterable of lists of ``total_batch_size / number of processes`` mapped records, after
        them those without labels, which say so (``UNLABELLED``) and have no ``instances``.

    Raises:
        UserError: the dataset is unknown or empty, the mapper cannot make its masks or keypoints,
            the batch size cannot be dealt out, the mapper has ``at_batch`` and images are grouped,
            or (when iterating) an image cannot be read.
    """
    _check_batch_size("total_batch_size", total_batch_size)
    if aspect_ratio_grouping and hasattr(mapper, "at_batch"):
        raise UserError(
            f"{type(mapper).__name__} follows the number of the batch, which groups of wide and "
            "tall images leave open: set dataloader.train.aspect_ratio_grouping=False"
        )
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
        logger.info("training loader drew the seed %d", seed)
    records = dataset_dicts(dataset=dataset, filter_empty=filter_empty)
    records = fit_to_mapper(records, mapper, dataset, filter_empty=filter_empty)
    settings = {"mapper": mapper, "num_workers": num_workers, "grouped": aspect_ratio_grouping}
    loader = _stream(records, dataset, total_batch_size, seed, **settings)
    if (unlabelled is None) != (unlabelled_batch_size == 0):
        raise UserError(
            f"dataloader.train has unlabelled={unlabelled} and unlabelled_batch_size="
            f"{unlabelled_batch_size}: set both, or neither"
        )
    if unlabelled is None:
        return loader
    _check_batch_size("unlabelled_batch_size", unlabelled_batch_size)
    records = dataset_dicts(dataset=unlabelled, filter_empty=False)
    records = [{**record, "annotations": [], UNLABELLED: True} for record in records]
    # Another order than that of the labelled ones, which may be among them.
    seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])
    more = _stream(records, unlabelled, unlabelled_batch_size, seed, **settings)
    return WithUnlabelled(loader, more)


def _check_batch_size(name: str, value: int) -> None:
    world = comm.get_world_size()
    if value < 1 or value % world:
        raise UserError(
            f"{name}={value} must be a positive multiple of the number of processes, {world}"
        )


def _stream(
    records: list[dict],
    dataset: str,
    total_batch_size: int,
    seed: int,
    *,
    mapper: Callable[[dict], dict | None],
    num_workers: int,
    grouped: bool,
) -> DataLoader:
    """The endless loader of some records."""
    kinds = None
    if grouped:
        if not all("width" in record and "height" in record for record in records):
            raise UserError(
                f"dataset {dataset} does not tell the sizes of its images: add width and height to "
                "its records, or set aspect_ratio_grouping=False"
            )
        kinds = [record["width"] > record["height"] for record in records]
    generator = torch.Generator()
    generator.manual_seed(seed)
    records = DatasetFromList(records, copy=False)
    if hasattr(mapper, "bind"):
        mapper = copy.copy(mapper)
        mapper.bind(records, seed)
    loader = DataLoader(
        _SeededMap(records, MarkPadding(mapper), seed, total_batch_size, kinds),
        batch_sampler=_BatchSampler(
            TrainingSampler(len(records), seed=seed),
            total_batch_size // comm.get_world_size(),
            kinds,
        ),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        # Seeds the workers, on which nothing depends, without a draw from the run's stream.
        generator=generator,
    )
    return _with_forked_workers(loader)


def skip_batches(loader: Any, count: int) -> bool:
    """Let a training loader's stream begin after so many batches; nothing is loaded for that.

    Returns:
        False if it is not a loader of ``build_train_loader``, and was left as it is.
    """
    if isinstance(loader, WithUnlabelled):
        return all([skip_batches(part, count) for part in (loader.labelled, loader.unlabelled)])
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, _BatchSampler):
        return False
    sampler.skip = count
    return True


def stream_seed(loader: Any) -> int | None:
    """The seed of a training loader's stream; None if it is not one of ``build_train_loader``."""
    dataset = getattr(loader, "dataset", None)
    return dataset.seed if isinstance(dataset, _SeededMap) else None


def build_test_loader(
    *, dataset: str, mapper: Callable[[dict], dict], num_workers: int = 0
) -> Iterable[list[dict]]:
    """A loader of every image of a dataset once, one per batch, those without objects included.

    Args:
        dataset: a registered name.
        mapper: turns a record into a model's input; pixels that it pads are marked.
        num_workers: worker processes of each process.

    Raises:
        UserError: the dataset is unknown or empty, or (when iterating) an image cannot be read, or
            the mapper leaves it out.
    """
    records = dataset_dicts(dataset=dataset, filter_empty=False)
    if getattr(mapper, "is_train", False):  # Labels are wanted, for a loss on test data.
        records = fit_to_mapper(records, mapper, dataset, filter_empty=False)
    images = MapDataset(DatasetFromList(records, copy=False), ReadableMapper(_EveryImage(mapper)))
    loader = build_detection_test_loader(images, mapper=None, num_workers=num_workers)
    return _with_forked_workers(loader)


class _EveryImage(MarkPadding):
    """A mapper that may leave no image out: Detectron2 would test another one twice instead."""

    def __call__(self, record: dict) -> dict:
        mapped = super().__call__(record)
        if mapped is None:
            raise UserError(
                f"the mapper of the test data returned None for {record['file_name']}: it must "
                "give every image, or the detector would not be tested on all of them"
            )
        return mapped


def _with_forked_workers(loader: DataLoader) -> DataLoader:
    """On Linux, let a loader's workers be forked, as before Python 3.14.

    That starts them by a server process instead: each imports everything anew, for seconds, cannot
    have a mapper that does not pickle, and takes part in no run that a signal has stopped.
    """
    if loader.num_workers and sys.platform == "linux":
        loader.multiprocessing_context = "fork"
    return loader


def build_evaluator(
    *,
    dataset: str,
    output_dir: str | None = None,
    kpt_oks_sigmas: Sequence[float] | None = None,
) -> Evaluator:
    """A COCO evaluator whose ground truth is exactly what ``build_test_loader`` loads.

    That is the original json if the dataset holds all of it unchanged. Otherwise the records are
    written as a COCO json each time: to ``<output_dir>/<dataset>_ground_truth.json``, or to a
    temporary file that is removed at once. A json that detectron2 registered is the ground truth
    whatever its boxes are, if pycocotools can use its values. Masks are evaluated only if every
    annotation has one, keypoints if any has. A detector that finds nothing has an AP of 0.

    Args:
        dataset: a registered name.
        output_dir: where the ground truth and, by detectron2, the predictions are written; None
            writes nothing.
        kpt_oks_sigmas: of each keypoint, how much it may be off, for the similarity of keypoints;
            None for those of COCO's 17.

    Raises:
        UserError: the dataset is unknown or empty, or its file does not exist; when evaluating,
            predicted keypoints are not as many as those of the data and the sigmas.
    """
    output_dir = output_dir and os.path.expanduser(output_dir)
    classes = class_names(dataset)
    metadata = MetadataCatalog.get(dataset)
    report = dataset_report(dataset)
    ids = _category_ids(metadata.get("thing_dataset_id_to_contiguous_id"), len(classes))
    # pycocotools wants keypoints of every annotation or of none.
    alike = sum(report.keypoints.values()) in (0, report.annotations)
    original = report.ground_truth if alike else None
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "ground_truth.json")
        if original is not None:
            path = original
        elif output_dir is not None:
            path = os.path.join(_made(output_dir), f"{file_stem(dataset)}_ground_truth.json")
        if original is None:
            records = dataset_dicts(dataset=dataset, filter_empty=False)
            write_ground_truth(path, records, classes, {v: k for k, v in ids.items()})
        # detectron2 takes the file from the metadata and never lets an entry change, hence a
        # short-lived entry of its own; the evaluator keeps a reference to it.
        entry = f"{dataset}-{uuid.uuid4().hex}"
        MetadataCatalog.get(entry).set(
            thing_classes=classes, thing_dataset_id_to_contiguous_id=ids, json_file=path
        )
        try:
            return Evaluator(
                entry,
                output_dir=output_dir,
                kpt_oks_sigmas=tuple(kpt_oks_sigmas or ()),
                dataset=dataset,
                masks=report.masks == report.annotations,
                keypoints=tuple(sorted(report.keypoints)),
            )
        finally:
            MetadataCatalog.pop(entry)


def _category_ids(given: Any, count: int) -> dict[int, int]:
    """The id of every class in a json to its position; those that are no such map are not used."""
    if isinstance(given, Mapping) and all(type(n) is int for pair in given.items() for n in pair):
        if sorted(given.values()) == list(range(count)):
            return dict(given)
    return {i + 1: i for i in range(count)}


def _made(folder: str) -> str:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"the evaluator's output_dir {folder} cannot be made ({e.strerror}): choose another"
        ) from e
    return folder


class WithUnlabelled:
    """Batches of labelled images, each with a batch of others behind it."""

    def __init__(self, labelled: DataLoader, unlabelled: DataLoader) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled
        self.dataset = labelled.dataset  # What an epoch is.

    def __iter__(self) -> Iterator[list[dict]]:
        for batch, more in zip(self.labelled, self.unlabelled, strict=True):
            for item in more:
                item.pop("instances", None)
                item[UNLABELLED] = True
            yield batch + more


class _BatchSampler(Sampler):
    """Endless batches of ``(position, index)``: an image's place in the stream of all processes.

    Images are grouped before they are loaded, so that where a batch begins in the stream can be
    told without loading what is before it.
    """

    def __init__(
        self, sampler: TrainingSampler, batch_size: int, kinds: Sequence[bool] | None
    ) -> None:
        """
        Args:
            kinds: of each image; a batch is of one kind. None: they are all of one.
        """
        self.sampler, self.batch_size, self.kinds = sampler, batch_size, kinds
        self.skip = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.skip, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        begun: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        for position, index in zip(positions, self.sampler, strict=False):
            kind = self.kinds is not None and self.kinds[index]
            begun[kind].append((position, index))
            if len(begun[kind]) == self.batch_size:
                yield begun[kind]
                begun[kind] = []


class _SeededMap(Dataset):
    """Maps the record at ``(position, index)`` with randomness of ``(seed, position)`` alone."""

    def __init__(
        self,
        records: DatasetFromList,
        mapper: MarkPadding,
        seed: int,
        total_batch_size: int,
        kinds: Sequence[bool] | None,
    ) -> None:
        """
        Args:
            kinds: see :class:`_BatchSampler`; what takes the place of an image is of its kind.
        """
        self.records, self.mapper, self.seed = records, ReadableMapper(mapper), seed
        self.total_batch_size, self.kinds = total_batch_size, kinds
        self.at_batch = getattr(mapper.mapper, "at_batch", None)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        if self.at_batch is not None:
            self.at_batch(position // self.total_batch_size)
        states = np.random.get_state(), random.getstate(), torch.default_generator.get_state()
        number = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        np.random.seed(number)
        random.seed(number)
        # Not torch.manual_seed, which would also reset the generators of the GPUs.
        torch.default_generator.manual_seed(number)
        try:
            for other in self._from(index):
                mapped = self.mapper(self.records[other])
                if mapped is not None:
                    return mapped
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
            torch.default_generator.set_state(states[2])
        raise UserError("the mapper returned None for every image of the dataset: correct it")

    def _from(self, index: int) -> Iterator[int]:
        """The record and those after it, first of its kind: a batch is to be of one."""
        after = [range(index, len(self)), range(index)]
        if self.kinds is None:
            return itertools.chain(*after)
        alike = (i for part in after for i in part if self.kinds[i] == self.kinds[index])
        others = (i for part in after for i in part if self.kinds[i] != self.kinds[index])
        return itertools.chain(alike, others)
