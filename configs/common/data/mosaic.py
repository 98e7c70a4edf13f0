"""YOLOX's data: mosaic, mixup and multi-scale in training, a letterbox in evaluation.

For any of the datasets beside this file, in a config:

    from ..common.data.coco import dataloader
    from ..common.data.mosaic import use_mosaic

    use_mosaic(dataloader)

The student's images are then set by dataloader.train.mapper: size (of training and evaluation),
sizes, mosaic_probability and so on, see dfd.data.MosaicMapper.
"""

from detectron2.config import LazyCall as L

from dfd.data import Letterbox, MosaicMapper, closing_batch, in_batches

_accumulation = "${train.accumulation_steps}"


def use_mosaic(dataloader, size=640, sizes=tuple(range(480, 801, 32)), **settings):
    """Turn the loaders of a config into YOLOX's, in place.

    Args:
        size: side of the pictures.
        sizes: of training, of which every 10 iterations have one.
        settings: others of MosaicMapper.
    """
    train, test = dataloader.train, dataloader.test
    train.mapper = L(MosaicMapper)(
        size=size,
        image_format=train.mapper.image_format,
        sizes=list(sizes),
        size_period=L(in_batches)(iterations=10, accumulation_steps=_accumulation),
        # A share of the run; the learning rate's schedule has the same.
        off_from_batch=L(closing_batch)(
            max_iter="${train.max_iter}", closing=15 / 300, accumulation_steps=_accumulation
        ),
        **settings,
    )
    train.aspect_ratio_grouping = False
    test.mapper.augmentations = [L(Letterbox)(size="${dataloader.train.mapper.size}")]


def use_milder_mosaic(dataloader, size=416, sizes=tuple(range(320, 641, 32)), **settings):
    """As ``use_mosaic``, without mixup and with less change of scale: YOLOX-tiny's, and with
    mosaic_probability=0.5 YOLOX-nano's."""
    use_mosaic(
        dataloader, size, sizes, **{"scale": (0.5, 1.5), "mixup_probability": 0.0, **settings}
    )


def use_small_mosaic(dataloader):
    """For short runs on small pictures: a mosaic in half of them."""
    use_milder_mosaic(dataloader, size=224, sizes=(192, 224, 256), mosaic_probability=0.5)
