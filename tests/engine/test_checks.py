import json
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from coco_files import write_coco
from detectron2.utils import comm
from omegaconf import OmegaConf
from reppoints_toys import small_detector
from torch.utils.data import DataLoader
from toys import build

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.distill.inherit import inherit_weights
from dfd.engine.build import count_images, data_hashes
from dfd.engine.checks import (
    check_classes,
    check_image_format,
    check_inherited_classes,
    check_labels,
    check_optimizer,
    check_output_dir,
    check_synchronised_norms,
    check_unlabelled,
    frozen_at_random,
    tell_other_form,
)
from dfd.engine.machine import forget_peak_memory, peak_memory_mib
from dfd.engine.state.checkpoint import StudentCheckpointer
from dfd.engine.state.run_settings import TEST_DATA, TRAINING_DATA
from dfd.losses import DFDLoss, FGDLoss
from dfd.modeling import YOLOX
from dfd.weights.strict import WeightFile

MOSAIC = {"_target_": "dfd.data.MosaicMapper"}
CLASSES = ["disc", "box", "bar"]


@pytest.mark.parametrize("wanted", ["BGR", "RGB"])
def test_channel_order_that_a_mosaic_has_by_default_is_compared(wanted):
    student = build("retinanet")
    student.input_format = wanted
    student.pixel_mean.fill_(100.0)  # Fits neither channel order.
    loaders = OmegaConf.create({"train": {"mapper": MOSAIC}, "test": {}})
    if wanted == "BGR":
        check_image_format(student, loaders)
        return
    with pytest.raises(UserError, match="train.mapper.image_format is BGR, but the student takes"):
        check_image_format(student, loaders)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_are_frozen_at_random_weights_are_found(frozen):
    """They would never learn, in a run that looks like any other."""
    student = build("retinanet")
    if frozen:
        student.backbone.bottom_up.freeze(2)
    found = frozen_at_random(student, OmegaConf.create({}))
    assert (found is not None) == frozen
    if frozen:
        assert "parameters, as backbone.bottom_up.stem" in found and "3 batch norms" in found
        trunk = {"backbone": {"model_name": "resnet18", "pretrained": True}}
        assert frozen_at_random(student, OmegaConf.create(trunk)) is None


class OwnMapper:
    """A mapper of a user's, which says what it makes."""

    boxes_only = True

    def __init__(self, image_format="RGB"):
        pass


def test_mapper_declares_what_it_makes_and_takes():
    student = SimpleNamespace(roi_heads=SimpleNamespace(mask_on=True))
    loaders = OmegaConf.create(
        {"train": {"dataset": "own", "mapper": {"_target_": f"{__name__}.OwnMapper"}}, "test": {}}
    )
    with pytest.raises(UserError, match="learns masks, but dataloader.train.mapper is a OwnMapper"):
        check_labels(student, loaders)
    detector = build("retinanet")
    detector.input_format = "BGR"
    detector.pixel_mean.fill_(100.0)
    with pytest.raises(UserError, match="train.mapper.image_format is RGB, but the student takes"):
        check_image_format(detector, loaders)


def make_teacher(**kwargs):
    return FrozenTeacher(model=build(seed=1), allow_random=True, precision="fp32", **kwargs)


def make_model():
    head = DFDHead(criterion=DFDLoss(lenient="context"), adapter="conv1x1")
    return DistilledDetector(student=build(), teacher=make_teacher(), head=head)


