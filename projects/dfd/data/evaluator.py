"""Ground truth written as a COCO json, and the evaluator that measures against it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import uuid
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode, PolygonMasks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import UserError

logger = logging.getLogger(__name__)

# COCO's people, for whom pycocotools knows how much each point may be off.
COCO_KEYPOINTS = 17


def write_ground_truth(
    path: str, records: list[dict], classes: list[str], category_ids: dict[int, int]
) -> None:
    """Writes records as a COCO json; ``category_ids`` are those of the contiguous class ids.

    Raises:
        UserError: an image has no known size.
    """
    truth = coco_dict(records, classes, category_ids)
    # Several processes may write the same file, so each one renames a complete copy.
    partial = f"{path}.{uuid.uuid4().hex}"
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(truth, f)
    os.replace(partial, path)


def coco_dict(records: list[dict], classes: list[str], category_ids: dict[int, int]) -> dict:
    """Records as the content of a COCO json; ids of annotations start with 1.

    Not by Detectron2's ``convert_to_coco_dict``: it computes areas anew from the masks, rounds
    boxes, and shifts keypoints by half a pixel, so the AP would not be that of the original file.
    """
    points = max(
        (len(a.get("keypoints", ())) for r in records for a in r["annotations"]), default=0
    )
    images, annotations = [], []
    for record in records:
        if "width" not in record:
            raise UserError(
                f"image {record['file_name']} cannot be evaluated: neither the dataset nor the "
                "file tells its width and height"
            )
        images.append({k: record[k] for k in ("file_name", "height", "width")})
        images[-1]["id"] = record["image_id"]
        for instance in record["annotations"]:
            annotation = _annotation(instance, points)
            annotation["id"] = len(annotations) + 1
            annotation["image_id"] = record["image_id"]
            annotation["category_id"] = category_ids[instance["category_id"]]
            annotations.append(annotation)
    categories = [{"id": category_ids[i], "name": name} for i, name in enumerate(classes)]
    # loadRes of older pycocotools copies `info` and fails without it.
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _annotation(instance: dict, points: int) -> dict[str, Any]:
    # Detectron2 turns rotated boxes into upright ones, and these into no other form.
    box = BoxMode.convert(list(instance["bbox"]), instance["bbox_mode"], BoxMode.XYXY_ABS)
    x, y, w, h = map(float, BoxMode.convert(list(box), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS))
    segmentation = instance.get("segmentation")
    area = instance.get("area")
    if area is None and isinstance(segmentation, list):
        area = float(PolygonMasks([segmentation]).area()[0])
    elif area is None and segmentation is not None:
        area = float(mask_util.area(segmentation))
    annotation: dict[str, Any] = {
        "bbox": [x, y, w, h],
        "area": w * h if area is None else area,
        "iscrowd": instance.get("iscrowd", 0),
    }
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
    if segmentation is not None:
        annotation["segmentation"] = segmentation
    if points:
        # pycocotools wants them of every annotation, and ignores those without a visible one.
        keypoints = instance.get("keypoints", [0] * points)
        keypoints = [v - 0.5 if i % 3 < 2 else v for i, v in enumerate(keypoints)]
        annotation["keypoints"] = keypoints
        annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
    return annotation


class Evaluator(COCOEvaluator):
    """Detectron2's, for ground truth that may have no masks or other keypoints than COCO's."""

    def __init__(
        self,
        dataset_name: str,
        *,
        dataset: str,
        masks: bool,
        keypoints: tuple[int, ...],
        kpt_oks_sigmas: tuple[float, ...] = (),
        **kwargs: Any,
    ) -> None:
        """
        Args:
            dataset_name: the entry of the catalog that holds the ground truth.
            dataset: its name for users.
            masks: whether every annotation has one.
            keypoints: the numbers of keypoints that annotations have.
            kpt_oks_sigmas, kwargs: Detectron2's.
        """
        super().__init__(dataset_name, kpt_oks_sigmas=kpt_oks_sigmas, **kwargs)
        self._coco_api.dataset.setdefault("info", {})
        self._dataset, self._masks, self._keypoints = dataset, masks, keypoints
        self._sigmas = kpt_oks_sigmas

    @property
    def truth(self) -> COCO:
        """What is measured against."""
        return self._coco_api

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        tasks = super()._tasks_from_predictions(predictions)
        for task, known, what in (
            ("segm", self._masks, "has annotations without a mask"),
            ("keypoints", self._keypoints, "has no keypoints"),
        ):
            if task in tasks and not known:
                logger.warning("dataset %s %s: no %s AP is measured", self._dataset, what, task)
                tasks.remove(task)
        if "keypoints" in tasks:
            found = next(len(p["keypoints"]) // 3 for p in predictions if "keypoints" in p)
            check_keypoints(found, self._keypoints, self._sigmas, self._dataset)
        return tasks

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._nothing_found(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, self._by_category(class_names))

    def _by_category(self, class_names: list[str] | None) -> list[str] | None:
        """The names in the order of COCO's evaluation, by category id, which Detectron2 takes for
        that of the contiguous ids."""
        to_class = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", None)
        ids = sorted(self._coco_api.getCatIds())
        if class_names is None or to_class is None or not set(ids) <= set(to_class):
            return class_names
        return [class_names[to_class[i]] for i in ids]

    def _nothing_found(self, iou_type: str) -> COCOeval:
        """The evaluation of no detections, which Detectron2 leaves out, giving NaN for 0."""
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._coco_api, load_detections(self._coco_api, []), iou_type)
            if iou_type == "keypoints" and self._sigmas:
                evaluation.params.kpt_oks_sigmas = np.array(self._sigmas)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation


def load_detections(truth: COCO, detections: list[dict[str, Any]]) -> COCO:
    """Detections as pycocotools has them; its own ``loadRes`` fails if there are none."""
    if detections:
        return truth.loadRes(detections)
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def check_keypoints(
    found: int, labelled: tuple[int, ...], sigmas: tuple[float, ...], dataset: str
) -> None:
    """
    Raises:
        UserError: the keypoints of a detector, of the data it is measured on and of the sigmas are
            not equally many.
    """
    if labelled != (found,):
        raise UserError(
            f"the detector finds {found} keypoints, but dataset {dataset} has annotations of "
            f"{' and of '.join(map(str, labelled))}: keypoint AP needs the same number"
        )
    if found != (len(sigmas) or COCO_KEYPOINTS):
        raise UserError(
            f"keypoint AP of the {found} keypoints of dataset {dataset} needs a sigma for each, "
            f"but there are {len(sigmas) or COCO_KEYPOINTS}{'' if sigmas else ', those of COCO'}: "
            f"set dataloader.evaluator.kpt_oks_sigmas to a list of {found} numbers"
        )
