"""The teachers of the families by name, for model.teacher='${teachers.retinanet}'."""

from detectron2.config import LazyCall as L

from dfd import FrozenTeacher

from ..bccd.teacher import model as _bccd
from .teacher_faster_rcnn import model as _faster_rcnn
from .teacher_reppoints import model as _reppoints
from .teacher_retinanet import model as _retinanet
from .teacher_yolox import model as _yolox


def _teacher(name, model):
    return L(FrozenTeacher)(
        model=model, checkpoint=f"output/study_families/teacher_{name}/model_final.pth"
    )


teachers = dict(
    faster_rcnn=_teacher("faster_rcnn", _faster_rcnn),
    retinanet=_teacher("retinanet", _retinanet),
    reppoints=_teacher("reppoints", _reppoints),
    yolox=_teacher("yolox", _yolox),
    # The larger Faster R-CNN of configs/bccd, one teacher for every kind of student; trained on the
    # split train alone, as study_share's is, and not on trainval, which has these test images.
    bccd=L(FrozenTeacher)(model=_bccd, checkpoint="output/study_share/teacher_cnn/model_final.pth"),
)
