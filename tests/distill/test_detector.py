import contextlib
import copy

import pytest
import torch
from detectron2.evaluation import inference_context
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from own_toys import CONFIGS, build
from torch import nn
from toys import make_batch

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.distill.contract import UNLABELLED
from dfd.distill.detector import batch_statistics
from dfd.losses import DFDLoss, FeatureCriterion, G2SDLoss


def distilled(student=None, teacher=None, criterion=None, inherit=(), **head):
    student = student or build(seed=0)
    teacher = FrozenTeacher(model=teacher or build(seed=1), allow_random=True, precision="fp32")
    head = DFDHead(criterion=criterion or DFDLoss(), **head)
    return DistilledDetector(student=student, teacher=teacher, head=head, inherit=inherit)


def train_step(model, batch, iteration=0):
    model.train()
    with EventStorage(iteration) as storage:
        losses = model(batch)
        sum(losses.values()).backward()
    return losses, storage


def assert_same_detections(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        a, b = a["instances"], b["instances"]
        assert isinstance(a, Instances)
        assert len(a) == len(b)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        torch.testing.assert_close(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_student_trains_and_evaluates(kind):
    student = build(kind)
    plain = copy.deepcopy(student)
    model = distilled(student)
    batch = make_batch(masks=kind == "mask_rcnn")
    losses, _ = train_step(model, batch)
    finest = "p2" if "rcnn" in kind else "p3"
    task = {name for name in losses if not name.startswith("loss_dfd_")}
    with EventStorage(0):
        plain.train()
        assert task == set(plain(batch))
    assert f"loss_dfd_{finest}" in losses
    # The teacher has p2 to p6; a dense student p3 to p7, YOLOX p3 to p5.
    shared = 5 if "rcnn" in kind else 3 if kind == "yolox" else 4
    assert len(losses) - len(task) == shared
    stem = [p for name, p in student.backbone.named_parameters() if ".stem." in name]
    assert stem[0].grad.abs().sum() > 0

    model.eval()
    student.eval()
    for module in student.modules():
        for name in ("test_score_thresh", "score_thresh"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    found = model(batch)
    assert sum(len(x["instances"]) for x in found) > 0
    assert_same_detections(found, student(batch))


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"fcos"}))
def test_mixed_precision_step_of_every_kind(kind):
    """FCOS is refused at the start: Detectron2's own losses of it fail under autocast."""
    model = distilled(build(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = train_step(model, make_batch(masks=kind == "mask_rcnn"))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("student_format", ["BGR", "RGB"])
def test_teacher_is_told_the_order_of_the_batch(student_format):
    student, teacher = build(seed=0), build(seed=1)
    for model in (student, teacher):
        model.pixel_mean = torch.tensor([10.0, 60, 200]).view(3, 1, 1)
    student.input_format, teacher.input_format = student_format, "BGR"
    model = distilled(student, teacher)
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = make_batch()
    train_step(model, batch)
    turned = [
        {"image": x["image"].flip(0) if student_format == "RGB" else x["image"]} for x in batch
    ]
    torch.testing.assert_close(seen[0], teacher.preprocess_image(turned).tensor)


def test_one_preprocessing_for_both_models():
    """Mean, deviation and padding of either's input are its own."""
    student, teacher = build(seed=0), build(seed=1)
    student.pixel_mean = torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    teacher.pixel_mean = torch.tensor([10.0, 60, 200]).view(3, 1, 1)
    teacher.pixel_std = torch.tensor([1.0, 5, 50]).view(3, 1, 1)
    teacher.backbone._square_pad = 128
    model = distilled(student, teacher)
    seen = {}
    for name, detector in (("student", student), ("teacher", teacher)):
        detector.backbone.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    batch = make_batch()
    train_step(model, batch)
    for name, detector in (("student", student), ("teacher", teacher)):
        torch.testing.assert_close(seen[name], detector.preprocess_image(batch).tensor)
    assert seen["student"].shape != seen["teacher"].shape


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_flips_the_student_to_train(training):
    model = distilled().train(training)
    with inference_context(model):
        model(make_batch())
        assert not any(module.training for module in model.modules())
    assert model.training is training and model.student.training is training
    assert not any(module.training for module in model.teacher.model.modules())


def test_distillation_loss_absent_because_the_backbone_did_not_run():
    """Or ran twice, and it would be chance which pyramid is distilled."""
    for calls in (0, 2):
        student = build()
        student.forward = lambda batch, calls=calls, student=student: {
            f"loss_{i}": student.backbone(student.preprocess_image(batch).tensor)["p2"].sum()
            for i in range(calls)
        }
        with pytest.raises(UserError, match=f"FPN ran {calls} times"):
            train_step(distilled(student), make_batch())


@pytest.mark.parametrize("share", [1.0, None])
def test_head_that_changes_the_pyramid_in_place_is_refused(share):
    """Else the student's features after its ReLU would be compared with the teacher's before."""
    student = build("retinanet")
    student.head.register_forward_pre_hook(
        lambda module, args: ([args[0][0].relu_()] + args[0][1:],)
    )
    with pytest.raises(UserError, match=r"what follows FPN changes p3 in place.*inplace=False"):
        train_step(distilled(student, gradient_share=share), make_batch())


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "resized", [lambda x: x[..., ::2, ::2], lambda x: x.repeat(1, 1, 2, 2)], ids=["less", "more"]
)
def test_stride_that_is_not_the_declared_one_is_refused(side, resized):
    """Else the student's whole image would be compared with the teacher's upper left quarter."""
    models = {"student": build(seed=0), "teacher": build(seed=1)}
    backbone = models[side].backbone
    forward = backbone.forward
    backbone.forward = lambda x: {k: resized(v) for k, v in forward(x).items()}
    with pytest.raises(UserError, match=r"FPN puts out .* cells on p2 .* the stride of 4 in its"):
        train_step(distilled(**models), make_batch())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_detector_that_resizes_its_images_is_refused(side):
    """Else the cells of one would be compared with other places of the other's image."""
    models = {"student": build(seed=0), "teacher": build(seed=1)}
    preprocess = models[side].preprocess_image

    def larger(batch):
        return preprocess([{"image": item["image"].repeat(1, 2, 2)} for item in batch])

    models[side].preprocess_image = larger
    match = rf"the {side}'s preprocess_image makes 128 x 192 pixels of an image of 64 x 96"
    with pytest.raises(UserError, match=match):
        train_step(distilled(**models), make_batch())


def test_detector_that_shrinks_large_images_alone_is_refused():
    """The first batch may have none."""
    student = build()
    preprocess = student.preprocess_image

    def shrunk(batch):
        images = [item["image"] for item in batch]
        return preprocess([{"image": x[:, ::2, ::2] if x.shape[1] > 100 else x} for x in images])

    student.preprocess_image = shrunk
    model = distilled(student)
    train_step(model, make_batch())
    with pytest.raises(UserError, match="makes 64 x 64 pixels of an image of 128 x 128"):
        train_step(model, make_batch([(128, 128)]))


@pytest.mark.parametrize("output", [list, dict])
def test_output_that_is_not_the_declared_one_is_refused(output):
    student = build()
    forward = student.backbone.forward
    student.backbone.forward = lambda x: output(list(forward(x).items())[:2])
    with pytest.raises(UserError, match=r"FPN puts out .*output_shape\(\) says \['p2', 'p3'"):
        train_step(distilled(student), make_batch())


def test_level_left_out_for_want_of_a_partner_is_told(caplog):
    distilled(build("retinanet"))  # p3 to p7; the teacher has p2 to p6.
    assert "Not distilled, for the teacher has no level of that stride: p7" in caplog.text


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_padding_constraint_with_a_misspelt_key_pads_nothing(side):
    """Detectron2's SimpleFeaturePyramid asks for sizes that can be divided by 32, in vain."""
    vit = ViT(img_size=64, embed_dim=16, depth=1, num_heads=2, out_feature="last_feat")
    detectors = {"student": build(seed=0), "teacher": build(seed=1)}
    detectors[side].backbone = SimpleFeaturePyramid(
        vit, "last_feat", 8, scale_factors=(4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool()
    )
    model = distilled(**detectors)
    with pytest.raises(UserError, match=f"64 x 90 pixels .* the 32 that the {side}'s backbone"):
        train_step(model, make_batch(sizes=((64, 90), (40, 64))))
    losses, _ = train_step(model, make_batch(sizes=((64, 96), (40, 64))))
    assert losses["loss_dfd_p3"].isfinite()


def test_teacher_of_another_kind_width_levels_statistics_order_and_padding():
    from detectron2.config import instantiate
    from toys import faster_rcnn_config

    config = faster_rcnn_config(channels=12)
    config.backbone.square_pad = 128
    config.pixel_mean, config.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    config.input_format = "RGB"
    model = distilled(build("retinanet"), instantiate(config))
    batch = make_batch()
    losses, storage = train_step(model, batch)
    assert {k for k in losses if k.startswith("loss_dfd")} == {
        f"loss_dfd_p{i}" for i in (3, 4, 5, 6)
    }
    assert all(loss.isfinite() for loss in losses.values())
    # The teacher pads to 128 x 128, the student to 96 x 96 or so: still cell on cell.
    maps = model.disparity_maps(batch)
    assert [tuple(maps["p3"][0].shape), tuple(maps["p3"][1].sum((1, 2)).tolist())] == [
        (2, 10, 12),
        (8 * 12, 10 * 8),
    ]
    model.eval()
    model(batch)


def test_task_losses_are_the_students_own():
    batch = make_batch()
    student = build()
    plain = copy.deepcopy(student)
    model = distilled(student)
    torch.manual_seed(5)
    losses, _ = train_step(model, batch)
    torch.manual_seed(5)
    expected, _ = train_step(plain, batch)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


def test_teacher_is_in_no_state_dict_parameter_or_module():
    model = distilled()
    teacher_tensors = {id(t) for t in model.teacher.model.state_dict(keep_vars=True).values()}
    assert not any("teacher" in key for key in model.state_dict())
    assert not any("teacher" in name for name, _ in model.named_modules())
    assert not any(id(p) in teacher_tensors for p in model.parameters())


def test_train_never_reaches_the_teacher():
    model = distilled()
    train_step(model, make_batch())
    assert not any(module.training for module in model.teacher.model.modules())


def test_student_class_is_untouched():
    student = build()
    train_step(distilled(student), make_batch())
    assert type(student).__module__.startswith("detectron2.")
    assert len(student.backbone._forward_hooks) == 0


def test_teacher_padding_to_a_square_adds_no_cells():
    batch = make_batch(sizes=((64, 64), (64, 64)))
    model = distilled()
    model.eval()
    maps = model.disparity_maps(batch)
    model.teacher.model.backbone._square_pad = 128
    padded = model.disparity_maps(batch)
    for name, (_, valid) in maps.items():
        assert valid.shape == padded[name][1].shape
        assert torch.equal(valid, padded[name][1])


def test_logged_per_level():
    losses, storage = train_step(distilled(), make_batch())
    logged = {name: value for name, (value, _) in storage.latest().items()}
    for level in ("p2", "p6"):
        for what in ("disparity", "share_low", "share_high", "term_low", "term_high", "ratio"):
            assert f"dfd/{level}/{what}" in logged
        assert logged[f"dfd/{level}/share_low"] + logged[
            f"dfd/{level}/share_high"
        ] == pytest.approx(1)
    task = sum(v.item() for k, v in losses.items() if not k.startswith("loss_dfd"))
    assert logged["dfd/p2/ratio"] == pytest.approx(losses["loss_dfd_p2"].item() / task, rel=1e-5)
    total = sum(v.item() for k, v in losses.items() if k.startswith("loss_dfd"))
    assert logged["dfd/ratio"] == pytest.approx(total / task, rel=1e-5)


@pytest.mark.parametrize("settings", [dict(weight=0.0), dict(end_iter=3)])
def test_switched_off_distillation_does_not_run_the_teacher(settings, monkeypatch):
    model = distilled(criterion=DFDLoss(lenient="context"), adapter="conv1x1", **settings)
    monkeypatch.setattr(model.teacher, "model", None)
    losses, _ = train_step(model, make_batch(), iteration=3)
    assert not any(name.startswith("loss_dfd_p") for name in losses)
    # Or DistributedDataParallel would wait for them in vain.
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize("unlabelled", [False, True])
def test_features_of_a_side_stream_are_read_once_it_has_been_waited_for(unlabelled, monkeypatch):
    """Else the loss would be of whatever lies there: the kernels have only been queued."""
    events = []

    class Recorder:
        @contextlib.contextmanager
        def work(self):
            events.append("away")
            yield
            events.append("back")

        def join(self):
            events.append("join")

    model = distilled()
    monkeypatch.setattr(model, "_side", Recorder())
    for name in ("student", "head"):
        part = getattr(model, name)
        part.register_forward_pre_hook(lambda *_, name=name: events.append(name))
    run = FrozenTeacher._run
    monkeypatch.setattr(
        FrozenTeacher, "_run", lambda *a, **k: events.append("teacher") or run(*a, **k)
    )
    batch = make_batch()
    if unlabelled:
        batch.append({"image": batch[0]["image"], UNLABELLED: True})
    train_step(model, batch)
    passes = 1 + unlabelled
    assert events == ["away", *["teacher"] * passes, "back", "student", "join", *["head"] * passes]


def test_overlap_elsewhere_than_on_cuda_is_said_once(caplog):
    losses = []
    for overlap in (True, False):
        torch.manual_seed(0)
        model = distilled()
        model.overlap = overlap
        losses.append([train_step(model, make_batch())[0] for _ in range(2)])
    assert losses[0] == losses[1]
    assert caplog.text.count("model.overlap has no effect on cpu") == 1


def _of(result):
    class Own(FeatureCriterion):
        def forward(self, level):
            self.stats = {"half": 0.5}
            return result(level)

    return Own()


class Weighing(FeatureCriterion):
    """Its loss has a gradient, of a parameter of its own alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, level):
        return (self.scale * level.student.detach() - level.teacher).square().mean()


class Stats(FeatureCriterion):
    def forward(self, level):
        self.stats = {"map": level.student.detach()}
        return level.student.mean()


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (_of(lambda level: level.student.mean(dim=(1, 2, 3))), r"returns shape \(2,\)"),
        (_of(lambda level: 1.5), "returns float"),
        (_of(lambda level: None), "returns NoneType"),
        (_of(lambda level: level.student.detach().mean()), "without a gradient"),
        (Weighing(), "without a gradient"),
        (Stats(), r"stats\['map'\] of model.head.criterion, a Stats, is \(2, "),
    ],
)
def test_criterion_that_gives_no_loss_is_refused(criterion, said):
    """One without a gradient would be logged for the whole training, and teach nothing."""
    with pytest.raises(UserError, match=said):
        train_step(distilled(criterion=criterion), make_batch())


def test_criterion_below_zero_with_plain_numbers_in_its_stats_is_one_like_others():
    model = distilled(criterion=_of(lambda level: -level.student.square().mean()))
    for iteration in range(12):
        _, storage = train_step(model, make_batch(), iteration)
    assert storage.latest()["dfd/p3/half"][0] == 0.5


class Dropping(nn.Sequential):
    """An adapter that draws in training, and has statistics."""

    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.Dropout(0.5)
        )


def test_a_level_of_one_cell_has_no_disparity_to_tell():
    """One value that is standardised by itself is 0 on both sides: it would look learnt."""
    maps = distilled(criterion=DFDLoss(scale="channel")).disparity_maps(make_batch([(64, 64)]))
    assert not maps["p6"][1].any() and maps["p5"][1].all()


def test_pictures_draw_nothing_and_leave_the_model_as_it_was():
    """Else a run with them would be another one."""
    model = distilled(adapter=Dropping).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert set(model.disparity_maps(make_batch())) == {"p2", "p3", "p4", "p5", "p6"}
    assert torch.equal(torch.rand(1), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training
    assert all(module.training for part in (model.head, model.student) for module in part.modules())


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (nn.Conv2d(8, 8, 1), "is a Conv2d: each level needs one of its own"),
        (lambda i, o: None, "returns a NoneType for"),
        (lambda i, o: nn.Conv2d(i, o + 1, 1), r"makes \(2, 9, .* it must make \(2, 8, "),
    ],
)
def test_adapter_that_makes_something_else_is_refused(adapter, said):
    with pytest.raises(UserError, match=said):
        train_step(distilled(adapter=adapter), make_batch())


def _student_that_returns_more():
    """As Sparse R-CNN's, whose preprocess_image gives sizes beside the images."""
    student = build()
    preprocess = student.preprocess_image

    class Pair(tuple):
        tensor = property(lambda self: self[0].tensor)
        image_sizes = property(lambda self: self[0].image_sizes)

    student.preprocess_image = lambda batch: Pair((preprocess(batch), None))
    return student


def _student_with_more_than_maps():
    student = build()
    forward = student.backbone.forward
    student.backbone.forward = lambda x: forward(x) | {"aux": None}
    return student


def _student_that_pads_for_itself():
    student = build()
    forward = student.backbone.forward
    student.backbone.forward = lambda x: forward(nn.functional.pad(x, (0, 64 - x.shape[-1] % 64)))
    return student


@pytest.mark.parametrize("share", [1.0, None])
@pytest.mark.parametrize(
    "student",
    [_student_that_returns_more, _student_with_more_than_maps, _student_that_pads_for_itself],
)
def test_unusual_students_that_are_right_are_let_through(student, share):
    losses, _ = train_step(distilled(student(), gradient_share=share), make_batch())
    assert losses["loss_dfd_p2"] > 0


def test_what_happens_to_levels_that_are_not_distilled_does_not_matter():
    student = build("retinanet")
    student.head.register_forward_pre_hook(
        lambda module, args: (args[0][:-1] + [args[0][-1].relu_()],)
    )
    losses, _ = train_step(distilled(student, levels=["p3"]), make_batch())
    assert losses["loss_dfd_p3"] > 0


def test_levels_that_are_frozen_are_told(caplog):
    """Their loss would be logged, and change nothing."""
    model = distilled(trunk=True)
    for name in ("stem", "res2"):
        getattr(model.student.backbone.bottom_up, name).requires_grad_(False)
    for _ in range(2):
        train_step(model, make_batch())
    assert caplog.text.count("Distilled in vain, for the student's res2 are frozen") == 1


def test_distillation_loss_that_is_always_zero_is_noticed():
    student = build(seed=0)
    model = distilled(student, copy.deepcopy(student), criterion=DFDLoss(lenient_on="none"))
    model.train()
    for module in model.modules():
        module.eval()  # Else batch norms would tell the two apart.
    model.training = True
    student.training = student.roi_heads.training = student.proposal_generator.training = True
    batch = make_batch()
    with EventStorage(0), pytest.raises(UserError, match="was 0 for 11 iterations"):
        for _ in range(11):
            model(batch)


def test_student_rgb_with_bgr_ordered_mean():
    student = build()
    student.input_format = "RGB"
    with pytest.raises(UserError, match="student takes RGB images, but its pixel_mean"):
        distilled(student)


@pytest.mark.parametrize("use", ["train", "evaluate", "picture"])
def test_single_image_cropped_by_the_students_square_padding(use):
    student = build()
    student.backbone._square_pad = 64
    model = distilled(student)
    batch = make_batch(sizes=((64, 96),))
    with pytest.raises(UserError, match="student's backbone pads to"):
        if use == "train":
            train_step(model, batch)
        elif use == "evaluate":
            model.eval()(batch)
        else:
            model.disparity_maps(batch)


def test_pictures_wait_for_no_other_process():
    """Only the main process draws them, so synchronised norms must not meet the others there."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2), NaiveSyncBatchNorm(2)).train()
    with batch_statistics(model):
        assert [module.training for module in model] == [True, False, False]
    assert all(module.training for module in model.modules())


def test_pyramids_without_a_common_stride_list_both_sides():
    from detectron2.config import instantiate
    from toys import dense_config, faster_rcnn_config

    student = dense_config("fcos")
    student.backbone.in_features = ["res5"]
    student.backbone.bottom_up.out_features = ["res5"]
    student.head_in_features = ["p5", "p6", "p7"]
    teacher = faster_rcnn_config()
    teacher.backbone.top_block = None
    teacher.backbone.in_features = ["res2", "res3"]
    teacher.backbone.bottom_up.out_features = ["res2", "res3"]
    with pytest.raises(UserError, match=r"share no stride.*student: p5.*teacher: p2 \(stride 4"):
        distilled(instantiate(student), instantiate(teacher))


def test_first_disparity_is_measured_on_the_batchs_own_statistics():
    """Untouched running statistics would make the first picture all of one colour."""
    model = distilled().eval()
    expected = model.disparity_maps(make_batch())
    for name, buffer in model.student.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1e6)
    for name, (disparity, _) in model.disparity_maps(make_batch()).items():
        torch.testing.assert_close(disparity, expected[name][0])


def test_inheritance_happens_when_asked_for():
    model = distilled(inherit=["fpn_output"])
    assert distilled().inherit_from_teacher() is None
    key = "backbone.fpn_output3.weight"
    teacher = model.teacher.model.state_dict()[key]
    assert not torch.equal(model.student.state_dict()[key], teacher)
    report = model.inherit_from_teacher()
    assert key in report.inherited
    assert torch.equal(model.student.state_dict()[key], teacher)


def test_boxes_are_those_of_the_batch_in_input_pixels():
    model = distilled()
    given = []
    original = model.head.forward
    model.head.forward = lambda *args, **kwargs: given.append(kwargs) or original(*args, **kwargs)
    batch = make_batch()
    train_step(model, batch)
    for boxes, item in zip(given[0]["boxes"], batch, strict=True):
        assert torch.equal(boxes, item["instances"].gt_boxes.tensor)
    assert given[0]["image_sizes"] == [(64, 96), (80, 64)]


def test_criterion_gets_the_teachers_objectness_of_the_same_level():
    seen = {}

    class Spy(G2SDLoss):
        def forward(self, level):
            seen[level.teacher.shape[-2:]] = (level.teacher, level.objectness)
            return super().forward(level)

    model = distilled(criterion=Spy())
    batch = make_batch()
    losses, _ = train_step(model, batch)
    assert losses["loss_dfd_p2"] > 0
    rpn = model.teacher.model.proposal_generator.rpn_head
    assert len(seen) == 5
    for teacher, objectness in seen.values():
        (logits,), _ = rpn([teacher])
        # A crop has another border, which a 3x3 convolution sees.
        inner = (slice(None), slice(0, -1), slice(0, -1))
        torch.testing.assert_close(objectness[inner], logits.sigmoid().amax(1)[inner])
