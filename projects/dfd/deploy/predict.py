"""Detect objects on images, folders and videos with the student of a finished run.

    dfd predict --run output/bccd/dfd --out output/predictions photos/ more/1.jpg film.mp4

Writes detections.json to --out (images, annotations with scores, categories: COCO's form, boxes as
x, y, width, height in pixels) and every image with its boxes to --out/images. A file that cannot be
read is named at the end and passed over; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances

from ..engine.console import LiveLine, say, stop_on_signals
from ..engine.run_folder import load_runs
from ..engine.state.files import whole_file
from ..errors import UserError
from .command import ending_in_one_line, make_folder, run_parser
from .draw import Boxes, draw_boxes
from .inputs import Source, UnreadableError, find_sources, read_frames
from .student import FINAL, Student, load_student

DETECTIONS, PICTURES = "detections.json", "images"
_LINE_EVERY = 15.0


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


def predict(
    student: Student,
    sources: Iterable[Source],
    out: Path,
    *,
    score: float = 0.3,
    every: int = 1,
    pictures: bool = True,
) -> dict[str, str]:
    """Detect on every source and write the results to a new folder.

    Args:
        score: the lowest of a detection that is kept.
        every: of a video each so many-th frame.
        pictures: whether to draw them.

    Returns:
        Why a source could not be read, by its path.
    """
    sources = list(sources)
    found, unreadable = Predictions(student.classes), {}
    live = LiveLine(line_every=_LINE_EVERY)
    try:
        for number, source in enumerate(sources):
            try:
                for name, image in read_frames(source, student.image_format, every):
                    boxes = _boxes(student(image), score)
                    found.add(name, image, boxes)
                    if pictures:
                        rgb = image if student.image_format == "RGB" else image[..., ::-1]
                        _write_picture(out / PICTURES / name, rgb, boxes, student.classes)
                    frames = len(found.content["images"])
                    live.update(f"{number} of {len(sources)} files, {frames} images")
            except UnreadableError as error:
                unreadable[str(source.path)] = str(error)
    finally:
        # What was found is kept, also if this is interrupted.
        live.clear()
        with whole_file(out / DETECTIONS) as f:
            json.dump(found.content, f)  # A name on disk may be no text, which ASCII can say.
    say(
        f"{len(found.content['annotations'])} detections on {len(found.content['images'])} images: "
        f"{out / DETECTIONS}"
    )
    return unreadable


def _boxes(instances: Instances, score: float) -> Boxes:
    kept = instances[instances.scores >= score]
    return Boxes(kept.pred_boxes.tensor.numpy(), kept.pred_classes.tolist(), kept.scores.tolist())


def _write_picture(path: Path, image: np.ndarray, boxes: Boxes, classes: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The whole name is kept: a.png and a.tif are two images.
    path.with_name(f"{path.name}.jpg").write_bytes(
        draw_boxes(np.ascontiguousarray(image), boxes, classes, largest=None)
    )


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
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: it exists and is not empty: choose another")
        if args.exported and (args.weights != FINAL or args.device not in ("auto", "cpu")):
            raise UserError(
                f"--exported {args.exported} has its own weights and runs on the CPU: leave out "
                "--weights and --device"
            )
        sources = find_sources(args.inputs)
        (run,) = load_runs({"run": args.run}, trusted=args.trust_code)
        student = load_student(
            run, weights=args.weights, device=args.device, exported=args.exported
        )
        make_folder(out, "--out")
        unreadable = predict(
            student,
            sources,
            out,
            score=args.score,
            every=args.every,
            pictures=not args.no_images,
        )
    for path, reason in unreadable.items():
        print(f"passed over: {path}: {reason}", file=sys.stderr)
    if unreadable:
        sys.exit(1)
