"""A student exported by ``torch.export``, called as a detector is."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision  # noqa: F401  Whose operators the program calls.
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from ..errors import UserError, first_line

_TOLD = "dfd.json"


def save_program(module: nn.Module, image: torch.Tensor, told: Mapping[str, Any]) -> bytes:
    """The content of a ``.pt2`` file.

    Args:
        module: from (3,height,width) uint8 to boxes, scores and classes.
        image: an example.
        told: kept beside it, as json.
    """
    with torch.no_grad():
        program = torch.export.export(module.eval(), (image,), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={_TOLD: json.dumps(told)})
    return file.getvalue()


def program_size(path: str) -> tuple[int, int]:
    """Height and width of a ``.pt2`` file's images; its network, which takes memory, stays there.

    Raises:
        UserError: there is no such file, or it is not of ``dfd export``.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(f"/{_TOLD}"))
            told = json.loads(archive.read(name))
        return told["height"], told["width"]
    except Exception as error:  # It may be anything.
        raise UserError(f"{path}: it is no program of dfd export ({first_line(error)})") from error


class ProgramModel:
    """A ``.pt2`` file of ``dfd export``, called with Detectron2's batches, on the CPU."""

    def __init__(self, program: bytes | str | os.PathLike) -> None:
        """
        Args:
            program: the file's content, or its path.

        Raises:
            UserError: there is no such file, or it is not of ``dfd export``.
        """
        where = "the exported program" if isinstance(program, bytes) else os.fspath(program)
        if not isinstance(program, bytes) and not os.path.isfile(program):
            raise UserError(f"{where}: no such file")
        source = io.BytesIO(program) if isinstance(program, bytes) else os.fspath(program)
        told = {_TOLD: ""}
        try:
            self.module = torch.export.load(source, extra_files=told).module()
            # Classes, image_format, height, width and weights_sha256.
            self.metadata: dict[str, Any] = json.loads(told[_TOLD])
        except Exception as error:  # torch raises whatever it meets.
            raise UserError(
                f"{where}: it is no program of dfd export ({first_line(error)})"
            ) from error

    @torch.no_grad()
    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batch: as of ``OnnxModel``; images of the program's height and width.

        Raises:
            UserError: an image has another size.
        """
        results = []
        for item in batch:
            image = item["image"].cpu()
            size = tuple(image.shape[-2:])
            if size != (self.metadata["height"], self.metadata["width"]):
                raise UserError(
                    f"an image of {size[0]} x {size[1]} pixels, and the program is of "
                    f"{self.metadata['height']} x {self.metadata['width']}: resize it"
                )
            boxes, scores, classes = self.module(image)
            found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            height, width = item.get("height", size[0]), item.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results
