"""Detect objects on images, folders and videos with the student of a finished run.

    dfd predict --run output/bccd/dfd --out output/predictions photos/ more/1.jpg film.mp4

Writes detections.json to --out (images, annotations with scores, categories: COCO's form, boxes as
x, y, width, height in pixels) and every image with its boxes to --out/images. A file that cannot be
read, or whose picture cannot be drawn, is named at the end; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances

from ..engine.console import LiveLine, ending_in_one_line, say, stop_on_signals
from ..engine.run_folder import load_runs
from ..engine.state.files import whole_file
from ..errors import UserError, first_line
from .command import (
    is_there,
    make_folder,
    run_parser,
    usable_device,
    writing,
)
from .draw import Boxes, draw_boxes
from .inputs import Source, find_sources, read_frames
from .student import Student, load_student

DETECTIONS, PICTURES = "detections.json", "images"
_LINE_EVERY = 15.0
# Where one picture does not fit, the next ones do not.
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Predictions:
    """What is found, in COCO's form; ids of images and annotations count from 1."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
        }

    def add(self, name: str, image: np.ndarray, boxes: Boxes) -> None:
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = image.shape[:2]
        images.append({"id": len(images) + 1, "file_name": name, "height": height, "width": width})
        for box, kind, score in zip(boxes.boxes, boxes.classes, boxes.scores, strict=True):
            x0, y0, x1, y1 = (round(float(v), 2) for v in box)
            w, h = round(x1 - x0, 2), round(y1 - y0, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": kind + 1,
                    "bbox": [x0, y0, w, h],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                    "score": round(score, 5),
                }
            )


@dataclass
class Failures:
    """Why a source was passed over, and why one has no picture, by its path."""

    passed_over: dict[str, str] = field(default_factory=dict)
    not_drawn: dict[str, str] = field(default_factory=dict)


def predict(
    student: Student,
    sources: Iterable[Source],
    out: Path,
    *,
    score: float = 0.3,
    every: int = 1,
    pictures: bool = True,
) -> Failures:
    """Detect on every source and write the results to a new folder.

    Args:
        score: the lowest of a detection that is kept.
        every: of a video each so many-th frame.
        pictures: whether to draw them.

    Raises:
        UserError: the disk is full; what was found until then is kept if it can be.
    """
    sources = list(sources)
    found, failures = Predictions(student.classes), Failures()
    live, squashed = LiveLine(line_every=_LINE_EVERY), False
    try:
        for number, source in enumerate(sources):
            for name, image, instances in _detect(student, source, every, failures):
                boxes = _boxes(instances, score)
                found.add(name, image, boxes)
                if pictures and (why := _draw(out / PICTURES / name, image, boxes, student)):
                    failures.not_drawn.setdefault(str(source.path), why)
                if not squashed and student.squashes(image):
                    squashed = True
                    live.clear()
                    _tell_squashed(source)
                frames = len(found.content["images"])
                live.update(f"{number} of {len(sources)} files, {frames} images")
    finally:
        # What was found is kept, also if this is interrupted.
        live.clear()
        with writing(out / DETECTIONS), whole_file(out / DETECTIONS) as f:
            json.dump(found.content, f)  # A name on disk may be no text, which ASCII can say.
    say(
        f"{len(found.content['annotations'])} detections on {len(found.content['images'])} images: "
        f"{out / DETECTIONS}"
    )
    return failures


def _detect(
    student: Student, source: Source, every: int, failures: Failures
) -> Iterator[tuple[str, np.ndarray, Instances]]:
    """Names, images and what is found on them, up to what cannot be read or is refused."""
    try:
        for name, image in read_frames(source, student.image_format, every):
            yield name, image, student(image)
    except UserError as error:
        failures.passed_over[str(source.path)] = str(error)


def _tell_squashed(source: Source) -> None:
    say(
        f"note: {source.path} has another ratio than the images of the exported program: it is "
        "squashed to theirs, and other things are found than by the student (told for the first "
        "such file)"
    )


def _boxes(instances: Instances, score: float) -> Boxes:
    kept = instances[instances.scores >= score]
    return Boxes(kept.pred_boxes.tensor.numpy(), kept.pred_classes.tolist(), kept.scores.tolist())


def _draw(path: Path, image: np.ndarray, boxes: Boxes, student: Student) -> str:
    """Write a picture; why there is none, empty if there is.

    Raises:
        UserError: the disk is full.
    """
    # The whole name is kept: a.png and a.tif are two images.
    path = path.with_name(f"{path.name}.jpg")
    rgb = np.ascontiguousarray(image if student.image_format == "RGB" else image[..., ::-1])
    try:
        picture = draw_boxes(rgb, boxes, student.classes, largest=None)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, "wb") as f:
            f.write(picture)
    except Exception as error:  # Of matplotlib, Pillow or the disk: the detections are there.
        if isinstance(error, OSError) and error.errno in _FULL:
            with writing(path):
                raise
        return getattr(error, "strerror", None) or first_line(error)
    return ""


def _tell_inside(out: Path, inputs: Sequence[str]) -> None:
    for given in inputs:
        if Path(os.path.expanduser(given)).resolve() in out.resolve().parents:
            say(
                f"note: --out {out} is inside {given}: the next dfd predict of that folder would "
                "read the pictures that are drawn now"
            )
            return


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = run_parser("predict", __doc__)
    add = parser.add_argument
    path = {"type": os.path.expanduser}
    add("inputs", nargs="+", metavar="FILE", help="an image, a video, or a folder of them")
    add("--out", **path, required=True, metavar="DIR", help="a new folder for the results")
    add("--exported", **path, metavar="FILE", help="its file of dfd export instead of the model")
    add("--score", type=float, default=0.3, help="lowest score of a detection (default: 0.3)")
    add("--every", type=int, default=1, metavar="N", help="of videos every N-th frame (default: 1)")
    add("--no-images", action="store_true", help="write detections.json alone")
    add("--device", default="auto", help="cpu, cuda (default: cuda where there is one)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    stop_on_signals()
    with ending_in_one_line():
        if not 0 <= args.score <= 1:
            raise UserError(f"--score {args.score}: it must be from 0 to 1")
        if args.every < 1:
            raise UserError(f"--every {args.every}: it must be 1 or more")
        if not args.exported:
            args.device = usable_device(args.device)
        out = Path(args.out)
        if is_there(out, "--out") and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: it exists and is not empty: choose another")
        if args.exported and args.device not in ("auto", "cpu"):
            raise UserError(f"--exported {args.exported} runs on the CPU: leave out --device")
        sources = find_sources(args.inputs)
        (run,) = load_runs({"run": args.run}, trusted=args.trust_code)
        student = load_student(
            run, weights=args.weights, device=args.device, exported=args.exported
        )
        make_folder(out, "--out")
        if not args.no_images:
            _tell_inside(out, args.inputs)
        failures = predict(
            student,
            sources,
            out,
            score=args.score,
            every=args.every,
            pictures=not args.no_images,
        )
    for path, reason in failures.passed_over.items():
        print(f"passed over: {path}: {reason}", file=sys.stderr)
    for path, reason in failures.not_drawn.items():
        print(f"not drawn: {path}: {reason}", file=sys.stderr)
    if failures.passed_over or failures.not_drawn:
        sys.exit(1)
