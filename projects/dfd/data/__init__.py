"""Datasets: readers that register a name, and loaders and an evaluator that take one."""

from typing import Any

from .coco import coco_json
from .folder import image_folder
from .letterbox import Letterbox
from .loaders import (
    build_evaluator,
    build_test_loader,
    build_train_loader,
    skip_batches,
    stream_seed,
)
from .mosaic.mapper import MosaicMapper
from .mosaic.settings import closing_batch, in_batches
from .padding import MarkPadding
from .reader import DatasetReport
from .registered import class_names, dataset_dicts, dataset_report, registered_name
from .two_sizes import TwoSizeMapper, size_ratio
from .voc import voc_folder


def __getattr__(name: str) -> Any:
    """``generated_shapes`` once was here, and saved configs call it so."""
    if name == "generated_shapes":
        from ..demo import generated_shapes

        return generated_shapes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
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
    "image_folder",
    "in_batches",
    "registered_name",
    "size_ratio",
    "skip_batches",
    "stream_seed",
    "voc_folder",
]
