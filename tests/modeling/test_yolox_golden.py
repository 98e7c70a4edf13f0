"""YOLOX against values of its authors' code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from golden_fill import fill
from torch import nn
from torch.testing import assert_close
from torchvision.ops import box_convert

from dfd.modeling import YOLOX, named_yolox
from dfd.modeling.yolox import PRESETS, assign, simota
from dfd.modeling.yolox.detections import detect
from dfd.modeling.yolox.head import Predictions, decode, make_grid
from dfd.modeling.yolox.losses import Objects, yolox_losses

GOLDEN = Path(__file__).parent / "golden"
SIMOTA = ["main", "v030", "edge_main", "edge_v030"]


def golden(name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    return {key: torch.from_numpy(arrays[key]) for key in arrays}, facts


def objects_of(arrays, i):
    labels = arrays["labels"][i]
    labels = labels[labels.sum(1) > 0]
    return Objects(labels[:, 1:], labels[:, 0].long())


def raw_outputs(arrays):
    raw = arrays["raw"].clone().requires_grad_()
    return raw, Predictions(raw[..., :4], raw[..., 4], raw[..., 5:])


@pytest.fixture(params=SIMOTA)
def case(request):
    arrays, facts = golden(f"yolox_simota_{request.param}")
    sizes = [(facts["H"] // s, facts["W"] // s) for s in facts["strides"]]
    return arrays, facts, make_grid(sizes, facts["strides"])


def assign_image(case, i):
    arrays, facts, grid = case
    _, predictions = raw_outputs(arrays)
    boxes = decode(predictions.regression, grid)[i].detach()
    return simota(
        predictions.classes[i],
        predictions.objectness[i],
        boxes,
        *objects_of(arrays, i),
        grid.centres,
        grid.strides,
        facts["variant"],
    )


def test_boxes_are_decoded(case):
    arrays, _, grid = case
    assert torch.equal(torch.cat([grid.cells, grid.strides[:, None]], 1), arrays["grid_xys"])
    _, predictions = raw_outputs(arrays)
    boxes = decode(predictions.regression, grid)
    assert_close(boxes, arrays["boxes_cxcywh"], rtol=1e-5, atol=1e-4)
    decoded = torch.cat(
        [boxes, predictions.objectness.sigmoid()[..., None], predictions.classes.sigmoid()], 2
    )
    assert_close(decoded, arrays["eval_decoded"], rtol=1e-5, atol=1e-4)


def test_cells_are_matched(case):
    arrays = case[0]
    for i in range(len(arrays["raw"])):
        matches = assign_image(case, i)
        assert matches.matched_gt.dtype == torch.int64
        assert matches.matched_gt.tolist() == arrays["matched_gt"][i].tolist()
        assert (matches.matched_gt >= 0).tolist() == arrays["fg_mask"][i].tolist()
        assert_close(matches.matched_iou, arrays["matched_iou"][i], rtol=1e-5, atol=1e-6)


def test_costs(case):
    arrays, facts, grid = case
    _, predictions = raw_outputs(arrays)
    form, penalty = facts["variant"], {"main": 1e6, "v030": 1e5}[facts["variant"]]
    for i in range(len(arrays["raw"])):
        boxes, classes = objects_of(arrays, i)
        if not len(classes):
            continue
        valid = torch.ones(len(classes), dtype=torch.bool)
        candidate, near = assign.neighbourhood(boxes, valid, grid.centres, grid.strides, form)
        assert candidate.tolist() == arrays["cand_mask"][i].tolist()
        iou = assign.pairwise_iou(boxes, decode(predictions.regression, grid)[i][candidate])
        assert_close(iou, arrays[f"iou_img{i}"], rtol=1e-5, atol=1e-6)
        cost = assign.class_cost(
            predictions.classes[i][candidate], predictions.objectness[i][candidate], classes
        )
        cost = assign.matching_cost(cost, iou, near[:, candidate], form).detach()
        expected = arrays[f"cost_img{i}"]
        paid = expected > penalty / 2
        assert torch.equal(paid, ~near[:, candidate])
        assert_close(cost[~paid], expected[~paid], rtol=0, atol=1e-4)
        assert_close(cost[paid], expected[paid], rtol=0, atol=0.07 if form == "main" else 0.008)


@pytest.mark.parametrize("l1", [False, True])
def test_losses_and_gradients(case, l1):
    arrays, facts, grid = case
    raw, predictions = raw_outputs(arrays)
    counts = []

    def divisor(positives):
        counts.append(positives.item())
        return positives.clamp(min=1)

    losses = yolox_losses(
        predictions,
        grid,
        [objects_of(arrays, i) for i in range(len(raw))],
        divisor=divisor,
        form=facts["variant"],
        l1=l1,
    )
    expected = facts[f"loss_l1{'on' if l1 else 'off'}_float64"]
    assert counts == [arrays["fg_mask"].sum().item()]
    assert ("loss_l1" in losses) == l1
    for name, value in losses.items():
        key = {"loss_iou": "iou_x5"}.get(name, name.removeprefix("loss_"))
        assert value.item() == pytest.approx(expected[key], rel=1e-5)
    total = sum(losses.values())
    assert total.item() == pytest.approx(expected["total"], rel=1e-5)
    total.backward()
    assert_close(raw.grad, arrays[f"grad_l1{'on' if l1 else 'off'}"], rtol=1e-4, atol=1e-6)


# Not det_c30_n45_agnostic: suppression here is always class by class, as for COCO.
@pytest.mark.parametrize(("rows", "score_thresh"), [("det_c001_n65", 0.001), ("det_c01_n65", 0.01)])
def test_detections(case, rows, score_thresh):
    arrays, facts, grid = case
    size = (facts["H"], facts["W"])
    _, predictions = raw_outputs(arrays)
    boxes = decode(predictions.regression, grid).detach()
    for i in range(len(boxes)):
        found = detect(
            boxes[i],
            predictions.objectness[i].detach(),
            predictions.classes[i].detach(),
            size,
            score_thresh=score_thresh,
            nms_thresh=0.65,
        )
        expected = arrays[rows][i][: arrays[f"{rows}_count"][i]]
        # The authors clip nothing.
        corners = Boxes(expected[:, :4].clone())
        corners.clip(size)
        expected = expected[corners.nonempty()]
        theirs = torch.cat(
            [
                corners.tensor[corners.nonempty()],
                expected[:, 4:5] * expected[:, 5:6],
                expected[:, 6:7] * 1000,
            ],
            1,
        )
        ours = torch.cat(
            [
                found.pred_boxes.tensor,
                found.scores[:, None],
                found.pred_classes[:, None].float() * 1000,
            ],
            1,
        )
        assert len(ours) == len(theirs) > 20
        # The order of equal scores is nobody's.
        near = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist") < 1e-3
        assert near.any(0).all() and near.any(1).all()
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("name", PRESETS)
def test_keys_and_shapes_are_the_authors(name):
    expected = json.loads((GOLDEN / "yolox_keys.json").read_text())[f"yolox_{name}"]
    with torch.device("meta"):
        model = named_yolox(name, num_classes=80)
    state = {key: "x".join(map(str, value.shape)) for key, value in model.state_dict().items()}
    assert state == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["num_params"]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(expected["bn_eps"], expected["bn_momentum"])}


@pytest.fixture(params=["std", "dw"])
def model_case(request):
    arrays, facts = golden(f"yolox_model_{request.param}")
    model = YOLOX(
        depth=facts["depth"], width=facts["width"], num_classes=facts["C"], depthwise=facts["dw"]
    )
    fill(model)
    state = [v.double() for k, v in model.state_dict().items() if "num_batches" not in k]
    assert len(state) == facts["weights"]["num_tensors"]
    assert sum(v.abs().sum() for v in state).item() == pytest.approx(facts["weights"]["sum_abs"])
    return model, arrays, facts


def batch_of(arrays):
    batch = []
    for i, image in enumerate(arrays["image"]):
        boxes, classes = objects_of(arrays, i)
        instances = Instances(tuple(image.shape[-2:]))
        instances.gt_boxes = Boxes(box_convert(boxes, "cxcywh", "xyxy"))
        instances.gt_classes = classes
        batch.append({"image": image, "instances": instances})
    return batch


def keep_outputs(module):
    kept = []
    module.register_forward_hook(lambda module, args, output: kept.append(output))
    return kept


def assert_features(actual, expected, tolerance):
    assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_network_in_evaluation(model_case):
    model, arrays, _ = model_case
    trunk, neck, head = map(keep_outputs, (model.backbone.backbone, model.backbone, model.head))
    with torch.no_grad():
        model.eval()(batch_of(arrays))
    for actual, name in zip(trunk[0], ("dark3", "dark4", "dark5"), strict=True):
        assert_features(actual, arrays[f"eval_{name}"], 1e-4)
    for actual, name in zip(
        neck[0].values(), ("pan0_stride8", "pan1_stride16", "pan2_stride32"), strict=True
    ):
        assert_features(actual, arrays[f"eval_{name}"], 1e-4)
    predictions, grid = head[0]
    chances = [predictions.objectness.sigmoid()[..., None], predictions.classes.sigmoid()]
    undecoded = torch.cat([predictions.regression, *chances], 2)
    assert_features(undecoded, arrays["eval_head_undecoded"], 1e-4)
    decoded = torch.cat([decode(predictions.regression, grid), *chances], 2)
    assert_features(decoded, arrays["eval_head_decoded"], 1e-4)


@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("norms", ["bnfrozen", "bntrain"])
def test_network_in_training(model_case, norms, l1, monkeypatch):
    model, arrays, facts = model_case
    model.train()
    if norms == "bnfrozen":
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d))
    monkeypatch.setattr(model, "_l1_is_on", lambda: l1)
    neck, head = keep_outputs(model.backbone), keep_outputs(model.head)
    losses = model(batch_of(arrays))
    features = list(neck[0].values())
    for feature in features:
        feature.retain_grad()

    loss_rel, grad_rel = (1e-4, 1e-4) if norms == "bnfrozen" else (1e-3, 3e-3)
    key = f"{norms}_l1{'on' if l1 else 'off'}_float64"
    for name, theirs in (("iou", "iou_loss"), ("obj", "conf_loss"), ("cls", "cls_loss")):
        expected = facts[f"loss_{key}"][theirs]
        assert losses[f"loss_{name}"].item() == pytest.approx(expected, rel=loss_rel)
    if l1:
        expected = facts[f"loss_{key}"]["l1_loss"]
        assert losses["loss_l1"].item() == pytest.approx(expected, rel=loss_rel)

    predictions, grid = head[0]
    boxes = decode(predictions.regression, grid)
    for i in range(len(boxes)):
        classes, objectness = predictions.classes[i], predictions.objectness[i]
        found = objects_of(arrays, i)
        matches = simota(classes, objectness, boxes[i], *found, grid.centres, grid.strides)
        assert matches.matched_gt.tolist() == arrays[f"{norms}_matched_gt"][i].tolist()
        expected = arrays[f"{norms}_matched_iou"][i].float()
        assert_close(matches.matched_iou, expected, rtol=1e-3, atol=1e-6)

    sum(losses.values()).backward()
    for feature, expected in zip(features, facts[f"gradpan_{key}"].values(), strict=True):
        assert feature.grad.norm().item() == pytest.approx(expected, rel=grad_rel)
    for prefix, expected in facts[f"grad_{key}"].items():
        grads = [
            p.grad for k, p in model.named_parameters() if prefix == "ALL" or k.startswith(prefix)
        ]
        norm = torch.stack([g.norm() for g in grads]).norm().item()
        assert norm == pytest.approx(expected, rel=grad_rel), prefix
    if norms == "bntrain":
        for i, feature in enumerate(features):
            assert_features(feature, arrays[f"train_pan{i}_stride{8 << i}"], 1e-3)
        state = model.state_dict()
        after = [name for name in arrays if name.startswith("after_")]
        assert len(after) == 6
        for name in after:
            assert_close(state[name.removeprefix("after_")], arrays[name], rtol=1e-3, atol=1e-4)
