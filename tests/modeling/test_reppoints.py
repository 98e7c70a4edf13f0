"""RepPoints as a Detectron2 detector: training, evaluation, and what goes wrong elsewhere."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from reppoints_toys import BOXES, NUM_CLASSES, batch, detector, item, over_features, small_detector

from dfd import UserError
from dfd.modeling import P6P7, RepPoints, RepPointsHead
from dfd.modeling.reppoints import points_to_boxes

LOSSES = {"loss_cls", "loss_pts_init", "loss_pts_refine"}


@pytest.fixture(scope="module")
def small():
    return small_detector()


@pytest.fixture
def model(small):
    return copy.deepcopy(small)


def step(model, items):
    """The losses, after their gradients were left in the model."""
    model.train().zero_grad()
    losses = model(items)
    sum(losses.values()).backward()
    return {key: value.item() for key, value in losses.items()}


def assert_all_have_gradients(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_detector_that_trains(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        losses.append(step(model, batch()))
        assert_all_have_gradients(model)
        optimizer.step()
    assert set(losses[0]) == LOSSES
    assert all(value > 0 for value in losses[0].values())
    assert losses[-1]["loss_pts_init"] < 0.7 * losses[0]["loss_pts_init"]
    assert losses[-1]["loss_cls"] < 0.7 * losses[0]["loss_cls"]


@pytest.mark.parametrize(
    "head", [{"transform": "minmax"}, {"transform": "partial_minmax"}], ids=str
)
@pytest.mark.parametrize("settings", [{}, {"init_assigner": "max_iou"}], ids=str)
def test_variants_train(head, settings):
    model = small_detector(norm="", head=head, **settings)
    assert all(value > 0 for value in step(model, batch()).values())
    assert_all_have_gradients(model)


def test_same_weights_and_batch_give_the_same_bits(model):
    results = []
    for _ in range(2):
        one = copy.deepcopy(model)
        step(one, batch())
        results.append([p.grad for p in one.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_bf16_autocast(model):
    full = step(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch())
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        predictions = model.head([torch.randn(1, 64, 4, 4, dtype=torch.bfloat16)])
        assert all(levels[0].dtype == torch.float32 for levels in predictions)
        detections = model.eval()(batch())
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(full, rel=0.05)
    model.zero_grad()
    sum(losses.values()).backward()
    assert_all_have_gradients(model)
    assert len(detections) == 2


@pytest.mark.parametrize("boxes", [[], [[20.0, 20.0, 20.0, 20.0]], [[9.0, 30.0, 4.0, 40.0]]])
def test_a_batch_without_objects_trains(model, boxes):
    losses = step(model, batch(boxes))
    assert losses["loss_cls"] > 0
    assert losses["loss_pts_init"] == losses["loss_pts_refine"] == 0
    assert_all_have_gradients(model)


@pytest.mark.parametrize(
    "strange",
    [
        [8.0, 16.0, 8.0, 16.0],  # On a cell's point, which it would take from others.
        [10.0, 10.0, 10.0, 40.0],
        [30.0, 20.0, 10.0, 40.0],
        [float("nan"), 0.0, 10.0, 10.0],
    ],
)
def test_objects_without_area_are_left_out(model, strange):
    with_it = [item(64, 90, [strange, *BOXES], range(4))]
    without = [item(64, 90, BOXES, range(1, 4))]
    assert step(model, with_it) == step(model, without)


def test_an_object_outside_makes_one_cell_positive_at_most(model):
    far = [item(64, 90, [[1000.0, 1000.0, 1040.0, 1050.0]])]
    counts = []
    model.divisor = lambda positives: (counts.append(positives.item()), positives)[1]
    losses = step(model, far)
    # Nothing overlaps it: an image without a positive counts as one with one.
    assert set(counts) == {1}
    assert losses["loss_pts_refine"] == 0
    assert losses["loss_pts_init"] > 0
    assert_all_have_gradients(model)


def test_losses_are_divided_by_the_divisor_alone(model):
    items = batch()
    before = step(model, items)
    own = type(model).divisor
    model.divisor = lambda positives: 4 * own(model, positives)
    assert step(model, items) == pytest.approx({k: v / 4 for k, v in before.items()})
    # One image alone or with a second: only the divisor links them.
    model = over_features([torch.randn(2, 32, 8, 12), torch.randn(2, 32, 4, 6)], [8, 16])
    model.divisor = torch.ones_like
    both = model(batch())
    alone = []
    features = model.backbone.features
    for index in range(2):
        model.backbone.features = [feature[index : index + 1] for feature in features]
        alone.append(model([batch()[index]]))
    for key in LOSSES:
        assert both[key].item() == pytest.approx(sum(one[key].item() for one in alone), rel=1e-5)


def test_own_divisor():
    model = over_features([torch.randn(1, 32, 8, 12)], [8])
    assert model.divisor(torch.tensor(0.0)).item() == 1
    assert model.divisor(torch.tensor(7.0)).item() == 7


def test_cells_outside_of_an_images_own_padding_are_not_trained():
    """The second image is 33 x 20 pixels: 64 x 32 alone, but 64 x 96 in this batch."""
    torch.manual_seed(0)
    features = [torch.randn(2, 32, 8, 12), torch.randn(2, 32, 4, 6), torch.randn(2, 32, 2, 3)]
    model = over_features(features, [8, 16, 32])
    outputs = model.head(features)
    for level in (x for levels in outputs for x in levels):
        level.retain_grad()
    model.head.forward = lambda features: outputs
    # Both objects lie where the second image is nothing but padding.
    boxes = [[60.0, 8.0, 92.0, 40.0], [50.0, 0.0, 90.0, 60.0]]
    losses = model([item(64, 96, boxes), item(33, 20, boxes)])
    sum(losses.values()).backward()
    for level, columns in enumerate((4, 2, 1)):
        logits, first, second = (levels[level].grad.abs().sum(1) for levels in outputs)
        assert (logits[0] > 0).any(dim=0).all()
        inside = torch.arange(logits.shape[2]) < columns
        assert torch.equal((logits[1] > 0).any(dim=0), inside)
        assert (logits[1] > 0).any(dim=1).all()
        for grad in (logits, first, second):
            assert not grad[1, :, columns:].any()


def test_detections_are_rescaled_and_limited(model):
    torch.nn.init.normal_(model.head.reppoints_cls_out.weight, std=5.0)
    torch.nn.init.constant_(model.head.reppoints_cls_out.bias, 0.0)
    torch.nn.init.normal_(model.head.reppoints_pts_refine_out.bias, std=2.0)
    model.max_detections_per_image = 7
    model.eval()
    items = [item(64, 90, None), item(50, 64, None)]
    with torch.no_grad():
        plain = model(items)
        for record in items:
            record["height"], record["width"] = 2 * record["height"], 3 * record["width"]
        scaled = model(items)
    for one, other, (height, width) in zip(plain, scaled, ((64, 90), (50, 64)), strict=True):
        one, other = one["instances"], other["instances"]
        assert len(one) == 7
        assert one.image_size == (height, width)
        assert (one.scores > 0.05).all()
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)
        assert one.pred_classes.dtype == torch.int64
        assert set(one.pred_classes.tolist()) <= set(range(NUM_CLASSES))
        boxes = one.pred_boxes.tensor
        assert boxes.min() >= 0 and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        factors = torch.tensor([3.0, 2.0, 3.0, 2.0])
        torch.testing.assert_close(other.pred_boxes.tensor, boxes * factors)


def test_candidates_of_each_level_are_limited(model):
    torch.nn.init.constant_(model.head.reppoints_cls_out.bias, 5.0)
    torch.nn.init.normal_(model.head.reppoints_pts_refine_out.bias, std=2.0)
    model.test_topk_candidates, model.test_nms_thresh = 2, 1.0
    with torch.no_grad():
        found = model.eval()([item(128, 128, None)])[0]["instances"]
    assert 5 <= len(found) <= 2 * 5


def test_nothing_found(model):
    model.test_score_thresh = 0.99
    found = model.eval()(batch())
    assert [len(one["instances"]) for one in found] == [0, 0]


class NoDivisibility(Backbone):
    """A backbone that does not say what images must be padded to."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 8, stride=8)

    def forward(self, images):
        return {"p3": self.conv(images)}

    def output_shape(self):
        return {"p3": ShapeSpec(channels=32, stride=8)}


