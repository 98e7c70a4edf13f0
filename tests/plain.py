"""A detector of which several processes must make the same as one, and its data and mapper.

It has no batch statistics, samples nothing, and its losses are means over images.
"""

import os
import signal
import time

import cv2
import numpy as np
import torch
from coco_files import CLASSES, write_json
from detectron2.data import DatasetMapper
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import nn

from dfd.errors import UserError


class TwoLevels(nn.Module):
    size_divisibility = 16
    padding_constraints = {}

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.stem = nn.Conv2d(3, channels, 8, stride=8)
        self.down = nn.Conv2d(channels, channels, 2, stride=2)

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=self.channels, stride=2**i) for i in (3, 4)}

    def forward(self, x):
        p3 = self.stem(x).relu()
        return {"p3": p3, "p4": self.down(p3)}


class PlainDetector(nn.Module):
    """Finds the one bright rectangle of an image; its class is what the weights make of it."""

    input_format = "BGR"

    def __init__(self, *, num_classes, channels, norm=False):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = TwoLevels(channels)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.classify = nn.Linear(channels, num_classes)
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 100.0), False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs):
        images = [(x["image"].to(self.device) - self.pixel_mean) / 60 for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs):
        images = [x["image"] for x in batched_inputs]
        features = self.backbone(self.preprocess_image(batched_inputs).tensor)["p4"]
        features = self.norm(features)
        logits = self.classify(features.mean(dim=(2, 3)))
        if self.training:
            classes = torch.stack([x["instances"].gt_classes[0] for x in batched_inputs])
            return {"loss_cls": nn.functional.cross_entropy(logits, classes.to(self.device))}
        pairs = zip(images, logits.softmax(1), batched_inputs, strict=True)
        return [{"instances": self._find(*pair)} for pair in pairs]

    def _find(self, image, scores, record):
        rows, columns = (image[0] > 180).nonzero().T
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        found = Instances((record["height"], record["width"]))
        found.scores, found.pred_classes = scores.sort(descending=True)
        found.pred_boxes = Boxes(box.float().repeat(len(scores), 1))
        return found


def write_rectangles(folder, name, number, seed):
    """A COCO dataset of dark images with one bright rectangle each, and its overrides."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, number + 1):
        picture = rng.integers(0, 120, (64, 80, 3), dtype=np.uint8)
        x, y, kind = *rng.integers(4, 30, 2).tolist(), int(rng.integers(3))
        picture[y : y + 20, x : x + 24] = 200 + 20 * kind
        cv2.imwrite(str(folder / name / f"{i}.png"), picture)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 80})
        annotations.append({"id": i, "image_id": i, "category_id": kind + 1, "area": 480,
                            "bbox": [x, y, 24, 20], "iscrowd": 0})  # fmt: skip
    path = write_json(folder / f"{name}.json", images, annotations, enumerate(CLASSES, start=1))
    return [f"dataset.json={path}", f"dataset.images={folder / name}"]


class FailingMapper:
    """Detectron2's mapper, but one process fails at one of its images.

    Args:
        how: "user" (a UserError), "bug" (another error), "kill" (SIGKILL), "" (not at all); or
            "stop": every process of the run, its loaders and what started it, is told to stop.
    """

    def __init__(self, *, how="", rank=1, at=6, **settings):
        self.mapper = DatasetMapper(**settings)
        self.how, self.rank, self.left = how, rank, at

    def __call__(self, record):
        self.left -= 1
        if self.how and self.left == 0 and comm.get_rank() == self.rank:
            print(f"failing at {time.time()}", flush=True)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stop":
                os.killpg(os.getpgid(0), signal.SIGTERM)
                return self.mapper(record)
            raise {"user": UserError, "bug": KeyError}[self.how]("this one image is bad")
        return self.mapper(record)
