#!/usr/bin/env python
"""Compare this project's YOLOX with an ONNX export of the authors' on photographs.

    python tools/compare_yolox_onnx.py --onnx yolox_nano.onnx --images path/to/photographs

The export's weights are loaded into the YOLOX of its size, norms folded into convolutions included,
and both run on the same images. Printed are the largest differences of their outputs and how far
their detections agree. Needs onnx and onnxruntime (the extra "export").
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# torch's own about detectron2's calls; nothing that a user of a comparison can act on.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.structures import Instances, pairwise_iou  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dfd.deploy.onnx_model import onnx_or_error  # noqa: E402
from dfd.engine.console import ending_in_one_line  # noqa: E402
from dfd.errors import UserError, first_line  # noqa: E402
from dfd.modeling import YOLOX, named_yolox  # noqa: E402
from dfd.modeling.yolox import PRESETS  # noqa: E402
from dfd.modeling.yolox.blocks import BaseConv  # noqa: E402
from dfd.modeling.yolox.detections import detect  # noqa: E402
from dfd.modeling.yolox.detector import PAD_VALUE  # noqa: E402
from dfd.modeling.yolox.head import Grid, decode  # noqa: E402
from dfd.modeling.yolox.network import LEVELS  # noqa: E402

Folded = tuple[Tensor, Tensor | None]
# Where the export leaves the size of its images open.
_SIDE = 416


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    path = {"type": os.path.expanduser, "required": True}
    add("--onnx", **path, metavar="FILE", help="the export of a YOLOX")
    add("--images", **path, metavar="FOLDER", help="photographs, jpg or png")
    add("--num-images", type=int, default=20, help="the first so many by name (default: 20)")
    args = parser.parse_args()
    with ending_in_one_line():
        compare(args.onnx, args.images, args.num_images)


def compare(onnx_file: str, folder: str, num_images: int) -> None:
    onnx, runtime = onnx_or_error("onnx"), onnx_or_error("onnxruntime")
    images = list_images(folder, num_images)
    weights, folded = read_onnx(onnx, onnx_file)
    try:
        session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"--onnx: {onnx_file} does not run: {first_line(error)}") from error
    name, model = load(weights, folded, onnx_file)
    entry = session.get_inputs()[0]
    height, width = (v if isinstance(v, int) else _SIDE for v in entry.shape[2:4])
    report = Report()
    for path in images:
        image = letterbox(read_image(path), height, width)
        theirs = session.run(None, {entry.name: image[None].astype(np.float32)})[0]
        report.add(model, torch.from_numpy(image), torch.from_numpy(theirs).float())
    print(f"YOLOX-{name}, {model.num_classes} classes, {len(images)} images at {height} x {width}")
    report.print()


def list_images(folder: str, number: int) -> list[Path]:
    if number < 1:
        raise UserError(f"--num-images is {number}; it must be 1 or more")
    if not os.path.isdir(folder):
        raise UserError(f"--images: no such folder: {folder}")
    found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".png"))
    if not found:
        raise UserError(f"--images: there is no .jpg or .png in {folder}")
    return found[:number]


def read_image(path: Path) -> np.ndarray:
    """(height,width,3) BGR."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"--images: {path} is no readable image")
    return image


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(3,height,width) uint8: the image as large as it fits, at the top left, grey beyond it."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = int(image.shape[1] * scale), int(image.shape[0] * scale)
    canvas = np.full((height, width, 3), int(PAD_VALUE), dtype=np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1))


def read_onnx(onnx: Any, path: str) -> tuple[dict[str, Tensor], list[Folded]]:
    """All its weights by name, and those of its convolutions in the order in which they run."""
    if not os.path.isfile(path):
        raise UserError(f"--onnx: no such file: {path}")
    try:
        graph = onnx.load(path).graph
        weights = {
            entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy())
            for entry in graph.initializer
        }
    except Exception as error:
        raise UserError(f"--onnx: {path} is no ONNX model: {first_line(error)}") from error
    convolutions = [list(node.input) for node in graph.node if node.op_type == "Conv"]
    folded = [
        (weights[names[1]], weights[names[2]] if len(names) > 2 else None)
        for names in convolutions
        if names[1] in weights
    ]
    return weights, folded


def load(weights: Mapping[str, Tensor], folded: Sequence[Folded], path: str) -> tuple[str, YOLOX]:
    """The YOLOX that these are the weights of, with its name.

    Raises:
        UserError: they are of none.
    """
    shapes = [tuple(weight.shape) for weight, _ in folded]
    for name, preset in PRESETS.items():
        # From the end: objectness, box, the box's tower of two 3x3 convolutions, the classes.
        place = 3 + 2 * (2 if preset.get("depthwise") else 1)
        num_classes = shapes[-place][0] if len(shapes) >= place else 1
        with torch.device("meta"):
            model = named_yolox(name, num_classes=num_classes)
        if [tuple(conv.weight.shape) for conv, _ in convolutions(model)] == shapes:
            model = named_yolox(name, num_classes=num_classes).eval()
            fill(model, weights, folded)
            return name, model
    raise UserError(
        f"--onnx: {path} has {len(folded)} convolutions that are those of no YOLOX "
        f"({', '.join(PRESETS)})"
    )


