"""An exported student in onnxruntime, called as a detector is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UserError, first_line
from .exported import ExportedModel


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


class OnnxModel(ExportedModel):
    """An ``.onnx`` file of ``dfd export``."""

    def __init__(self, graph: bytes | str | os.PathLike) -> None:
        """
        Args:
            graph: the file's content, or its path.

        Raises:
            UserError: there is no such file, or it is not of ``dfd export``.
        """
        runtime = onnx_or_error("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
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
        # Classes and augmentations as json, image_format and weights_sha256.
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        if names != ["boxes", "scores", "classes"] or "classes" not in self.metadata:
            raise UserError(f"{where} was not written by dfd export")

    def _run(self, image: Tensor) -> Sequence[Tensor]:
        try:
            outputs = self.session.run(None, {"image": image.numpy()})
        except Exception as error:  # onnxruntime has a class for each of its codes.
            height, width = image.shape[-2:]
            raise UserError(
                f"the exported graph fails on an image of {height} x {width} pixels: "
                f"{first_line(error)}"
            ) from error
        return [torch.from_numpy(value) for value in outputs]