def test_images_are_normalised_and_padded_to_32(model):
    for one in (model, detector(NoDivisibility(), RepPointsHead(32, NUM_CLASSES))):
        images = one.preprocess_image([item(50, 65)])
        assert images.tensor.shape == (1, 3, 64, 96)
        assert images.image_sizes == [(50, 65)]
        expected = (item(50, 65)["image"] - one.pixel_mean) / one.pixel_std
        torch.testing.assert_close(images.tensor[0, :, :50, :65], expected)
        assert not images.tensor[..., 50:, :].any() and not images.tensor[..., 65:].any()
        step(one, batch())
    assert model.input_format == "RGB"
    assert not {"pixel_mean", "pixel_std"} & set(model.state_dict())


def test_pyramid_has_five_levels_and_no_relu(model):
    shapes = model.backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128
    }  # fmt: skip
    for norm in ("", "GN"):
        block = P6P7(16, 64, norm=norm)
        p6, p7 = block(torch.randn(2, 16, 5, 7))
        assert (p6.shape, p7.shape) == ((2, 64, 3, 4), (2, 64, 2, 2))
        assert p6.min() < 0
        torch.testing.assert_close(p7, block.p7(p6))
        assert (block.p6.bias is None) == (norm == "GN")


def test_first_points_feel_the_second_loss_through_the_samples_alone():
    """A tenth of it, and nothing where ``gradient_mul`` is 0."""
    norms = []
    for mul in (0.0, 0.1, 0.2):
        torch.manual_seed(0)
        head = RepPointsHead(32, NUM_CLASSES, feat_channels=64, gradient_mul=mul)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        _, _, second = head([torch.randn(1, 32, 4, 4)])
        second[0].square().sum().backward()
        grad = head.reppoints_pts_init_out.weight.grad
        norms.append(0.0 if grad is None else grad.norm().item())
    assert norms[0] == 0 and norms[1] > 0
    assert norms[2] == pytest.approx(2 * norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_points": 8}, "num_points is 8"),
        ({"num_points": 4}, "num_points is 4"),
        ({"num_points": 0}, "num_points is 0"),
        ({"transform": "mean"}, "'mean'; it must be one of moment, minmax, partial_minmax"),
        ({"norm": "BN"}, "norm is 'BN'"),
        ({"feat_channels": 40}, "40 feat_channels"),
        ({"feat_channels": 32}, "32 feat_channels"),
        ({"feat_channels": 0}, "feat_channels is 0"),
        ({"num_points": 9.0}, "num_points is 9.0"),
        ({"num_points": 1}, "num_points is 1; a single point has no standard deviation"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"num_convs": -1}, "num_convs is -1"),
    ],
)
def test_bad_settings_of_the_head(settings, named):
    with pytest.raises(UserError, match=named):
        RepPointsHead(32, NUM_CLASSES, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"init_assigner": "atss"}, "'atss'; it must be one of point, max_iou"),
        ({"positive_iou": 0.3}, "negative_iou is 0.4 and positive_iou 0.3"),
        ({"negative_iou": -0.1}, "negative_iou is -0.1"),
        ({"init_num_pos": 0}, "init_num_pos is 0"),
        ({"point_base_scale": 0}, "point_base_scale is 0"),
        ({"point_base_scale": -4}, "point_base_scale is -4"),
        ({"test_score_thresh": 5}, "test_score_thresh is 5"),
        ({"test_nms_thresh": -1}, "test_nms_thresh is -1"),
        ({"test_topk_candidates": 0}, "test_topk_candidates is 0"),
        ({"max_detections_per_image": 0}, "max_detections_per_image is 0"),
    ],
)
def test_bad_settings_of_the_detector(settings, named):
    with pytest.raises(UserError, match=named):
        detector(NoDivisibility(), RepPointsHead(32, NUM_CLASSES), **settings)


def test_a_single_point_is_a_box_without_a_moment():
    point = torch.tensor([[3.0, 5.0]]).view(1, 2, 1, 1)
    assert points_to_boxes(point, "minmax").flatten().tolist() == [5, 3, 5, 3]
    with pytest.raises(UserError, match="a single point has no standard deviation"):
        points_to_boxes(point, "moment")
    RepPointsHead(32, NUM_CLASSES, num_points=1, transform="minmax")


def test_a_top_block_whose_norm_would_leave_nothing():
    with pytest.raises(UserError, match="out_channels is 32"):
        P6P7(16, 32)


def test_other_classes_than_the_heads():
    head = RepPointsHead(32, NUM_CLASSES)
    head.num_classes = 4
    with pytest.raises(UserError, match="num_classes is 5, but that of its head 4"):
        RepPoints(
            backbone=NoDivisibility(), head=head, num_classes=5, pixel_mean=[0.0], pixel_std=[1.0]
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_classes_of_another_type_train_alike(model, dtype):
    items = batch()
    expected = step(model, items)
    for one in items:
        one["instances"].gt_classes = one["instances"].gt_classes.to(dtype)
    found = step(model, items)
    assert found == expected
