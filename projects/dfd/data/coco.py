"""Reader of COCO instance annotations: one json file and one folder of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..errors import UserError
from ..ranges import check_choice
from .numbers import as_whole
from .reader import (
    Tally,
    checked_path,
    checked_subset,
    clean_box,
    dataset_name,
    drop_missing_images,
    register,
    subset,
)
from .text import is_plain_json, read_json
from .validation import (
    Classes,
    ImageIndex,
    as_box,
    as_flag,
    as_size,
    brief,
    class_labels,
    clean_values,
    complete_sizes,
    file_name,
    image_ids,
)

UNLISTED = "annotations dropped, of an image that is not listed"
UNKNOWN = "annotations dropped, unknown category_id"
OTHER = "annotations left out, of other classes"

# The official small, medium and large APs go by the area of the json, not by that of the box.
_KEPT = ("area", "segmentation", "keypoints")


def coco_json(
    *,
    json: str,
    images: str,
    classes: Sequence[str] | None = None,
    num_images: int | None = None,
    subset_seed: int = 0,
    missing_images: str = "error",
    unknown_classes: str = "error",
) -> str:
    """Registers a COCO json as a detectron2 dataset; a second call only returns the name.

    Boxes, polygons, RLE masks, crowds and keypoints are read. Class ids are the
    positions of the category ids in ascending order, and evaluation maps them back. Boxes
    without area, not finite or outside the image are dropped, boxes partly outside it are
    clipped; both are counted in the report (``MetadataCatalog.get(name).dfd_report``). The files
    are read once per process: a change of the json is seen by the next process.

    Args:
        json: path of the json file, with ``images``, ``annotations`` and ``categories``.
        images: folder that the ``file_name`` entries of the json are relative to.
        classes: names of the categories to take, in the order of their ids whatever the order here;
            None takes all. Images without any of them stay, as images without objects.
        num_images: take only this many of the images that have objects; None takes all images.
        subset_seed: which images those are; subsets of one seed are nested.
        missing_images: "error", or "drop" to leave out images whose file does not exist.
        unknown_classes: "error", or "drop" to leave out annotations with an unknown category id.

    Returns:
        The registered name.

    Raises:
        UserError: a path is empty or missing, the file is no valid COCO json, an image id occurs
            twice, a class is no category of its, or one of the cases above is not set to "drop".
    """
    path = checked_path("coco_json", "json", json, "a COCO json file")
    root = checked_path("coco_json", "images", images, "the folder of the images")
    check_choice("coco_json: missing_images", missing_images, ("error", "drop"))
    check_choice("coco_json: unknown_classes", unknown_classes, ("error", "drop"))
    num_images, subset_seed = checked_subset("coco_json", num_images, subset_seed)
    wanted = None if classes is None else class_labels(classes, f"coco_json: classes={classes!r}")
    parent, file = os.path.split(path)
    name = dataset_name(
        f"{os.path.basename(parent)}_{os.path.splitext(file)[0]}",
        num_images=num_images,
        json=path,
        images=root,
        subset_seed=subset_seed,
        missing_images=missing_images,
        unknown_classes=unknown_classes,
        **({} if wanted is None else {"classes": sorted(wanted)}),
    )
    if name in DatasetCatalog:
        return name
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} does not exist: correct `images` of {path}")
    tally = Tally()
    data = _load(path, tally)
    category_ids, names = _categories(data, path, tally)
    if wanted is not None:
        data, category_ids, names = _take_classes(data, category_ids, names, wanted, path, tally)
    everything, records = _images_found(data, path, root, missing_images, tally)
    evaluable = _annotate(data, everything, records, path, Classes(category_ids, names), tally)
    if unknown_classes == "error":
        _refuse_unknown(path, tally, "add it, or set unknown_classes=drop")
    records = subset(records, num_images=num_images, subset_seed=subset_seed, where=path)
    whole = wanted is None and len(records) == len(everything)
    return register(
        name,
        records,
        classes=names,
        category_ids=category_ids,
        source=path,
        images_in_source=len(everything),
        tally=tally,
        ground_truth=path if evaluable and whole and not tally.counts else None,
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


def read_registered(
    path: str, root: str, tally: Tally, *, sizes: bool = True
) -> tuple[list[dict], dict[int, str], bool]:
    """What Detectron2's ``load_coco_json`` makes of a json, with its values read as ours are.

    Boxes stay as they are in the json, and images are not looked for, but for their size where the
    json does not tell it.

    Returns:
        The records; the classes by category id; and whether pycocotools can use the json as it is.

    Raises:
        UserError: the json is no valid COCO json, or a category id is unknown.
    """
    data = _load(path, tally)
    category_ids, classes = _categories(data, path, tally)
    records = _images(data, path, root, tally)
    if sizes:
        complete_sizes(records, tally)
    finder = Classes(category_ids, classes)
    evaluable = _annotate(data, records, records, path, finder, tally, clip=False)
    evaluable &= is_plain_json(path)
    _refuse_unknown(path, tally, "add it")
    return records, dict(zip(category_ids, classes, strict=True)), evaluable


def _refuse_unsized(records: list[dict], path: str) -> None:
    if records:
        raise UserError(
            f"{path}: every image needs a `width` and a `height`, or a file to take them from, "
            f"which {records[0]['file_name']} is not: add them, or repair the file"
        )


def _refuse_unknown(path: str, tally: Tally, remedy: str) -> None:
    if UNKNOWN in tally.counts:
        raise UserError(
            f"{path}: {tally.counts[UNKNOWN]} annotations have a category_id that is not in "
            f"`categories`, e.g. {tally.examples[UNKNOWN]}: {remedy}"
        )


def _categories(data: dict[str, Any], path: str, tally: Tally) -> tuple[list[int], list[str]]:
    ids = []
    for category in data["categories"]:
        known = isinstance(category, dict) and "name" in category
        number = as_whole(category.get("id")) if known else None
        if number is None or abs(number) >= 2**63:
            raise UserError(
                f"{path}: every category needs an integer `id` and a `name`, not {brief(category)}"
            )
        if isinstance(category["id"], str):
            tally.add("category ids converted, given as text", repr(category["id"]))
        ids.append(number)
    if not ids:
        raise UserError(f"{path}: `categories` is empty: list every class there")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two categories have the same id: make the ids unique")
    names = class_labels([c["name"] for c in data["categories"]], path, tally)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [ids[i] for i in order], [names[i] for i in order]


def _take_classes(
    data: dict[str, Any],
    ids: list[int],
    names: list[str],
    wanted: Sequence[str],
    path: str,
    tally: Tally,
) -> tuple[dict[str, Any], list[int], list[str]]:
    """The json without the annotations of other categories, and what is left of those."""
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        what = f"has no category {missing[0]!r}" if missing else "is to have no class"
        raise UserError(f"{path} {what}: name some of {', '.join(names)} in `classes`")
    everything, told_later = Classes(ids, names), Tally()
    left = []
    for annotation in data["annotations"]:
        # One that cannot be read is told where annotations are.
        value = annotation.get("category_id") if isinstance(annotation, dict) else None
        found = everything.find(value, told_later, lambda: "")
        if found is None or names[found] in wanted:
            left.append(annotation)
        else:
            tally.add(OTHER, lambda name=names[found]: repr(name))
    kept = [i for i, name in enumerate(names) if name in wanted]
    return data | {"annotations": left}, [ids[i] for i in kept], [names[i] for i in kept]


def _images(data: dict[str, Any], path: str, root: str, tally: Tally) -> list[dict]:
    """The dataset dicts in order of image id, still without annotations, and some without size."""
    for image in data["images"]:
        if not isinstance(image, dict) or "id" not in image:
            raise UserError(f"{path}: every image needs an `id`, not {brief(image)}")
    ids = image_ids([image["id"] for image in data["images"]], path, tally)
    records = []
    for image_id, image in zip(ids, data["images"], strict=True):
        name = os.path.join(root, file_name(image.get("file_name"), path, image))
        record = {"file_name": name, "image_id": image_id, "annotations": []}
        size = as_size(image.get("width"), image.get("height"), tally, name)
        if size is not None:
            record["width"], record["height"] = size
        records.append(record)
    return sorted(records, key=lambda record: record["image_id"])


def _images_found(
    data: dict[str, Any], path: str, root: str, missing_images: str, tally: Tally
) -> tuple[list[dict], list[dict]]:
    """The dataset dicts of all images, and those with a file, each of which has a size."""
    everything = _images(data, path, root, tally)
    if missing_images == "error":
        unsized = [record for record in everything if "width" not in record]
        found = drop_missing_images(unsized, policy="drop", tally=Tally(), where=path, root=root)
        found_ids = {record["image_id"] for record in found}
        _refuse_unsized([r for r in unsized if r["image_id"] not in found_ids], path)
    records = drop_missing_images(
        everything, policy=missing_images, tally=tally, where=path, root=root
    )
    complete_sizes(records, tally)
    _refuse_unsized([record for record in records if "width" not in record], path)
    return everything, records


def _annotate(
    data: dict[str, Any],
    images: list[dict],
    records: list[dict],
    path: str,
    classes: Classes,
    tally: Tally,
    *,
    clip: bool = True,
) -> bool:
    """Adds the annotations to the records.

    Args:
        images: the records of all images of the json.
        records: those that are to have annotations.
        clip: whether boxes are clipped, or dropped, by their image.

    Returns:
        Whether pycocotools can use the annotations of the json as they are.
    """
    index, wanted = ImageIndex(images), {record["image_id"]: record for record in records}
    evaluable = True
    ids: set[int] = set()
    for annotation in data["annotations"]:
        if not isinstance(annotation, dict):
            raise UserError(f"{path}: every annotation must be an object, not {brief(annotation)}")

        def where(annotation: dict = annotation) -> str:
            return f"annotation {annotation.get('id')} of image {annotation.get('image_id')}"

        number = annotation.get("id")
        # pycocotools takes id 0 for "not matched", overwrites annotations with equal ids, and
        # keeps ids as floats.
        evaluable &= type(number) is int and 0 < number < 2**53 and number not in ids
        evaluable &= "area" in annotation and "iscrowd" in annotation
        evaluable &= "keypoints" not in annotation or "num_keypoints" in annotation
        evaluable &= isinstance(annotation.get("image_id"), int | str)
        evaluable &= _is_official_mask(annotation.get("segmentation"))
        if evaluable:
            ids.add(number)
        record = index.find(annotation.get("image_id"), tally, where)
        if record is None:
            tally.add(UNLISTED, where)
            continue
        record = wanted.get(record["image_id"])
        if record is not None:
            instance = _instance(annotation, record, path, classes, tally, where, clip)
            if instance is not None:
                record["annotations"].append(instance)
    return evaluable


def _is_official_mask(value: Any) -> bool:
    """Whether pycocotools can take a mask as it is: none, polygons all of them, or run lengths."""
    if isinstance(value, dict):
        size = value.get("size")
        return isinstance(size, list) and all(type(side) is int for side in size)
    if not isinstance(value, list):
        return True
    return all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in value)


def _instance(
    annotation: dict,
    record: dict,
    path: str,
    classes: Classes,
    tally: Tally,
    where: Callable[[], str],
    clip: bool,
) -> dict | None:
    """Detectron2's form of an annotation, None if it is dropped."""
    category = classes.find(annotation.get("category_id"), tally, where)
    if category is None:
        tally.add(UNKNOWN, lambda: f"{where()}, category_id={brief(annotation.get('category_id'))}")
        return None
    if annotation.get("ignore", 0) and as_flag(annotation["ignore"]) != 0:
        tally.add("annotations dropped, marked as ignore", where)
        return None
    box = as_box(annotation.get("bbox"), tally, where)
    if box is None:
        return None
    size = {key: record.get(key, math.inf) for key in ("width", "height")}
    mode = BoxMode.XYWH_ABS
    if clip:
        mode, (x, y, w, h) = BoxMode.XYXY_ABS, box
        box = clean_box(
            [x, y, x + w, y + h],
            **size,
            tally=tally,
            where=lambda: f"{where()} ({record['file_name']})",
        )
        if box is None:
            return None
    annotation = clean_values(annotation, **size, tally=tally, where=where, source=path)
    if annotation is None:
        return None
    instance = {
        "bbox": box,
        "bbox_mode": mode,
        "iscrowd": annotation.get("iscrowd", 0),
        "category_id": category,
    }
    instance.update((key, annotation[key]) for key in _KEPT if annotation.get(key))
    if "keypoints" in instance:
        # Indices of pixels in the json, positions in the image here, as detectron2 has them.
        points = instance["keypoints"]
        instance["keypoints"] = [v + 0.5 if i % 3 < 2 else v for i, v in enumerate(points)]
    return instance
