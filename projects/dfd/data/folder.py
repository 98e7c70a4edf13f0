"""A folder of images without labels as a dataset."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog

from ..errors import UserError
from .image_files import files_below
from .images import image_size
from .reader import Tally, checked_path, dataset_name, register

# The files of a folder that are taken for images, by the end of their names.
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def image_folder(*, images: str) -> str:
    """Registers the images of a folder and its subfolders; a second call only returns the name.

    They have no labels: for ``dataloader.train.unlabelled``.

    Args:
        images: the folder. Hidden files and those of other kinds are not looked at.

    Raises:
        UserError: there is no such folder, no image in it, or one that cannot be read.
    """
    root = checked_path("image_folder", "images", images, "a folder of images")
    name = dataset_name(os.path.basename(root), images=root)
    if name in DatasetCatalog:
        return name
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} does not exist: correct `images`")
    files = sorted(Path(root, name) for name in files_below(root, IMAGES))
    records = []
    for number, path in enumerate(files, 1):
        width, height = image_size(str(path))
        records.append(
            {
                "file_name": str(path),
                "image_id": number,
                "width": width,
                "height": height,
                "annotations": [],
            }
        )
    return register(
        name,
        records,
        classes=[],
        category_ids=[],
        source=root,
        images_in_source=len(records),
        tally=Tally(),
    )
