"""YOLOX's training images: mosaic and mixup of several, in sizes that change over the run."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.structures import Boxes, BoxMode, Instances
from torch.utils.data import get_worker_info

from ...distill.contract import UNLABELLED
from ...errors import UserError
from ...ranges import check_choice, check_count, check_number, check_probability, check_range
from ..images import ReadableMapper
from ..records import name_of
from .pixels import Affine, Photo, Picture, letterboxed, mixed, mosaic
from .settings import check_gains, check_size, check_sizes

logger = logging.getLogger(__name__)

_LEAST_SIDE = 1.0  # Pixels of a box; what is not larger is dropped.


class MosaicMapper:
    """A mapper for training that makes one picture of several images, as YOLOX's recipe does.

    In the order of its steps: a mosaic of the record's image and three others; mixup with one more
    that has objects; HSV jitter; flip; boxes of at most one pixel dropped; the picture resized to
    the size of the batch. An image that is in no mosaic is resized to fit and lies in the top left
    corner, after jitter and flip. If all boxes would be dropped, it is the record's image that is
    taken so, with all of its boxes, neither jittered nor flipped. Crowds and annotations whose
    ``area`` is not above 0 are no objects.

    Its records have ``image`` (3,S,S) uint8, ``instances`` with ``gt_boxes`` and ``gt_classes``
    (no masks, no keypoints), ``valid`` (S,S) bool, and ``file_name``, ``image_id``, ``height`` and
    ``width`` of the record. ``valid`` is True where a pixel is one of a photograph: not on fill,
    not on a seam or beside one, and after mixup only where both images are.

    ``build_train_loader`` gives it the records to choose from (``bind``) and tells it the batch
    (``at_batch``). It draws from numpy's generator; the size follows the seed and the batch.
    """

    # It tells which pixels are real; see MarkPadding.
    marks_padding = True
    # It makes no masks and no keypoints.
    boxes_only = True

    def __init__(
        self,
        *,
        size: int = 640,
        image_format: str = "BGR",
        mosaic_probability: float = 1.0,
        rotation: float = 10.0,
        translation: float = 0.1,
        scale: Sequence[float] = (0.1, 2.0),
        shear: float = 2.0,
        mixup_probability: float = 1.0,
        mixup_scale: Sequence[float] = (0.5, 1.5),
        hsv_probability: float = 1.0,
        hsv_gains: Sequence[float] = (5, 30, 30),
        flip_probability: float = 0.5,
        off_from_batch: int | None = None,
        sizes: Sequence[int] | None = None,
        size_period: int = 10,
    ) -> None:
        """
        Args:
            size: side of the picture in which everything is done, in pixels, a multiple of 32.
            image_format: order of the channels, BGR or RGB.
            mosaic_probability: of a mosaic.
            rotation: of the mosaic, degrees to either side.
            translation: of the mosaic, share of the side to either side.
            scale: of the mosaic, from and to. YOLOX-nano and -tiny have (0.5, 1.5).
            shear: of the mosaic, degrees to either side.
            mixup_probability: of mixup, for a mosaic with objects; nothing else is mixed.
            mixup_scale: of the second image, from and to, against the one that fits.
            hsv_probability: of HSV jitter.
            hsv_gains: hue (of 180), saturation and value (of 255): the most by which each moves.
            flip_probability: of exchanging left and right.
            off_from_batch: from this batch on there is neither mosaic nor mixup; None: never.
            sizes: multiples of 32, of which each ``size_period`` batches have one, from some not
                above ``size`` to some not below it; None: ``size``.
            size_period: in batches, which are more than iterations under gradient accumulation.

        Raises:
            UserError: a value is outside its range.
        """
        self.size = check_size("MosaicMapper.size", size)
        self.image_format = check_choice("MosaicMapper.image_format", image_format, ("BGR", "RGB"))
        self.affine = Affine(
            rotation=check_number("MosaicMapper.rotation", rotation),
            translation=check_number("MosaicMapper.translation", translation),
            scale=check_range("MosaicMapper.scale", scale),
            shear=check_number("MosaicMapper.shear", shear, 0, 89),
        )
        self.mosaic_probability, self.mixup_probability, self.hsv_probability = (
            check_probability(f"MosaicMapper.{name}_probability", value)
            for name, value in (
                ("mosaic", mosaic_probability),
                ("mixup", mixup_probability),
                ("hsv", hsv_probability),
            )
        )
        self.flip_probability = check_probability("MosaicMapper.flip_probability", flip_probability)
        if self.mixup_probability and not self.mosaic_probability:
            raise UserError(
                "MosaicMapper: mixup is of mosaics, and mosaic_probability is 0: set "
                "mixup_probability=0 too"
            )
        self.mixup_scale = check_range("MosaicMapper.mixup_scale", mixup_scale)
        self.hsv_gains = check_gains("MosaicMapper.hsv_gains", hsv_gains)
        self.off_from_batch = off_from_batch
        if off_from_batch is not None:
            check_count("MosaicMapper.off_from_batch", off_from_batch, 0)
        self.sizes = None if sizes is None else check_sizes("MosaicMapper.sizes", sizes)
        if self.sizes and not min(self.sizes) <= self.size <= max(self.sizes):
            raise UserError(
                f"MosaicMapper.size is {size}, that of evaluation, but sizes, those of training, "
                f"are {min(self.sizes)} to {max(self.sizes)}: set both"
            )
        self.size_period = check_count("MosaicMapper.size_period", size_period, 1)
        self._read = ReadableMapper(_ReadRGB())
        self._records: Sequence[dict] = ()
        self._labelled = np.zeros(0, np.int64)
        self._seed, self._batch = 0, 0

    def bind(self, records: Sequence[dict], seed: int) -> None:
        """Take a dataset's records, to choose images from, and the seed of a stream.

        Raises:
            UserError: there is to be mixup, and no record has an object.
        """
        self._records, self._seed = records, seed
        without_area, labelled = [], []
        for i, record in enumerate(records):
            objects = _objects(record)
            there = [a for a in objects if _has_area(a)]
            labelled += [i] if there else []
            without_area += [name_of(record)] * (len(objects) - len(there))
        self._labelled = np.array(labelled, np.int64)
        if without_area:
            logger.warning(
                "annotations that MosaicMapper leaves out, of an area not above 0: %d, e.g. in %s",
                len(without_area),
                without_area[0],
            )
        unlabelled = all(record.get(UNLABELLED) for record in records)  # And so never mixed.
        if self.mixup_probability and not labelled and not unlabelled:
            raise UserError(
                f"MosaicMapper: none of the {len(records)} images has an object, and the second "
                "image of mixup must have one: correct the annotations, or set mixup_probability=0"
            )

    def at_batch(self, number: int) -> None:
        """Take notice that the next record is one of this batch of the stream, from 0."""
        self._batch = number

    def __call__(self, record: dict) -> dict:
        """
        Raises:
            UserError: an image cannot be read, or there are no records to choose others from.
        """
        if get_worker_info() is not None:
            cv2.setNumThreads(0)  # The threads of the process that it was forked from are not here.
        photo = self._photo(record)
        picture = self._augmented(photo)
        kept = (picture.boxes[:, 2:] - picture.boxes[:, :2]).min(axis=1, initial=np.inf)
        if (kept > _LEAST_SIDE).any() or not len(kept):
            picture = picture.kept(kept > _LEAST_SIDE)
        else:
            picture = letterboxed(photo.fitted(self.size), self.size)
        side = self._side()
        if side != self.size:
            picture = picture.resized(side, side)
        return self._mapped(record, picture)

    def _augmented(self, photo: Photo) -> Picture:
        is_on = self.off_from_batch is None or self._batch < self.off_from_batch
        if not (is_on and _happens(self.mosaic_probability)):
            return letterboxed(self._recoloured_and_flipped(photo.fitted(self.size)), self.size)
        if not len(self._records):
            raise UserError(
                "MosaicMapper has no other images to make a mosaic of: use it in "
                "dfd.data.build_train_loader, or call its bind"
            )
        others = [self._photo(self._records[int(i)]) for i in self._draw(len(self._records), 3)]
        photos = [p.fitted(self.size) for p in (photo, *others)]
        picture = mosaic(photos, self.size, self.affine)
        if len(picture.boxes) and _happens(self.mixup_probability):
            (i,) = self._draw(len(self._labelled), 1)
            second = self._photo(self._records[int(self._labelled[i])])
            scale = np.random.uniform(*self.mixup_scale)
            picture = mixed(picture, second, scale, flip=_happens(0.5))
        return self._recoloured_and_flipped(picture)

    def _recoloured_and_flipped(self, photo: Any) -> Any:
        if _happens(self.hsv_probability):
            photo = photo.recoloured(self.hsv_gains)
        return photo.flipped() if _happens(self.flip_probability) else photo

    @staticmethod
    def _draw(number: int, count: int) -> np.ndarray:
        """With replacement, so that one image is enough."""
        return np.random.randint(0, number, count)

    def _side(self) -> int:
        """The size of the batch, the same for all of its images and in all processes."""
        if self.sizes is None:
            return self.size
        period = self._batch // self.size_period
        drawn = np.random.SeedSequence(self._seed, spawn_key=(period,)).generate_state(1)[0]
        return self.sizes[int(drawn) % len(self.sizes)]

    def _photo(self, record: dict) -> Photo:
        """A record's image and objects."""
        image = self._read(record)
        height, width = image.shape[:2]
        objects = [a for a in _objects(record) if _has_area(a)]
        boxes = _corners(objects).clip(0, [width, height, width, height])
        classes = np.array([a["category_id"] for a in objects], np.int64)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return Photo(image, boxes[seen], classes[seen])

    def _mapped(self, record: dict, picture: Picture) -> dict:
        planes = cv2.split(picture.image)
        planes = planes[::-1] if self.image_format == "BGR" else planes
        instances = Instances(picture.image.shape[:2])
        instances.gt_boxes = Boxes(torch.from_numpy(picture.boxes.astype(np.float32)))
        instances.gt_classes = torch.from_numpy(picture.classes)
        return {
            **{k: record[k] for k in ("file_name", "image_id", "height", "width") if k in record},
            "image": torch.from_numpy(np.stack(planes)),
            "instances": instances,
            "valid": torch.from_numpy(picture.real.astype(bool)),
        }


class _ReadRGB:
    """A mapper to an image's pixels, (H,W,3) uint8; sets the record's size if it has none."""

    image_format = "RGB"

    def __call__(self, record: dict) -> np.ndarray:
        image = read_image(record["file_name"], self.image_format)
        check_image_size(record, image)
        return image


def _happens(probability: float) -> bool:
    return np.random.uniform() < probability


def _objects(record: dict) -> list[dict]:
    return [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]


def _corners(objects: Sequence[dict]) -> np.ndarray:
    """(N,4) x0, y0, x1, y1 of their boxes; all at once if they are given alike, as most are."""
    modes = {a["bbox_mode"] for a in objects}
    if len(modes) > 1:
        return np.concatenate([_corners([a]) for a in objects])
    if not modes:
        return np.zeros((0, 4))
    boxes = np.array([a["bbox"] for a in objects], np.float64)
    return BoxMode.convert(boxes, modes.pop(), BoxMode.XYXY_ABS)


def _has_area(annotation: dict) -> bool:
    """Whether its own area, if it has one, is above 0."""
    area = annotation.get("area")
    return not isinstance(area, numbers.Real) or area > 0
