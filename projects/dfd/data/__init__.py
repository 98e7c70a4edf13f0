"""Datasets: readers that register a name, and loaders and an evaluator that take one."""

from dfd.data.catalog import DatasetReport
from dfd.data.coco import coco_json
from dfd.data.drawing import SHAPE_CLASSES
from dfd.data.loaders import (
    build_evaluator,
    build_test_loader,
    build_train_loader,
    class_names,
    dataset_dicts,
)
from dfd.data.shapes import generated_shapes
from dfd.data.voc import voc_folder

__all__ = [
    "SHAPE_CLASSES",
    "DatasetReport",
    "build_evaluator",
    "build_test_loader",
    "build_train_loader",
    "class_names",
    "coco_json",
    "dataset_dicts",
    "generated_shapes",
    "voc_folder",
]
