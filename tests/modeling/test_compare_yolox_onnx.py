"""The tool that compares YOLOX with an export, as far as it needs no onnx."""

import sys

import numpy as np
import pytest
import torch
from commands import load_tool
from detectron2.structures import Boxes, Instances
from golden_fill import fill

from dfd.errors import UserError
from dfd.modeling import named_yolox


@pytest.fixture(scope="module")
def tool():
    return load_tool("compare_yolox_onnx")


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_weights_with_folded_norms_are_loaded(tool, name):
    model = named_yolox(name, num_classes=4).eval()
    fill(model)
    folded = []
    for conv, norm in tool.convolutions(model):
        if norm is None:
            folded.append((conv.weight.detach(), conv.bias.detach()))
            continue
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = norm.bias - norm.running_mean * scale
        folded.append(((conv.weight * scale[:, None, None, None]).detach(), bias.detach()))
    found, loaded = tool.load({}, folded, "a file")
    assert found == name and loaded.num_classes == 4
    images = torch.randint(0, 256, (1, 3, 64, 64)).float()
    with torch.no_grad():
        expected, _ = model.head(model.backbone(images))
        actual, _ = loaded.head(loaded.backbone(images))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    _, named = tool.load(model.state_dict(), folded, "a file")
    assert torch.equal(named.backbone.C3_p4.conv1.bn.weight, model.backbone.C3_p4.conv1.bn.weight)
    with pytest.raises(UserError, match="no YOLOX"):
        tool.load({}, folded[:-1], "a file")


def test_photographs_are_fitted_at_the_top_left(tool):
    canvas = tool.letterbox(np.full((50, 100, 3), 7, dtype=np.uint8), 64, 64)
    assert canvas.shape == (3, 64, 64)
    assert (canvas[:, :32] == 7).all() and (canvas[:, 32:] == 114).all()


def test_agreement_counts_what_both_found(tool):
    def found(*rows):
        rows = torch.tensor(rows)
        return Instances(
            (100, 100),
            pred_boxes=Boxes(rows[:, :4]),
            scores=rows[:, 4],
            pred_classes=rows[:, 5].long(),
        )

    ours = found((0.0, 0, 50, 50, 0.9, 1), (0, 0, 50, 50, 0.8, 2), (60, 60, 80, 80, 0.5, 1))
    theirs = found((0.0, 0, 50, 50.5, 0.895, 1), (0, 0, 50, 50, 0.8, 3))
    rows = tool.agreement(ours, theirs)
    assert rows[:3] == (3, 2, 1)
    assert rows[3:] == pytest.approx((0.005, 0.5), abs=1e-5)


def test_bad_input_is_one_line(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        tool.compare("a.onnx", str(tmp_path), 1)
    with pytest.raises(UserError, match="no such folder"):
        tool.list_images(str(tmp_path / "none"), 1)
    with pytest.raises(UserError, match="no .jpg"):
        tool.list_images(str(tmp_path), 1)
    with pytest.raises(UserError, match="--num-images is 0"):
        tool.list_images(str(tmp_path), 0)
    with pytest.raises(UserError, match="no such file"):
        tool.read_onnx(None, str(tmp_path / "none.onnx"))
