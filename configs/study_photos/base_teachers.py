"""The teachers by name, for model.teacher='${teachers.faster_rcnn}'."""

from detectron2.config import LazyCall as L

from dfd import FrozenTeacher

from ..common.models.yolox import yolox
from .teacher import model as _faster_rcnn

teachers = dict(
    # The authors' YOLOX-nano, trained on COCO train2017, of 80 classes: its features alone.
    yolox_nano=L(FrozenTeacher)(
        model=yolox("nano"), checkpoint="yolox_nano.pth", check_classes=False
    ),
    faster_rcnn=L(FrozenTeacher)(
        model=_faster_rcnn, checkpoint="output/study_photos/teacher/model_final.pth"
    ),
)