def convolutions(model: YOLOX) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """In the order in which the authors' code runs them, each with its norm."""
    backbone, head = model.backbone, model.head
    trunk = backbone.backbone
    parts = [trunk.stem, trunk.dark2, trunk.dark3, trunk.dark4, trunk.dark5]
    parts += [backbone.lateral_conv0, backbone.C3_p4, backbone.reduce_conv1, backbone.C3_p3]
    parts += [backbone.bu_conv2, backbone.C3_n3, backbone.bu_conv1, backbone.C3_n4]
    for i in range(len(LEVELS)):
        parts += [head.stems[i], head.cls_convs[i], head.cls_preds[i]]
        parts += [head.reg_convs[i], head.reg_preds[i], head.obj_preds[i]]
    return [pair for part in parts for pair in _within(part)]


def _within(part: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    if isinstance(part, BaseConv):
        return [(part.conv, part.bn)]
    if isinstance(part, nn.Conv2d):
        return [(part, None)]
    children = dict(part.named_children())
    if "conv3" in children:  # That of a CSPLayer is made before its bottlenecks and runs after.
        children["conv3"] = children.pop("conv3")
    return [pair for child in children.values() for pair in _within(child)]


@torch.no_grad()
def fill(model: YOLOX, weights: Mapping[str, Tensor], folded: Sequence[Folded]) -> None:
    """Under their own names where the export keeps them all; else one convolution by the other."""
    expected = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    if all(key in weights for key in expected):
        model.load_state_dict({key: weights[key] for key in expected}, strict=False)
        return
    for (conv, norm), (weight, bias) in zip(convolutions(model), folded, strict=True):
        if bias is None:
            raise UserError("--onnx: it has convolutions without a bias: neither folded nor named")
        conv.weight.copy_(weight)
        if norm is None:
            conv.bias.copy_(bias)
            continue
        # A norm that only adds: what it divides by is what it multiplies with.
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        norm.bias.copy_(bias)


class Rows(NamedTuple):
    """What is printed of one comparison."""

    ours: int
    theirs: int
    common: int
    score: float
    box: float


class Report:
    def __init__(self) -> None:
        self.differences: list[Tensor] = []
        self.decoded: list[Tensor] = []
        self.rows: list[Rows] = []

    @torch.no_grad()
    def add(self, model: YOLOX, image: Tensor, theirs: Tensor) -> None:
        """
        Args:
            image: (3,height,width) uint8, BGR.
            theirs: (1,A,5+C): boxes, decoded or not, objectness and classes, as probabilities.
        """
        height, width = image.shape[-2:]
        predictions, grid = model.head(model.backbone(image[None].float()))
        chances = [predictions.objectness.sigmoid()[..., None], predictions.classes.sigmoid()]
        if theirs.shape[1:] != (len(grid.strides), 5 + model.num_classes):
            raise UserError(f"--onnx: its output is of shape {tuple(theirs.shape)}, no YOLOX's")
        raw = torch.cat([predictions.regression, *chances], dim=2)
        boxes = torch.cat([decode(predictions.regression, grid), *chances], dim=2)
        self.differences.append(_largest(raw, theirs))
        self.decoded.append(_largest(boxes, theirs))
        decoded = self.is_decoded()
        ours = model([{"image": image}])[0]["instances"]
        self.rows.append(
            agreement(ours, _their_detections(model, theirs[0], grid, decoded, (height, width)))
        )

    def is_decoded(self) -> bool:
        """Whether the export gives boxes in pixels: what it is nearer to."""
        return bool(self.decoded[0][0] < self.differences[0][0])

    def print(self) -> None:
        decoded = self.is_decoded()
        regression, rest = torch.stack(self.decoded if decoded else self.differences).amax(0)
        print(
            f"largest difference of the outputs: {'boxes' if decoded else 'raw boxes'} "
            f"{regression:.2g}, probabilities {rest:.2g}"
        )
        ours, theirs, common = (sum(row[i] for row in self.rows) for i in range(3))
        print(
            f"detections: {ours} here, {theirs} of the export, {common} in both, whose largest "
            f"differences are {max(row.score for row in self.rows):.2g} of score and "
            f"{max(row.box for row in self.rows):.2g} pixels"
        )


def _largest(ours: Tensor, theirs: Tensor) -> Tensor:
    """(2,): of the boxes' four numbers, and of the probabilities."""
    difference = (ours - theirs).abs()
    return torch.stack([difference[..., :4].max(), difference[..., 4:].max()])


def _their_detections(
    model: YOLOX, theirs: Tensor, grid: Grid, decoded: bool, size: tuple[int, int]
) -> Instances:
    return detect(
        theirs[:, :4] if decoded else decode(theirs[:, :4], grid),
        theirs[:, 4].logit(),
        theirs[:, 5:].logit(),
        size,
        score_thresh=model.score_thresh,
        nms_thresh=model.nms_thresh,
        max_detections=model.max_detections,
    )


def agreement(ours: Instances, theirs: Instances) -> Rows:
    """Detections of one class whose boxes overlap by 0.9 and whose scores differ by 0.01 at most
    are one in both."""
    if not len(ours) or not len(theirs):
        return Rows(len(ours), len(theirs), 0, 0.0, 0.0)
    score = (ours.scores[:, None] - theirs.scores[None]).abs()
    same = (ours.pred_classes[:, None] == theirs.pred_classes[None]) & (score <= 0.01)
    overlap = pairwise_iou(ours.pred_boxes, theirs.pred_boxes) * same
    best, index = overlap.max(dim=1)
    found = (best >= 0.9).nonzero().squeeze(1)
    if not len(found):
        return Rows(len(ours), len(theirs), 0, 0.0, 0.0)
    other = index[found]
    box = (ours.pred_boxes.tensor[found] - theirs.pred_boxes.tensor[other]).abs().max()
    common = len(other.unique())
    return Rows(len(ours), len(theirs), common, score[found, other].max().item(), box.item())


if __name__ == "__main__":
    main()
