"""YOLOX by name, for 80 classes."""

from detectron2.config import LazyCall as L

from dfd.data import closing_batch
from dfd.modeling import YOLOX
from dfd.modeling.yolox import PRESETS


def yolox(name, num_classes=80, **settings):
    """
    Args:
        name: "nano", "tiny", "s", "m", "l" or "x".
        settings: others of dfd.modeling.YOLOX, such as a width in place of the name's.
    """
    return L(YOLOX)(
        **{**PRESETS[name], **settings},
        num_classes=num_classes,
        input_format="BGR",
        # Without mosaic (data/mosaic.py), boxes are learnt with an L1 loss too.
        l1_from_iter=L(closing_batch)(max_iter="${train.max_iter}", closing=15 / 300),
    )
