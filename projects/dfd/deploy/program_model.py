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
from torch import Tensor, nn

from ..errors import UserError, first_line
from .exported import ExportedModel

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


class ProgramModel(ExportedModel):
    """A ``.pt2`` file of ``dfd export``, for images of its ``height`` and ``width``."""

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
            self.metadata = json.loads(told[_TOLD])
        except Exception as error:  # torch raises whatever it meets.
            raise UserError(
                f"{where}: it is no program of dfd export ({first_line(error)})"
            ) from error

    def _run(self, image: Tensor) -> Sequence[Tensor]:
        height, width = image.shape[-2:]
        if (height, width) != (self.metadata["height"], self.metadata["width"]):
            raise UserError(
                f"an image of {height} x {width} pixels, and the program is of "
                f"{self.metadata['height']} x {self.metadata['width']}: resize it"
            )
        return self.module(image)
