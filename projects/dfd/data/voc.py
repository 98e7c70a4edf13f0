"""Reader of folders laid out like Pascal VOC, with any classes."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..errors import UserError
from ..ranges import check_choice
from .images import image_size
from .numbers import as_number, as_whole
from .reader import (
    NO_AREA,
    NO_BOX,
    Tally,
    checked_path,
    checked_subset,
    clean_box,
    dataset_name,
    drop_missing_images,
    register,
    subset,
)
from .text import read_xml
from .validation import as_size, class_labels
from .voc_files import (
    Files,
    annotation_files,
    annotation_path,
    image_files,
    image_of,
    listed_stems,
    split_file,
)

logger = logging.getLogger(__name__)

UNKNOWN = "annotations dropped, unknown class"


def voc_folder(
    *,
    root: str,
    split: str,
    classes: Sequence[str] | None = None,
    num_images: int | None = None,
    subset_seed: int = 0,
    missing_images: str = "error",
    unknown_classes: str = "error",
) -> str:
    """Registers one split of a VOC folder as a detectron2 dataset; a second call only names it.

    The folder holds ``Annotations/<id>.xml``, ``ImageSets/Main/<split>.txt`` and
    ``JPEGImages/<id>.jpg`` (or another extension of images), the xml and the images also in
    subfolders. Boxes are inclusive pixel indices that start
    at 1, as in VOC: 1 is subtracted from ``xmin`` and ``ymin``. A box with ``xmax <= xmin`` or
    ``ymax <= ymin`` is dropped as one without area, a box partly outside the image is clipped,
    and both are counted in the report (``MetadataCatalog.get(name).dfd_report``).

    Objects marked ``difficult`` are ordinary objects here, in training and in the COCO metrics,
    as in detectron2's own VOC reader; the report says how many there are. The image id is the
    1-based number of the name in the split file. The files are read once per process.

    Args:
        root: the folder.
        split: name of a file in ``ImageSets/Main``, without ``.txt``.
        classes: class names in the order of the class ids. None takes the names found in all xml
            files of the folder (of its subfolders if it has none itself), sorted, so that every
            split gets the same ids.
        num_images: take only this many of the images that have objects; None takes all images.
        subset_seed: which images those are; subsets of one seed are nested.
        missing_images: "error", or "drop" to leave out images whose file does not exist.
        unknown_classes: "error", or "drop" to leave out objects whose name is not in ``classes``.

    Returns:
        The registered name.

    Raises:
        UserError: the folder, the split or an xml file is missing or unreadable, an image is
            listed twice or may be one of several files, or one of the cases above is not set to
            "drop".
    """
    folder = checked_path("voc_folder", "root", root, "the folder that holds Annotations/")
    check_choice("voc_folder: missing_images", missing_images, ("error", "drop"))
    check_choice("voc_folder: unknown_classes", unknown_classes, ("error", "drop"))
    num_images, subset_seed = checked_subset("voc_folder", num_images, subset_seed)
    split = str(split)
    names = (
        None if classes is None else class_labels(classes, f"voc_folder: classes={classes!r}")
    )
    name = dataset_name(
        f"{os.path.basename(folder)}_{split}",
        num_images=num_images,
        root=folder,
        split=split,
        classes=names,
        subset_seed=subset_seed,
        missing_images=missing_images,
        unknown_classes=unknown_classes,
    )
    if name in DatasetCatalog:
        return name
    tally = Tally()
    source = split_file(folder, split)
    annotations = annotation_files(folder)
    stems = listed_stems(source, annotations, tally)
    if names is None:
        names = _classes_found(annotations)
    if not names:
        raise UserError(f"voc_folder: classes=[] for {folder}: name at least one class")

    images = image_files(folder)
    difficult: dict[int, int] = {}
    everything = []
    for image_id, stem in enumerate(stems, start=1):
        path = annotation_path(stem, annotations)
        xml = read_xml(path, tally)
        image = image_of(stem, _text(xml, "filename"), images, annotations, tally)
        record = {"file_name": images.path(f"{stem}.jpg")}  # Which is missing, and may be dropped.
        if image is not None:
            record, difficult[image_id] = _record(xml, path, image, names, tally)
        everything.append({**record, "image_id": image_id})
    if unknown_classes == "error" and UNKNOWN in tally.counts:
        raise UserError(
            f"{source}: {tally.counts[UNKNOWN]} objects have a name that is not in classes="
            f"{names}, e.g. {tally.examples[UNKNOWN]}: add it, or set unknown_classes=drop"
        )
    records = drop_missing_images(
        everything, policy=missing_images, tally=tally, where=source, exact=True
    )
    records = subset(records, num_images=num_images, subset_seed=subset_seed, where=source)
    return register(
        name,
        records,
        classes=names,
        category_ids=list(range(1, len(names) + 1)),
        source=source,
        images_in_source=len(everything),
        tally=tally,
        difficult=sum(difficult[r["image_id"]] for r in records),
    )


def _classes_found(annotations: Files) -> list[str]:
    counts: Counter[str] = Counter()
    # Beside those in the folder itself, subfolders may hold old copies.
    files = [f for f in annotations.names if "/" not in f] or annotations.names
    for file in sorted(files):
        root = read_xml(annotations.path(file), Tally())
        counts.update(filter(None, (_text(o, "name") for o in root.iter("object"))))
    if not counts:
        raise UserError(f"no objects in the xml files of {annotations.folder}: correct `root`")
    found = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    logger.info("classes found in all annotations of %s: %s", annotations.folder, found)
    return sorted(counts)


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _record(
    root: ElementTree.Element, path: str, image: str, names: list[str], tally: Tally
) -> tuple[dict, int]:
    """The dataset dict of one image, without its id, and its number of difficult objects."""
    width, height = _size(root, image)
    annotations = []
    difficult = 0
    for item in root.iter("object"):
        label = _text(item, "name")
        if label not in names:
            tally.add(UNKNOWN, f"{label!r} in {path}")
            continue
        where = f"{label} in {path}"
        box = [as_number(_text(item, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
        if None in box:
            tally.add(NO_BOX, where)
            continue
        if box[2] <= box[0] or box[3] <= box[1]:
            # Read literally it would cover one row or column of pixels, which nobody draws.
            tally.add(NO_AREA, f"{where}, xmin, ymin, xmax, ymax {box}")
            continue
        box[0] -= 1.0
        box[1] -= 1.0
        cleaned = clean_box(box, width=width, height=height, tally=tally, where=where)
        if cleaned is not None:
            difficult += _text(item, "difficult") == "1"
            annotations.append(
                {
                    "bbox": cleaned,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": names.index(label),
                    "iscrowd": 0,
                }
            )
    return {
        "file_name": image,
        "width": width,
        "height": height,
        "annotations": annotations,
    }, difficult


def _size(root: ElementTree.Element, image: str) -> tuple[int, int]:
    """Width and height in pixels; labelling tools often leave them 0, then the image is asked."""
    # Text is what an xml file has: no conversion to be counted.
    size = as_size(*(as_whole(_text(root, f"size/{side}")) for side in ("width", "height")))
    return size or image_size(image)