def test_adapter_not_in_the_optimizer():
    model = make_model()
    check_optimizer(model, torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(UserError, match=r"holds 30 .* not exactly once \(head.adapters"):
        check_optimizer(model, torch.optim.SGD(model.student.parameters(), lr=1))


def test_parameter_in_two_groups():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    optimizer.param_groups.append({"params": [model.head.adapters["p3"].weight]})
    with pytest.raises(UserError, match="head.adapters.p3.weight"):
        check_optimizer(model, optimizer)


def test_teacher_in_the_optimizer():
    model = make_model()
    groups = [*model.parameters(), *model.teacher.model.parameters()]
    with pytest.raises(UserError, match="that are not the model's"):
        check_optimizer(model, torch.optim.SGD(groups, lr=1))


def test_frozen_student_parameters_need_not_be_in_the_optimizer():
    model = make_model()
    model.student.backbone.bottom_up.stem.requires_grad_(False)
    check_optimizer(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
    )


def test_classes_that_agree_pass():
    check_classes(build(), make_teacher(class_names=CLASSES), CLASSES, CLASSES)
    check_classes(build("retinanet"), None, CLASSES, CLASSES)


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
def test_student_classes_are_known_whatever_its_kind(kind):
    with pytest.raises(UserError, match="the student has 3 classes, the data 4"):
        check_classes(build(kind), None, [*CLASSES, "x"], [*CLASSES, "x"])


def test_teacher_of_other_classes_only_where_the_config_says_so():
    other = ["a", "b", "c"]
    with pytest.raises(UserError, match="the teacher's classes are"):
        check_classes(build(), make_teacher(class_names=other), CLASSES, CLASSES)
    check_classes(build(), make_teacher(class_names=other, check_classes=False), CLASSES, CLASSES)


def test_norms_that_only_cuda_can_synchronise(monkeypatch):
    """DistributedDataParallel says so by a traceback from each process."""
    model = torch.nn.Sequential(torch.nn.SyncBatchNorm(4))
    check_synchronised_norms(model, on_cuda=False)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    check_synchronised_norms(model, on_cuda=True)
    check_synchronised_norms(torch.nn.BatchNorm2d(4), on_cuda=False)
    with pytest.raises(UserError, match="SyncBatchNorm, which several processes can have on CUDA"):
        check_synchronised_norms(model, on_cuda=False)


@pytest.mark.parametrize(
    ("kind", "part", "refused"),
    [
        ("faster_rcnn", "heads", True),
        ("faster_rcnn", "roi_heads.box_predictor.", True),
        ("faster_rcnn", "roi_heads.box_head.", False),
        ("faster_rcnn", "proposal_generator", False),
        ("retinanet", "heads", True),
        ("retinanet", "head.bbox_pred.", False),
        ("yolox", "heads", True),
        ("reppoints", "heads", True),
    ],
)
def test_a_classifier_of_other_classes_is_not_inherited(kind, part, refused):
    """Its shape would fit."""
    own = {"yolox": lambda: YOLOX(depth=0.33, width=0.125, num_classes=3)}
    own["reppoints"] = small_detector
    model, other = ([own.get(kind, lambda: build(kind))() for _ in range(2)])
    report = inherit_weights(model, other, [part])
    strange = FrozenTeacher(
        model=other, allow_random=True, class_names=["a", "b", "c"], check_classes=False
    )
    if refused:
        with pytest.raises(UserError, match="would start from the teacher's classes"):
            check_inherited_classes(report, strange, CLASSES)
    else:
        check_inherited_classes(report, strange, CLASSES)
    strange.class_names = CLASSES
    check_inherited_classes(report, strange, CLASSES)


def test_images_without_labels_need_a_teacher():
    loaders = OmegaConf.create({"train": {"unlabelled": "some_photographs"}})
    with pytest.raises(UserError, match="no model.teacher, and nothing else can learn from them"):
        check_unlabelled(build(), loaders)
    head = DFDHead(criterion=DFDLoss())
    check_unlabelled(DistilledDetector(student=build(), teacher=make_teacher(), head=head), loaders)
    check_unlabelled(build(), OmegaConf.create({"train": {"unlabelled": None}}))


@pytest.mark.parametrize("criterion", [FGDLoss, DFDLoss])
def test_criteria_of_boxes_beside_images_that_have_none_are_told(criterion, caplog):
    loaders = OmegaConf.create({"train": {"unlabelled": "some_photographs"}})
    made = criterion(channels=16) if criterion is FGDLoss else criterion()
    head = DFDHead(criterion=made)
    check_unlabelled(DistilledDetector(student=build(), teacher=make_teacher(), head=head), loaders)
    assert ("FGDLoss weighs objects by their boxes" in caplog.text) == (criterion is FGDLoss)


def test_training_data_are_known_by_their_labels_and_told_from_test_data(tmp_path, caplog):
    train, test = (
        dict(text.removeprefix("dataset.").split("=", 1) for text in write_coco(tmp_path, name, 2))
        for name in ("train", "val")
    )

    def known(train, test):
        data = {
            split: {"dataset": {"_target_": "dfd.data.coco_json", **where}}
            for split, where in (("train", train), ("test", test))
        }
        return data_hashes(OmegaConf.create({"dataloader": data}))

    first = known(train, test)
    again = known(train, train | {"num_images": 1})
    assert again[TRAINING_DATA] == first[TRAINING_DATA] and again[TEST_DATA] != first[TEST_DATA]
    assert "1 of the 1 test images are training images too" in caplog.text
    content = json.loads(Path(train["json"]).read_text())
    content["annotations"][0]["bbox"][2] += 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    assert known(train | {"json": str(other)}, test)[TRAINING_DATA] != first[TRAINING_DATA]


def test_weights_of_another_form_are_told(caplog):
    form = {"backbone": {"net": {"num_heads": 2, "drop_path_rate": 0.1}}, "num_classes": 3}
    settings = {"model.student.backbone.net.num_heads": "2", "model.student.num_classes": "80"}
    settings |= {"model.student.backbone.net.drop_path_rate": "0"}  # Of training alone.
    weights = WeightFile("t.pth", "", {}, None, settings)
    tell_other_form(OmegaConf.create(form), weights, "here")
    tell_other_form(OmegaConf.create(form), WeightFile("t.pth", "", {}), "here")  # Of others.
    assert not caplog.text
    form["backbone"]["net"]["num_heads"] = 4
    tell_other_form(OmegaConf.create(form), weights, "here")
    assert "t.pth was trained with backbone.net.num_heads 2, the config has 4" in caplog.text


def test_a_trunk_of_which_a_part_was_loaded_is_told(tmp_path, caplog):
    student = build()
    weights = student.state_dict()
    left = [key for key in weights if key.startswith("backbone.bottom_up.res5.")]
    for key in left:
        del weights[key]
    torch.save({"model": weights}, tmp_path / "w.pth")
    StudentCheckpointer(build(seed=1), "", class_names=[]).load(
        str(tmp_path / "w.pth"), checkpointables=[]
    )
    assert "holds a part of the student's trunk alone" in caplog.text
    caplog.clear()
    # All of a trunk and nothing of the pyramid, as ImageNet's weights, is nothing to tell.
    weights = student.state_dict()
    trunk = {k: v for k, v in weights.items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": trunk}, tmp_path / "w.pth")
    StudentCheckpointer(build(seed=1), "", class_names=[]).load(
        str(tmp_path / "w.pth"), checkpointables=[]
    )
    assert "holds a part of" not in caplog.text


def test_peak_memory_may_begin_anew():
    # Not a tensor, whose memory an allocator may keep.
    with mmap.mmap(-1, 2**28) as big:
        big.write(bytes(2**28))
        peak = peak_memory_mib()
    forget_peak_memory()
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert peak_memory_mib() < peak - 100


def test_images_are_counted_not_batches():
    images = list(range(100))
    assert count_images(DataLoader(images, batch_size=10)) == 100
    assert count_images(images) == 100
    assert count_images(iter(images)) is None


def test_empty_or_absent_output_folder_is_fine(tmp_path):
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "absent"))
    (tmp_path / "log.txt").write_text("of an evaluation")
    check_output_dir(str(tmp_path))
