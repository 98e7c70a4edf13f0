"""Draws families.png from families.csv: python docs/results/draw_families.py"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

HERE = Path(__file__).parent
FAMILIES = {
    "faster_rcnn": "Faster R-CNN",
    "retinanet": "RetinaNet",
    "reppoints": "RepPoints",
    "yolox": "YOLOX",
}
CELLS = {
    "plain": ("no teacher", "#9e9e9e"),
    "own": ("DFD, teacher of its own kind", "#1f77b4"),
    "other": ("DFD, best teacher of another kind", "#ff7f0e"),
}


def main() -> None:
    values = defaultdict(list)
    with open(HERE / "families.csv", newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            values[row["family"], row["cell"]].append(float(row["AP"]))
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    for number, (cell, (label, colour)) in enumerate(CELLS.items()):
        places = [family + 0.27 * (number - 1) for family in range(len(FAMILIES))]
        runs = [values[family, cell] for family in FAMILIES]
        axes.bar(places, [mean(aps) for aps in runs], 0.25, color=colour, alpha=0.6, label=label)
        for place, aps in zip(places, runs, strict=True):
            axes.plot([place] * len(aps), aps, "k.", markersize=3)
    axes.set_xticks(range(len(FAMILIES)), FAMILIES.values())
    axes.set_ylabel("AP of the student (test)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "families.png", dpi=110)


if __name__ == "__main__":
    main()
