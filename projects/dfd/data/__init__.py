"""Datasets: readers that register a name, and loaders and an evaluator that take one."""

from .catalog import DatasetReport
from .coco import coco_json
from .drawing import SHAPE_CLASSES
from .letterbox import Letterbox
from .loaders import (
    build_evaluator,
    build_test_loader,
    build_train_loader,
    skip_batches,
    stream_seed,
)
from .mosaic import MosaicMapper
from .mosaic_settings import closing_batch, in_batches
from .padding import MarkPadding
from .registered import class_names, dataset_dicts, dataset_report, registered_name
from .shapes import generated_shapes
from .two_sizes import TwoSizeMapper, size_ratio
from .voc import voc_folder

__all__ = [
    "SHAPE_CLASSES",
    "DatasetReport",
    "Letterbox",
    "MarkPadding",
    "MosaicMapper",
    "TwoSizeMapper",
    "build_evaluator",
    "build_test_loader",
    "build_train_loader",
    "class_names",
    "closing_batch",
    "coco_json",
    "dataset_dicts",
    "dataset_report",
    "generated_shapes",
    "in_batches",
    "registered_name",
    "size_ratio",
    "skip_batches",
    "stream_seed",
    "voc_folder",
]
