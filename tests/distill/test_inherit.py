import pytest
import torch
from detectron2.config import instantiate
from toys import build, faster_rcnn_config

from dfd import UserError
from dfd.distill.inherit import inherit_weights


def test_inherits_what_fits_and_says_what_does_not():
    student, teacher = build(seed=0), build(seed=1)
    backbone = {k: v.clone() for k, v in student.backbone.bottom_up.state_dict().items()}
    report = inherit_weights(student, teacher, ["fpn_output", "proposal_generator", "heads"])
    ours, theirs = student.state_dict(), teacher.state_dict()
    expected = [
        k
        for k in ours
        if k.startswith(("backbone.fpn_output", "proposal_generator.", "roi_heads."))
    ]
    assert sorted(report.inherited) == sorted(expected)
    assert report.skipped == {}
    for key in expected:
        assert torch.equal(ours[key], theirs[key]), key
    for key, value in student.backbone.bottom_up.state_dict().items():
        assert torch.equal(value, backbone[key]), key
    assert not torch.equal(
        ours["backbone.fpn_lateral3.weight"], theirs["backbone.fpn_lateral3.weight"]
    )


def test_other_shapes_are_listed_with_both_shapes():
    config = faster_rcnn_config()
    config.roi_heads.num_classes = 5
    student = instantiate(config)
    report = inherit_weights(student, build(seed=1), ["heads"])
    assert "roi_heads.box_head.fc1.weight" in report.inherited
    assert set(report.skipped) == {
        f"roi_heads.box_predictor.{name}.{kind}"
        for name in ("cls_score", "bbox_pred")
        for kind in ("weight", "bias")
    }
    text = str(report)
    assert "+ roi_heads.box_head.fc1.weight" in text
    assert (
        "- roi_heads.box_predictor.cls_score.weight: shape (6, 16), the teacher's (4, 16)" in text
    )


def test_a_prefix_of_the_users_own():
    report = inherit_weights(build(seed=0), build(seed=1), ["roi_heads.box_head."])
    assert report.inherited == ["roi_heads.box_head.fc1.weight", "roi_heads.box_head.fc1.bias"]


@pytest.mark.parametrize(
    ("kind", "part", "named"),
    [
        ("faster_rcnn", "neck", "'neck'"),
        ("retinanet", "proposal_generator", "nothing of 'proposal_generator'"),
        ("retinanet", "heads", "nothing of 'heads'"),
    ],
)
def test_nothing_inherited_is_an_error(kind, part, named):
    with pytest.raises(UserError, match=named):
        inherit_weights(build(kind), build(seed=1), [part])
