"""An exported student in onnxruntime, called as a detector is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances

from ..errors import UserError, first_line


def onnx_or_error(package: str) -> ModuleType:
    """
    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed: pip install onnx onnxruntime (or dfd[export])"
        ) from error


class OnnxModel:
    """What ``dfd export`` wrote, called with Detectron2's batches and in its form, on the CPU."""

    def __init__(self, graph: bytes | str | os.PathLike, threads: int | None = None) -> None:
        """
        Args:
            graph: the file's content, or its path.
            threads: of onnxruntime; None: torch's number.

        Raises:
            UserError: there is no such file, or it is not of ``dfd export``.
        """
        runtime = onnx_or_error("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.log_severity_level = 3  # Errors.
        where = "the exported graph" if isinstance(graph, bytes) else os.fspath(graph)
        if not isinstance(graph, bytes):
            if not os.path.isfile(graph):
                raise UserError(f"{where}: no such file")
            graph = os.fspath(graph)
        try:
            self.session = runtime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a class for each of its codes.
            raise UserError(f"{where}: onnxruntime cannot load it: {first_line(error)}") from error
        names = [output.name for output in self.session.get_outputs()]
        # What dfd export said of the student: classes and augmentations as json, image_format,
        # weights_sha256.
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        if names != ["boxes", "scores", "classes"] or "classes" not in self.metadata:
            raise UserError(f"{where} was not written by dfd export")

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batch: one dict an image: ``image`` (3,height,width) uint8; ``height`` and ``width``
                that the boxes are scaled to, its own by default.
        """
        results = []
        for item in batch:
            image = item["image"]
            size = tuple(image.shape[-2:])
            try:
                outputs = self.session.run(None, {"image": image.cpu().numpy()})
            except Exception as error:  # onnxruntime has a class for each of its codes.
                raise UserError(
                    f"the exported graph fails on an image of {size[0]} x {size[1]} pixels: "
                    f"{first_line(error)}"
                ) from error
            boxes, scores, classes = (torch.from_numpy(value) for value in outputs)
            found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            height, width = item.get("height", size[0]), item.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results
