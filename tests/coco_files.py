"""Small COCO datasets on disk."""

import json

import cv2
import numpy as np

CLASSES = ["disc", "box", "bar"]
IDS = (4, 17, 90)


def write_coco(folder, name, num_images, classes=tuple(CLASSES), seed=0):
    """A COCO dataset of random images with two boxes each; returns its dataset overrides."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        cv2.imwrite(
            str(folder / name / f"{i}.png"), rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        )
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 80})
        for j in range(2):
            x, y = rng.integers(0, 30, 2).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": int(rng.integers(len(classes))) + 1,
                    "bbox": [x, y, 30 + j, 20],
                    "area": (30 + j) * 20,
                    "iscrowd": 0,
                }
            )
    path = write_json(folder / f"{name}.json", images, annotations, enumerate(classes, start=1))
    return [f"dataset.json={path}", f"dataset.images={folder / name}"]


def write_mixed_coco(folder, number=12, **change):
    """Wide and tall images in turn, the last without objects; category ids with gaps.

    The first annotation takes the ``change``. Returns the arguments of ``coco_json``.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(number):
        w, h = (48, 32) if i % 2 else (32, 48)
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": w, "height": h})
        for k in range(3 if i + 1 < number else 0):
            box = [2 + k, 3, 10 + 4 * k, 12 + k]
            annotations.append({"id": len(annotations) + 1, "image_id": 100 + i, "bbox": box,
                                "area": 50 + k, "iscrowd": 0, "category_id": IDS[k]})  # fmt: skip
    if annotations:
        annotations[0].update(change)
    categories = [(i, f"class{i}") for i in IDS]
    path = write_json(folder / "data.json", images, annotations, categories)
    return {"json": str(path), "images": str(folder)}


def write_json(path, images, annotations, categories):
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    path.write_text(json.dumps(content))
    return path
