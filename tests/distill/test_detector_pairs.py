"""YOLOX and RepPoints as students and as teachers, of each other and of the other kinds."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from own_toys import CONFIGS, build
from toys import instantiate_seeded, make_batch
from vit_toys import timm_vit_config

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.engine.state.checkpoint import StudentCheckpointer
from dfd.losses import CWDLoss, DFDLoss, FGDLoss
from dfd.modeling import YOLOX
from dfd.weights.strict import read_weights

pytestmark = pytest.mark.slow

LEVELS = {
    "faster_rcnn": range(2, 7),
    "vit": range(2, 7),
    "retinanet": range(3, 8),
    "reppoints": range(3, 8),
    "yolox": range(3, 6),
}
NEW = ("reppoints", "yolox")
PAIRS = [(t, s) for t in LEVELS for s in LEVELS if t in NEW or s in NEW]


def config(kind):
    return timm_vit_config() if kind == "vit" else CONFIGS[kind]()


def pair(teacher, student, precision="fp32", **head):
    head.setdefault("criterion", DFDLoss())
    return DistilledDetector(
        student=instantiate_seeded(config(student), 0),
        teacher=FrozenTeacher(
            model=instantiate_seeded(config(teacher), 1), allow_random=True, precision=precision
        ),
        head=DFDHead(**head),
    )


def step(model, batch):
    model.train()
    with EventStorage(0):
        losses = model(batch)
        sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    return losses


@pytest.mark.parametrize("teacher, student", PAIRS)
def test_pair_trains_and_evaluates(teacher, student):
    model = pair(teacher, student)
    batch = make_batch([(70, 90), (64, 100)])
    losses = step(model, batch)
    shared = sorted(set(LEVELS[teacher]) & set(LEVELS[student]))
    assert [n for n in losses if n.startswith("loss_dfd_")] == [f"loss_dfd_p{i}" for i in shared]
    assert {pair.stride for pair in model.head.pairs} == {2**i for i in shared}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in model.teacher.model.parameters())
    for module in model.modules():
        for name in ("test_score_thresh", "score_thresh"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    found, alone = model.eval()(batch), model.student(batch)
    assert sum(len(output["instances"]) for output in found) > 0
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


@pytest.mark.parametrize("kind", NEW)
def test_in_mixed_precision_under_a_teacher_in_bf16(kind):
    model, batch = pair(kind, kind, precision="bf16"), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, batch)
    assert any(loss > 0 for name, loss in losses.items() if name.startswith("loss_dfd_"))
    exact = FrozenTeacher(model=model.teacher.model, allow_random=True, precision="fp32")
    low, full = (teacher(batch, input_format="BGR") for teacher in (model.teacher, exact))
    # A norm over a level of one cell has little to go by.
    for name in ("p3", "p4"):
        difference = (low[name].float() - full[name]).abs().mean()
        assert difference < 0.03 * full[name].abs().mean()


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("objects", ["none", "without area"])
def test_batch_without_an_object_trains(kind, objects):
    model, batch = pair("faster_rcnn", kind), make_batch()
    for item in batch:
        if objects == "none":
            item["instances"] = item["instances"][:0]
        else:
            item["instances"].gt_boxes.tensor[:, 2:] = item["instances"].gt_boxes.tensor[:, :2]
    step(model, batch)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# After the stems of a YOLOX's head, as FGD has it.


def outputs_of(module, run):
    seen = {}
    handle = module.register_forward_hook(lambda m, args, out: seen.update(out))
    run()
    handle.remove()
    return seen


def test_stems_are_distilled_where_there_are_some():
    model = pair("yolox", "yolox", stems=True, criterion=FGDLoss())
    batch = make_batch()
    channels = {shape.channels for shape in model.student.head.stems.output_shape().values()}
    assert {(p.student_channels, p.teacher_channels) for p in model.head.pairs} == {
        (c, c) for c in channels
    }
    given = {}
    criterion = next(iter(model.head.criteria.values()))
    criterion.register_forward_hook(lambda m, args, out: given.update(level=args[0]))
    student = outputs_of(model.student.head.stems, lambda: step(model, batch))
    teacher = model.teacher.model
    theirs = outputs_of(teacher.head.stems, lambda: teacher(batch))
    first = model.head.pairs[0].name
    level = given["level"]
    for x, expected in ((level.student, student[first]), (level.teacher, theirs[first])):
        rows, columns = x.shape[-2:]
        torch.testing.assert_close(x, expected[..., :rows, :columns])
    # By default it is the pyramid itself.
    model = pair("yolox", "yolox")
    assert {p.student_channels for p in model.head.pairs} != channels
    assert len(step(model, batch)) > 3


def test_stems_of_a_student_under_a_teacher_without():
    model = pair("retinanet", "yolox", stems=True, criterion=CWDLoss())
    assert [p.name for p in model.head.pairs] == ["p3", "p4", "p5"]
    step(model, make_batch())
    assert set(model.disparity_maps(make_batch())) == {"p3", "p4", "p5"}
    with pytest.raises(UserError, match="neither the student, a RetinaNet, nor the teacher, a Gen"):
        pair("faster_rcnn", "retinanet", stems=True)


# Files as others write them.


def test_file_of_the_authors_is_a_teacher_as_it_is(tmp_path):
    model = build("yolox", seed=3)
    content = {"start_epoch": 300, "model": model.state_dict(), "optimizer": {}, "best_ap": 0.5}
    torch.save(content, tmp_path / "yolox.pth")
    teacher = FrozenTeacher(model=build("yolox", seed=4), checkpoint=str(tmp_path / "yolox.pth"))
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize(
    "meta", [{"CLASSES": ("a", "b")}, {"dataset_meta": {"classes": ["a", "b"]}}], ids=["2", "3"]
)
def test_file_of_mmdetection_is_read_and_tells_its_classes(tmp_path, monkeypatch, meta):
    """As a teacher's, and as the start of a student; in the layout that the detector converts."""
    model, path = build("yolox", seed=3), str(tmp_path / "mm.pth")
    state = {f"theirs.{key}": value for key, value in model.state_dict().items()}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {}}, path)
    assert read_weights(path, "weights").class_names == ["a", "b"]
    monkeypatch.setattr(
        YOLOX,
        "convert_weights",
        lambda self, state: {key.removeprefix("theirs."): state[key] for key in state},
    )
    teacher = FrozenTeacher(model=build("yolox", seed=4), checkpoint=path)
    assert teacher.class_names == ["a", "b"]
    student = build("yolox", seed=5)
    StudentCheckpointer(student, str(tmp_path), class_names=["a", "b"]).load(path)
    for key, value in model.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[key], value), key
        assert torch.equal(student.state_dict()[key], value), key
