"""Reader of COCO instance annotations: one json file and one folder of images."""

from __future__ import annotations

import os
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..errors import UserError
from .catalog import (
    NO_BOX,
    Tally,
    check_choice,
    checked_path,
    clean_box,
    dataset_name,
    drop_missing_images,
    register,
    subset,
)
from .text import read_json

UNKNOWN = "annotations dropped, unknown category_id"


def coco_json(
    *,
    json: str,
    images: str,
    num_images: int | None = None,
    subset_seed: int = 0,
    missing_images: str = "error",
    unknown_classes: str = "error",
) -> str:
    """Registers a COCO json as a detectron2 dataset; a second call only returns the name.

    Boxes, polygons, RLE masks and crowds are read; keypoints are not. Class ids are the
    positions of the category ids in ascending order, and evaluation maps them back. Boxes
    without area, not finite or outside the image are dropped, boxes partly outside it are
    clipped; both are counted in the report (``MetadataCatalog.get(name).dfd_report``). The files
    are read once per process: a change of the json is seen by the next process.

    Args:
        json: path of the json file, with ``images``, ``annotations`` and ``categories``.
        images: folder that the ``file_name`` entries of the json are relative to.
        num_images: take only this many of the images that have objects; None takes all images.
        subset_seed: which images those are; subsets of one seed are nested.
        missing_images: "error", or "drop" to leave out images whose file does not exist.
        unknown_classes: "error", or "drop" to leave out annotations with an unknown category id.

    Returns:
        The registered name.

    Raises:
        UserError: a path is empty or missing, the file is no valid COCO json, an image id occurs
            twice, or one of the cases above is not set to "drop".
    """
    path = checked_path("coco_json", "json", json, "a COCO json file")
    root = checked_path("coco_json", "images", images, "the folder of the images")
    check_choice("coco_json", "missing_images", missing_images, ("error", "drop"))
    check_choice("coco_json", "unknown_classes", unknown_classes, ("error", "drop"))
    parent, file = os.path.split(path)
    name = dataset_name(
        f"{os.path.basename(parent)}_{os.path.splitext(file)[0]}",
        num_images=num_images,
        json=path,
        images=root,
        subset_seed=subset_seed,
        missing_images=missing_images,
        unknown_classes=unknown_classes,
    )
    if name in DatasetCatalog:
        return name
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} does not exist: correct `images` of {path}")
    tally = Tally()
    data = _load(path, tally)
    category_ids, classes = _categories(data, path)
    everything, evaluable = _records(data, path, root, category_ids, unknown_classes, tally)
    records = drop_missing_images(
        everything, policy=missing_images, tally=tally, where=path, root=root
    )
    records = subset(records, num_images=num_images, subset_seed=subset_seed, where=path)
    unchanged = evaluable and not tally.counts and len(records) == len(everything)
    return register(
        name,
        records,
        classes=classes,
        category_ids=category_ids,
        source=path,
        images_in_source=len(everything),
        tally=tally,
        ground_truth=path if unchanged else None,
    )


def _load(path: str, tally: Tally) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UserError(f"COCO json {path} does not exist: correct the path")
    try:
        data = read_json(path, tally)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): give a COCO instances file") from e
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f"{path} has no list `{key}`: give a COCO instances file")
    return data


def _categories(data: dict[str, Any], path: str) -> tuple[list[int], list[str]]:
    try:
        names = {int(c["id"]): str(c["name"]) for c in data["categories"]}
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: every category needs an integer `id` and a `name`") from e
    if not names:
        raise UserError(f"{path}: `categories` is empty: list every class there")
    if len(names) < len(data["categories"]):
        raise UserError(f"{path}: two categories have the same id: make the ids unique")
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: two categories have the same name: make the names unique")
    ids = sorted(names)
    return ids, [names[i] for i in ids]


def _records(
    data: dict[str, Any],
    path: str,
    root: str,
    category_ids: list[int],
    unknown_classes: str,
    tally: Tally,
) -> tuple[list[dict], bool]:
    """The dataset dicts, in order of image id, and whether pycocotools can use the json as is."""
    records: dict[Any, dict] = {}
    for image in data["images"]:
        try:
            record = {
                "file_name": os.path.join(root, image["file_name"]),
                "height": int(image["height"]),
                "width": int(image["width"]),
                "image_id": image["id"],
                "annotations": [],
            }
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{path}: every image needs `id`, `file_name`, `height`, `width`, not {image!r}"
            ) from e
        if record["image_id"] in records:
            raise UserError(f"{path}: image id {record['image_id']!r} occurs twice: make it unique")
        records[record["image_id"]] = record

    contiguous = {c: i for i, c in enumerate(category_ids)}
    evaluable = True
    ids = set()
    for annotation in data["annotations"]:
        if not isinstance(annotation, dict):
            raise UserError(f"{path}: every annotation must be an object, not {annotation!r}")
        where = f"annotation {annotation.get('id')} of image {annotation.get('image_id')}"
        record = records.get(annotation.get("image_id"))
        # pycocotools takes id 0 for "not matched" and overwrites annotations with equal ids.
        evaluable &= bool(annotation.get("id")) and annotation["id"] not in ids
        evaluable &= "area" in annotation and "iscrowd" in annotation
        ids.add(annotation.get("id"))
        if record is None:
            tally.add("annotations dropped, of an image that is not listed", where)
        elif annotation.get("category_id") not in contiguous:
            tally.add(UNKNOWN, f"{where}, category_id {annotation.get('category_id')!r}")
        elif annotation.get("ignore", 0):
            tally.add("annotations dropped, marked as ignore", where)
        else:
            instance = _instance(annotation, record, where, tally)
            if instance is not None:
                instance["category_id"] = contiguous[annotation["category_id"]]
                record["annotations"].append(instance)
    if unknown_classes == "error" and UNKNOWN in tally.counts:
        raise UserError(
            f"{path}: {tally.counts[UNKNOWN]} annotations have a category_id that is not in "
            f"`categories`, e.g. {tally.examples[UNKNOWN]}: add it, or set unknown_classes=drop"
        )
    numeric = all(isinstance(i, int) for i in records)
    return sorted(
        records.values(), key=lambda r: r["image_id"] if numeric else str(r["image_id"])
    ), evaluable


def _instance(annotation: dict, record: dict, where: str, tally: Tally) -> dict | None:
    try:
        x, y, w, h = (float(v) for v in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        tally.add(NO_BOX, where)
        return None
    box = clean_box(
        [x, y, x + w, y + h],
        width=record["width"],
        height=record["height"],
        tally=tally,
        where=f"{where} ({record['file_name']})",
    )
    if box is None:
        return None
    instance: dict[str, Any] = {
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    if "area" in annotation:
        # The official small, medium and large APs go by this area and not by that of the box.
        instance["area"] = float(annotation["area"])
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        instance["segmentation"] = _compressed(segmentation)
    elif segmentation:
        polygons = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
        if not polygons:
            tally.add("annotations dropped, polygon with less than 3 points", where)
            return None
        instance["segmentation"] = polygons
    return instance


def _compressed(rle: dict) -> dict:
    if not isinstance(rle["counts"], list):
        return rle
    return mask_util.frPyObjects(rle, *rle["size"])
