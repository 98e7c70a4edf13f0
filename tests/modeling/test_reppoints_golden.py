"""RepPoints against values that mmdet 3.3.0 computed.

golden/reppoints_*.npz hold arrays, the .json beside each settings, losses and norms of gradients;
weights are those of ``golden_fill``. Values are compared in double precision too, where rounding is
no excuse.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_fill import fill
from reppoints_toys import NUM_CLASSES, item, over_features

from dfd.modeling.reppoints import assign_boxes, assign_points, points_to_boxes

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    with np.load(GOLDEN / f"reppoints_{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    return tensors, json.loads((GOLDEN / f"reppoints_{name}.json").read_text())


def close(found, expected, tolerance=1e-4):
    """Within so much of the array's largest entry."""
    torch.testing.assert_close(
        found.to(expected.dtype), expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.parametrize("order", ["yfirst", "xfirst"])
@pytest.mark.parametrize("kind", ["moment", "minmax", "partial_minmax"])
def test_boxes_of_points_and_their_gradients(kind, order):
    arrays, settings = golden("transform")
    points = arrays["points"].requires_grad_()
    transfer = arrays["moment_transfer"].requires_grad_()
    ordered = points
    if order == "xfirst":
        ordered = points.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    boxes = points_to_boxes(ordered, kind, transfer)
    close(boxes, arrays[f"{kind}_{order}"], 1e-6)
    weights = torch.arange(1.0, boxes.numel() + 1).view_as(boxes) / boxes.numel()
    (boxes * weights).sum().backward()
    close(points.grad, arrays[f"{kind}_{order}_grad"], 1e-5)
    if kind == "moment":
        close(transfer.grad, arrays[f"{kind}_{order}_grad_moment_transfer"], 1e-5)
        assert settings["moment_mul"] == 0.01


def objects(arrays, image):
    return arrays["gt_boxes"][image, : arrays["num_gt"][image]]


@pytest.mark.parametrize("num_pos", [1, 3])
def test_assigned_points(num_pos):
    arrays, settings = golden("assign")
    points = arrays["points"][:, :3]
    for image in range(settings["images"]):
        found = assign_points(points, objects(arrays, image), num_pos=num_pos)
        assert found.dtype == torch.int64
        expected = arrays[f"point_assign_pos{num_pos}"][image].long() - 1
        assert found.tolist() == expected.tolist()


def test_assigned_boxes():
    arrays, settings = golden("assign")
    # mmdet's 1-based objects, 0 for background, -1 for ignored.
    numbers = {-1: -2, 0: -1}
    for image in range(3):  # The last one has an object without area, see the next test.
        found = assign_boxes(arrays["boxes"][image], objects(arrays, image))
        assert found.dtype == torch.int64
        expected = arrays["maxiou_gt_inds"][image].tolist()
        assert found.tolist() == [numbers.get(number, number - 1) for number in expected]


def test_an_object_without_area_gets_no_box():
    """mmdet gives it every box that does not overlap it: there all 512."""
    arrays, _ = golden("assign")
    boxes, gt_boxes = arrays["boxes"][3], objects(arrays, 3)
    assert (arrays["maxiou_gt_inds"][3] > 0).all()
    found, without = assign_boxes(boxes, gt_boxes), assign_boxes(boxes, gt_boxes[1:])
    assert not (found == 0).any()
    assert (without >= 0).sum() > 0
    assert torch.where(found == 1, 0, found).tolist() == without.tolist()


HEADS = ["gn3", "nogn1", "minmax"]


def golden_detector(name, dtype=torch.float32):
    arrays, settings = golden(f"head_{name}")
    features = [
        arrays[f"feat{level}"].to(dtype).requires_grad_()
        for level in range(len(settings["strides"]))
    ]
    model = over_features(
        features,
        settings["strides"],
        feat_channels=settings["feat_channels"],
        num_convs=settings["stacked_convs"],
        transform=settings["transform"],
        norm="GN" if settings["gn_groups"] else "",
        norm_groups=settings["gn_groups"] or 1,
    )
    fill(model.head)
    return model.to(dtype), arrays, settings


def golden_batch(arrays):
    return [
        item(
            *arrays["pad_shapes"][image].tolist(),
            objects(arrays, image),
            arrays["gt_labels"][image, : arrays["num_gt"][image]],
        )
        for image in range(len(arrays["num_gt"]))
    ]


@pytest.mark.parametrize("name", HEADS)
def test_keys_and_outputs_of_the_head(name):
    model, arrays, settings = golden_detector(name)
    state = model.head.state_dict()
    shapes = {key: "x".join(map(str, value.shape)) for key, value in state.items()}
    assert shapes == settings["state_dict_keys"]
    total = sum(value.double().abs().sum() for value in state.values())
    assert float(total) == pytest.approx(settings["weights"]["sum_abs"], rel=1e-12)
    outputs = model.head(model.backbone.features)
    for kind, levels in zip(("cls", "pts_init", "pts_refine"), outputs, strict=True):
        for level, output in enumerate(levels):
            close(output, arrays[f"{kind}{level}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients(name, dtype):
    model, arrays, settings = golden_detector(name, dtype)
    losses = model.train()(golden_batch(arrays))
    bits = str(dtype).removeprefix("torch.")
    # There one loss a level.
    expected = {key: np.sum(value) for key, value in settings[f"loss_{bits}"].items()}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    total = sum(losses.values())
    found = {key: value.item() for key, value in {**losses, "total": total}.items()}
    assert found == pytest.approx(expected, rel=tolerance)
    total.backward()
    norms = {key: float(p.grad.norm()) for key, p in model.head.named_parameters()}
    assert norms == pytest.approx(settings[f"gradnorm_params_{bits}"], rel=1e-4)
    for level, feature in enumerate(model.backbone.features):
        close(feature.grad, arrays[f"grad_feat{level}"])


@pytest.mark.parametrize("name", HEADS)
def test_which_cells_are_trained(name, monkeypatch):
    model, arrays, settings = golden_detector(name)
    seen = []
    monkeypatch.setattr(model, "divisor", lambda x: (seen.append(float(x)), x.clamp(min=1))[1])
    outputs = model.head(model.backbone.features)
    for levels in outputs:
        for level in levels:
            level.retain_grad()
    monkeypatch.setattr(model.head, "forward", lambda features: outputs)
    losses = model.train()(golden_batch(arrays))
    factors = settings["init_avg_factor"], settings["refine_avg_factor"]
    assert sorted(set(seen)) == sorted({float(factor) for factor in factors})
    for loss in losses.values():
        loss.backward(retain_graph=True)
    touched = torch.cat([x.grad.abs().sum(1).flatten(1) > 0 for x in outputs[0]], dim=1)
    assert torch.equal(touched, arrays["refine_label_weights"] > 0)
    touched = torch.cat([x.grad.abs().sum(1).flatten(1) > 0 for x in outputs[2]], dim=1)
    assert torch.equal(touched, arrays["refine_bbox_weights"].sum(-1) > 0)


@pytest.mark.parametrize("name", HEADS)
def test_decoded_boxes_and_detections(name):
    model, arrays, settings = golden_detector(name)
    items = golden_batch(arrays)
    with torch.no_grad():
        logits, _, second = model.head(model.backbone.features)
        found = model.eval()(items)
        # All of a kind: neither threshold nor suppression.
        model.test_score_thresh, model.test_nms_thresh = -1.0, 1.0
        model.max_detections_per_image = 10**6
        every = model(items)
    scores = torch.cat([x.flatten(2).transpose(1, 2) for x in logits], 1).sigmoid()
    close(scores, arrays["decoded_scores"])
    for image, (result, whole) in enumerate(zip(found, every, strict=True)):
        expected = arrays["decoded_boxes"][image]
        expected = expected[(expected[:, 2:] > expected[:, :2]).all(1)].repeat(NUM_CLASSES, 1)
        assert_same_rows(whole["instances"].pred_boxes.tensor, expected, 1e-3)
        result, count = result["instances"], arrays["det_count"][image]
        rows = [result.pred_boxes.tensor, result.scores[:, None], result.pred_classes[:, None]]
        assert_same_rows(torch.cat(rows, 1), arrays["det"][image, :count], 1e-3)


def assert_same_rows(found, expected, tolerance):
    """As sets, each row once."""
    assert found.shape == expected.shape
    near = ((found[:, None] - expected).abs() < tolerance).all(-1)
    for row in near:
        partner = row.nonzero().flatten()
        assert len(partner)
        near[:, partner[0]] = False
