"""Small COCO datasets on disk."""

import json

import cv2
import numpy as np

CLASSES = ["disc", "box", "bar"]


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
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                "info": {},
                "images": images,
                "annotations": annotations,
                "categories": [{"id": k + 1, "name": c} for k, c in enumerate(classes)],
            }
        )
    )
    return [f"dataset.json={path}", f"dataset.images={folder / name}"]
