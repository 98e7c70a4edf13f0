"""Export the student of a finished run to a file that gives the same detections.

    dfd export --run output/bccd/dfd --out student.onnx
    dfd export --run output/bccd/dfd --out student.pt2 --size 160 213

The network with everything after it (decoding, suppression), for one image: as ONNX of any size, as
a program of torch.export of one size. The file is checked before it is written: it must find on
photographs what the student finds. Those are of the run's test data, or --images. docs/deploy.md
tells how to use it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.structures import Instances
from torch import Tensor, nn

from ..engine.console import ending_in_one_line, say, stop_on_signals
from ..engine.run_folder import load_runs
from ..engine.state.files import whole_file
from ..errors import UserError, first_line
from .agreement import Agreement, compare
from .command import (
    add_images,
    is_there,
    make_folder,
    run_parser,
    writing,
)
from .exported import ExportedModel
from .fixed_size import fixed_size
from .inputs import photographs
from .onnx_model import OnnxModel, onnx_or_error
from .program_model import ProgramModel, save_program
from .student import Student, load_student

# The first with deformable convolutions.
OPSET = 19
OUTPUTS = ("boxes", "scores", "classes")


class _OneImage(nn.Module):
    """A detector as a function of one image's tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (result,) = self.model([{"image": image}])
        found: Instances = result["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


def export_onnx(student: Student, example: np.ndarray) -> bytes:
    """The student's network as an ONNX graph.

    Its input ``image`` is (3,height,width) uint8, resized and in the student's channel order; its
    outputs are ``boxes`` (D,4) XYXY in pixels of that, ``scores`` (D,) and ``classes`` (D,).

    Args:
        example: (height, width, 3) uint8 in ``student.image_format``: the graph is traced with it.

    Raises:
        UserError: the packages are not there, or the model cannot be traced.
    """
    onnx = onnx_or_error("onnx")
    model = _OneImage(_boxes_alone(student.model)).eval()
    pixels = student.pixels(example).to(next(model.parameters()).device)
    try:
        with torch.no_grad(), _quiet(), _deformable(), patch_builtin_len():
            graph = _to_bytes(model, pixels)
    except UserError:
        raise
    except Exception as error:  # The exporter raises whatever it meets.
        raise UserError(
            f"{type(student.model).__name__} cannot be exported: {first_line(error)}"
        ) from error
    loaded = onnx.load_from_string(graph)
    onnx.checker.check_model(loaded)
    told = {
        "classes": json.dumps(list(student.classes), ensure_ascii=False),
        "image_format": student.image_format,
        "augmentations": json.dumps(student.described),
        **_origin(student),
    }
    for key, value in told.items():
        entry = loaded.metadata_props.add()
        entry.key, entry.value = key, value
    return loaded.SerializeToString()


def _origin(student: Student) -> dict[str, str]:
    """What tells the file from that of another run, whose detector may be built the same."""
    return {"weights_sha256": student.weights_sha256} if student.weights_sha256 else {}


def _boxes_alone(model: nn.Module) -> nn.Module:
    """Masks and keypoints are left out: the graph's outputs are boxes."""
    heads = getattr(model, "roi_heads", None)
    for name in ("mask_on", "keypoint_on"):
        if getattr(heads, name, False):
            say(f"note: {name.removesuffix('_on')}s are left out; the file gives boxes alone")
            setattr(heads, name, False)
    return model


def _to_bytes(model: nn.Module, pixels: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(
        model,
        (pixels,),
        file,
        opset_version=OPSET,
        # The exporter over torch.export fixes what depends on data and has no deformable
        # convolution; Detectron2's models are written to be traced.
        dynamo=False,
        input_names=["image"],
        output_names=list(OUTPUTS),
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "detections"} for name in OUTPUTS},
        },
    )
    return file.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracing says of Detectron2's code, which the check of the file stands for.

    Nor the graph of a model that cannot be exported, half a megabyte of it, before the error: torch
    means to print it on request alone, and asks a function's name where it should call it.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    silent = mock.patch.object(torch._C, "_jit_onnx_log", lambda *args: None, create=True)
    with warnings.catch_warnings(), silent:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _deformable() -> Iterator[None]:
    """Deformable convolutions as ONNX has them; torchvision registers its other operators."""
    name = "torchvision::deform_conv2d"
    torch.onnx.register_custom_op_symbolic(name, _deform_conv, OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic(name, OPSET)


def _deform_conv(g, x, weight, offset, mask, bias, *settings):  # type: ignore[no-untyped-def]
    from torch.onnx.symbolic_helper import _maybe_get_const

    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups, masked = (
        _maybe_get_const(value, "i") for value in settings
    )
    return g.op(
        "DeformConv",
        *(x, weight, offset, bias, *([mask] if masked else [])),
        strides_i=[stride_h, stride_w],
        pads_i=[pad_h, pad_w, pad_h, pad_w],
        dilations_i=[dilation_h, dilation_w],
        group_i=groups,
        offset_group_i=offset_groups,
    )


def export_program(student: Student, height: int, width: int) -> bytes:
    """The student's network as a program of ``torch.export``, for images of one size.

    Args:
        height, width: of the images as the network sees them.

    Raises:
        UserError: it is a detector that is not exported so, or does not take this size.
    """
    model = fixed_size(_boxes_alone(student.model), height, width)
    told = {
        "classes": list(student.classes),
        "image_format": student.image_format,
        "height": height,
        "width": width,
        **_origin(student),
    }
    try:
        with _quiet():
            return save_program(model, torch.zeros(3, height, width, dtype=torch.uint8), told)
    except Exception as error:  # torch.export raises whatever it meets.
        raise UserError(
            f"{type(student.model).__name__} cannot be exported: {first_line(error)}"
        ) from error


def export(
    student: Student,
    images: Sequence[np.ndarray],
    out: Path,
    size: tuple[int, int] | None = None,
) -> Agreement:
    """Write the student to a file, ``.onnx`` or ``.pt2``, once it gives the same detections there.

    Args:
        images: (height, width, 3) uint8 in the student's order, to check with; every second one is
            turned by 90 degrees, so that both orientations are.
        size: height and width of a ``.pt2`` program's images; None: that of the first image.

    Raises:
        UserError: it cannot be exported, or its detections differ; nothing is written then.
    """
    if out.suffix == ".pt2":
        height, width = size or tuple(student.pixels(images[0]).shape[-2:])
        student = student.of_size(height, width)
        if squashed := sum(student.squashes(image) for image in images):
            say(
                f"note: {squashed} of {len(images)} photographs have another ratio than {height} x "
                f"{width} pixels: the program sees such ones squashed, the student does not"
            )
        graph = export_program(student, height, width)
        exported: ExportedModel = ProgramModel(graph)
    else:
        graph = export_onnx(student, images[0])
        exported = OnnxModel(graph)
    turned = [np.rot90(x).copy() if i % 2 else x for i, x in enumerate(images)]
    agreement = compare(student, student.with_model(exported), turned)
    if agreement.unmatched:
        raise UserError(
            f"what was exported gives other detections: {agreement.unmatched} of "
            f"{agreement.detections} on {len(images)} images have no equal, so {out} is not "
            "written"
        )
    if not agreement.detections:
        say("note: nothing was detected on these images, so the check shows little")
    with writing(out), whole_file(out, "wb") as f:
        f.write(graph)
    return agreement


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = run_parser("export", __doc__)
    add = parser.add_argument
    path = {"type": os.path.expanduser}
    add("--out", **path, required=True, metavar="FILE", help="a new file, NAME.onnx or NAME.pt2")
    size = {"nargs": 2, "type": int, "metavar": ("HEIGHT", "WIDTH")}
    add("--size", **size, help="of a .pt2 program's images (default: the first image's)")
    add_images(parser, 16)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    stop_on_signals()
    with ending_in_one_line():
        out = Path(args.out)
        if out.suffix not in (".onnx", ".pt2"):
            raise UserError(f"--out {out}: its name must end with .onnx or .pt2")
        if args.size and (out.suffix != ".pt2" or min(args.size) < 1):
            raise UserError(
                f"--size {args.size[0]} {args.size[1]}: it must be two sides in pixels, of a .pt2 "
                "program; an .onnx file takes any"
            )
        if is_there(out, "--out"):
            raise UserError(f"--out {out}: it exists: choose another")
        if args.num_images < 1:
            raise UserError(f"--num-images {args.num_images}: it must be 1 or more")
        for package in ("onnx", "onnxruntime") if out.suffix == ".onnx" else ():
            onnx_or_error(package)
        (run,) = load_runs({"run": args.run}, trusted=args.trust_code)
        student = load_student(run, weights=args.weights, device="cpu")
        images = photographs(run, student.image_format, args.images, args.num_images)
        make_folder(out.parent, "--out")
        agreement = export(student, images, out, tuple(args.size) if args.size else None)
    say(
        f"{out}: {out.stat().st_size / 2**20:.1f} MiB; the same {agreement.detections} detections "
        f"on {len(images)} images (boxes within {agreement.boxes:.2g} pixels, scores within "
        f"{agreement.scores:.2g})"
    )
