"""Loaders and the evaluator of a registered dataset.

Everything here takes the name of a dataset in detectron2's catalog, whether it was registered by
this package or by detectron2 itself ("coco_2017_val").
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.common import ToIterableDataset
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils import comm

from ..errors import UserError
from .registered import class_names, dataset_dicts, no_file

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
) -> Iterable[list[dict]]:
    """An endless loader of training batches that depend on ``seed`` and on nothing else.

    The order of the images is that of detectron2's ``TrainingSampler(seed=seed)``. Each image is
    augmented with the generators of numpy, random and torch seeded from ``seed`` and the position
    of the image in the stream, and put back to their state afterwards. So two runs of one seed see
    the same augmented images in the same batches, whatever the model draws in between and whatever
    ``num_workers`` is. Over several processes the stream is dealt out in turn. The stream starts
    anew with every iteration, also after a resume.

    Args:
        dataset: a registered name.
        mapper: turns a record into a model's input, e.g. detectron2's ``DatasetMapper``. Where it
            returns None, the next record of the dataset takes the place.
        total_batch_size: images per step over all processes.
        num_workers: worker processes of each process; 0 loads in the training process.
        seed: at least 0; None or a negative number draws one, the same for all processes.
        aspect_ratio_grouping: batch wide images with wide ones and tall ones with tall ones.
        filter_empty: leave out images without objects.

    Returns:
        An iterable of lists of ``total_batch_size / number of processes`` mapped records.

    Raises:
        UserError: the dataset is unknown or empty, the batch size cannot be dealt out, or (when
            iterating) an image cannot be read.
    """
    world = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world:
        raise UserError(
            f"total_batch_size={total_batch_size} must be a positive multiple of the "
            f"number of processes, {world}"
        )
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
        logger.info("training loader drew the seed %d", seed)
    records = dataset_dicts(dataset=dataset, filter_empty=filter_empty)
    stream = ToIterableDataset(
        _SeededMap(DatasetFromList(records, copy=False), mapper, seed),
        _NumberedSampler(TrainingSampler(len(records), seed=seed)),
        # The unit in which the DataLoader takes turns between its workers; with any other one
        # the batches would depend on num_workers.
        shard_chunk_size=1 if aspect_ratio_grouping else total_batch_size // world,
    )
    return build_detection_train_loader(
        stream,
        mapper=None,
        total_batch_size=total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        seed=seed,
    )


def build_test_loader(
    *, dataset: str, mapper: Callable[[dict], dict], num_workers: int = 0
) -> Iterable[list[dict]]:
    """A loader of every image of a dataset once, one per batch, those without objects included.

    Args:
        dataset: a registered name.
        mapper: turns a record into a model's input.
        num_workers: worker processes of each process.

    Raises:
        UserError: the dataset is unknown or empty, or (when iterating) an image cannot be read.
    """
    records = dataset_dicts(dataset=dataset, filter_empty=False)
    images = MapDataset(DatasetFromList(records, copy=False), _Readable(mapper))
    return build_detection_test_loader(images, mapper=None, num_workers=num_workers)


def build_evaluator(*, dataset: str, output_dir: str | None = None) -> COCOEvaluator:
    """A COCO evaluator whose ground truth is exactly what ``build_test_loader`` loads.

    That is the original json if the dataset holds all of it unchanged. Otherwise the records are
    written as a COCO json each time: to ``<output_dir>/<dataset>_ground_truth.json``, or to a
    temporary file that is removed at once. Masks are evaluated only if every annotation has one.

    Args:
        dataset: a registered name.
        output_dir: where the ground truth and, by detectron2, the predictions are written; None
            writes nothing.

    Raises:
        UserError: the dataset is unknown or empty, or its file does not exist.
    """
    classes = class_names(dataset)
    metadata = MetadataCatalog.get(dataset)
    report = metadata.get("dfd_report")
    original = report.ground_truth if report else metadata.get("json_file")
    if original is not None and report is None:
        if not os.path.isfile(original):
            raise no_file(dataset, original)
        return COCOEvaluator(dataset, output_dir=output_dir)

    records = dataset_dicts(dataset=dataset, filter_empty=False)
    masks = all("segmentation" in a for r in records for a in r["annotations"])
    tasks = None if masks else ("bbox",)
    if original is not None:
        return COCOEvaluator(dataset, tasks=tasks, output_dir=output_dir)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = ids or {i + 1: i for i in range(len(classes))}
    truth = _coco_dict(records, classes, {v: k for k, v in ids.items()})
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "ground_truth.json")
        if output_dir is not None:
            os.makedirs(output_dir, exist_ok=True)
            path = os.path.join(output_dir, f"{dataset}_ground_truth.json")
        # Several processes may write the same file, so each one renames a complete copy.
        partial = f"{path}.{uuid.uuid4().hex}"
        with open(partial, "w", encoding="utf-8") as f:
            json.dump(truth, f)
        os.replace(partial, path)
        # detectron2 takes the file from the metadata and never lets an entry change, hence a
        # short-lived entry of its own; the evaluator keeps a reference to it.
        entry = f"{dataset}-{uuid.uuid4().hex}"
        MetadataCatalog.get(entry).set(
            thing_classes=classes, thing_dataset_id_to_contiguous_id=ids, json_file=path
        )
        try:
            return COCOEvaluator(entry, tasks=tasks, output_dir=output_dir)
        finally:
            MetadataCatalog.pop(entry)


def _coco_dict(records: list[dict], classes: list[str], category_ids: dict[int, int]) -> dict:
    """Records as the content of a COCO json; ids of annotations start with 1."""
    images, annotations = [], []
    for record in records:
        images.append({k: record[k] for k in ("file_name", "height", "width")})
        images[-1]["id"] = record["image_id"]
        for instance in record["annotations"]:
            mode = BoxMode(instance["bbox_mode"])
            x, y, w, h = BoxMode.convert(list(instance["bbox"]), mode, BoxMode.XYWH_ABS)
            segmentation = instance.get("segmentation")
            area = instance.get("area")
            if area is None and isinstance(segmentation, list):
                area = float(PolygonMasks([segmentation]).area()[0])
            elif area is None and segmentation is not None:
                area = float(mask_util.area(segmentation))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record["image_id"],
                "category_id": category_ids[instance["category_id"]],
                "bbox": [float(v) for v in (x, y, w, h)],
                "area": float(w * h) if area is None else area,
                "iscrowd": int(instance.get("iscrowd", 0)),
            }
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
                segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
            if segmentation is not None:
                annotation["segmentation"] = segmentation
            annotations.append(annotation)
    categories = [{"id": category_ids[i], "name": name} for i, name in enumerate(classes)]
    # loadRes of older pycocotools copies `info` and fails without it.
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


class _Readable:
    """A mapper whose failures to read an image name the file in one line."""

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict) -> Any:
        try:
            return self.mapper(record)
        except (OSError, SizeMismatchError) as e:
            reason = " ".join(str(e).split())
            raise UserError(
                f"cannot load image {record['file_name']} ({reason}): repair or leave out the file"
            ) from e


class _NumberedSampler(torch.utils.data.Sampler):
    """Pairs every index of a training sampler with its position in the stream of all processes."""

    def __init__(self, sampler: TrainingSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(itertools.count(comm.get_rank(), comm.get_world_size()), self.sampler)


class _SeededMap(torch.utils.data.Dataset):
    """Maps the record at ``(position, index)`` with randomness of ``(seed, position)`` alone."""

    def __init__(self, records: DatasetFromList, mapper: Callable, seed: int) -> None:
        self.records, self.mapper, self.seed = records, _Readable(mapper), seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        states = np.random.get_state(), random.getstate(), torch.default_generator.get_state()
        number = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        np.random.seed(number)
        random.seed(number)
        # Not torch.manual_seed, which would also reset the generators of the GPUs.
        torch.default_generator.manual_seed(number)
        try:
            for step in range(len(self)):
                mapped = self.mapper(self.records[(index + step) % len(self)])
                if mapped is not None:
                    return mapped
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
            torch.default_generator.set_state(states[2])
        raise UserError("the mapper returned None for every image of the dataset: correct it")
