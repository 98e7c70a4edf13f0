"""Prints the tables of every pair by today's defaults: python docs/results/verdicts.py

Differences are of runs of the same seed, with half of their 95 % interval (Student's t). A verdict
has an error of 5 % for all rows of its table together (Holm); where it is not settled, the
difference that so many seeds would have shown four times in five stands beside it.
"""

import csv
from pathlib import Path

from dfd.research.ablate.cells import Cell
from dfd.research.ablate.estimates import UNSETTLED, CellResult, Estimate, verdicts

HERE = Path(__file__).parent
PHOTOS = "photographs.csv"
STRICT, CRITERIA, OWN = "strict_first.csv", "criteria_under_limit.csv", "own_kind_under_limit.csv"
# Student and teacher, then file, student and cell of the runs with DFD and of the plain ones.
GAINS = [
    ("Faster R-CNN", "Faster R-CNN, 15.5 M", (STRICT, "faster_rcnn", "to_lenient"), "faster_rcnn"),
    ("Faster R-CNN", "Faster R-CNN", (OWN, "faster_rcnn", "dfd"), "faster_rcnn"),
    ("RetinaNet", "Faster R-CNN, 15.5 M", (STRICT, "retinanet", "to_lenient"), "retinanet"),
    ("RetinaNet", "RetinaNet", (OWN, "retinanet", "dfd"), "retinanet"),
    ("RepPoints", "Faster R-CNN, 15.5 M", (CRITERIA, "reppoints", "dfd"), "reppoints"),
    ("YOLOX", "Faster R-CNN, 15.5 M", (STRICT, "yolox", "to_lenient"), "yolox"),
    ("ViT", "Faster R-CNN, 15.5 M", (STRICT, "vit", "to_lenient"), "vit"),
    ("ViT", "ViT", (OWN, "vit", "dfd"), "vit"),
]
# A comparison of its own, planned as such.
ON_PHOTOS = [
    ("Faster R-CNN", "faster_rcnn"),
    ("RetinaNet", "retinanet"),
    ("RetinaNet, on another processor", "retinanet_zen5"),
    ("RepPoints", "reppoints"),
    ("YOLOX", "yolox"),
    ("Faster R-CNN, a tenth of the labels", "few"),
]
# The same where the learning rate was chosen on the plain student.
BEST_RATE = "better_learning_rate.csv"
AT_BEST = [("RetinaNet", (PHOTOS, "retinanet_best_lr"))]
AT_BEST_ON_BCCD = [
    ("RetinaNet", (BEST_RATE, "retinanet")),
    ("Faster R-CNN", (BEST_RATE, "faster_rcnn")),
    ("RepPoints", (BEST_RATE, "reppoints")),
    ("YOLOX", (BEST_RATE, "yolox")),
]
RIVALS_AT_BEST = [
    (student, (BEST_RATE, key, "dfd"), (BEST_RATE, key, "pkd"))
    for student, key in (("RetinaNet", "retinanet"), ("Faster R-CNN", "faster_rcnn"))
]
OTHERS = ("pkd", "cwd", "mimic", "fgd", "mgd")
RIVALS = [
    (student, teacher, (file, key, "dfd"), other)
    for student, teacher, file, key in (
        ("Faster R-CNN", "Faster R-CNN, 15.5 M", CRITERIA, "faster_rcnn"),
        ("Faster R-CNN", "Faster R-CNN", OWN, "faster_rcnn"),
        ("RetinaNet", "Faster R-CNN, 15.5 M", CRITERIA, "retinanet"),
        ("RetinaNet", "RetinaNet", OWN, "retinanet"),
        ("YOLOX", "Faster R-CNN, 15.5 M", CRITERIA, "yolox"),
        ("ViT", "Faster R-CNN, 15.5 M", CRITERIA, "vit"),
        ("ViT", "ViT", OWN, "vit"),
    )
    for other in OTHERS
]


def read(file: str, student: str, cell: str, column: str) -> dict[int, float]:
    """AP by seed, of the runs that have it."""
    with open(HERE / file, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["student"] == student]
    return {int(r["seed"]): float(r[column]) for r in rows if r["cell"] == cell and r[column]}


def differences(one: tuple[str, ...], other: tuple[str, ...], column: str) -> dict[int, float]:
    """By the seeds that both have."""
    a, b = read(*one, column), read(*other, column)
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def shown(found: dict[int, float]) -> str:
    if not found:
        return "–"
    estimate = Estimate.of(list(found.values()))
    half = "–" if estimate.half_width is None else f"{estimate.half_width:.1f}"
    return f"{estimate.mean:+.1f} ± {half}, {sum(v > 0 for v in found.values())} of {len(found)}"


def table(rows: list[tuple[list[str], tuple[str, ...], tuple[str, ...]]]) -> list[str]:
    """Of each row its titles and the two cells that are compared."""
    results = []
    for number, (_, one, other) in enumerate(rows):
        found = differences(one, other, "AP")
        results.append(CellResult(Cell(str(number), ()), {}, {}, found))
    said = verdicts(results)
    lines = []
    for (titles, one, other), result in zip(rows, results, strict=True):
        verdict = said.get(result.cell.name, "one seed")
        if verdict == UNSETTLED:
            verdict += f" (visible from {result.difference.visible:.1f})"
        test = shown(differences(one, other, "AP on test"))
        lines.append("| " + " | ".join([*titles, shown(result.differences), verdict, test]) + " |")
    return lines


def main() -> None:
    print(
        "| student | teacher | DFD minus plain, `val` | verdict | `test` |\n|---|---|---|---|---|"
    )
    gains = [
        ([student, teacher], dfd, (dfd[0], plain, "plain"))
        for student, teacher, dfd, plain in GAINS
    ]
    print("\n".join(table(gains)))
    print("\n| student, on photographs | DFD minus plain, `val` | verdict | `test` |")
    print("|---|---|---|---|")
    photos = [
        ([student], (PHOTOS, key, "dfd"), (PHOTOS, key, "plain")) for student, key in ON_PHOTOS
    ]
    print("\n".join(table(photos)))
    for where, pairs in (("photographs", AT_BEST), ("BCCD", AT_BEST_ON_BCCD)):
        print(f"\n| on {where}, plain's best rate | DFD minus plain, `val` | verdict | `test` |")
        print("|---|---|---|---|")
        rows = [([student], (*runs, "dfd"), (*runs, "plain")) for student, runs in pairs]
        print("\n".join(table([row for row in rows if len(differences(*row[1:], "AP")) > 1])))
    print("\n| on BCCD, plain's best rate | DFD minus PKD, `val` | verdict | `test` |")
    print("|---|---|---|---|")
    print("\n".join(table([([student], dfd, pkd) for student, dfd, pkd in RIVALS_AT_BEST])))
    print("\n| student | teacher | minus | DFD minus it, `val` | verdict | `test` |")
    print("|---|---|---|---|---|---|")
    names = {"mimic": "mimic"} | {key: key.upper() for key in OTHERS if key != "mimic"}
    rivals = [
        ([student, teacher, names[other]], dfd, (*dfd[:2], other))
        for student, teacher, dfd, other in RIVALS
        if len(differences(dfd, (*dfd[:2], other), "AP")) > 1
    ]
    print("\n".join(table(rivals)))


if __name__ == "__main__":
    main()
