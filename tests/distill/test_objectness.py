"""How sure each kind of teacher is of an object at a cell."""

import pytest
import torch
from own_toys import CONFIGS, build
from test_detector import distilled, train_step
from torch import nn
from toys import make_batch

from dfd import UserError
from dfd.distill.contract import feature_modules, run_features
from dfd.distill.objectness import object_scores, scored_levels
from dfd.losses import DFDLoss, G2SDLoss


def pyramid_of(model, batch, **what):
    images = model.preprocess_image(batch)
    with torch.no_grad():
        return images, run_features(model, images.tensor, "teacher", **what)


def detached(kind, seed=1):
    """A detector whose scores differ from cell to cell, as a trained one's do."""
    model = build(kind, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("cls_score", "cls_preds", "obj", "ctrness", "cls_out")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise / max(1, parameter[0].numel()) ** 0.5
    return model


def best_score(model, batch):
    """The highest score of the detector's own detections, or its best proposal's."""
    with torch.no_grad():
        if hasattr(model, "proposal_generator"):
            images, pyramid = pyramid_of(model, batch)
            proposals, _ = model.proposal_generator(images, pyramid, None)
            return max(p.objectness_logits.max() for p in proposals).sigmoid()
        for name in ("score_thresh", "test_score_thresh"):
            if hasattr(model, name):
                setattr(model, name, 0.0)
        if hasattr(model, "forward_inference"):
            # Before boxes outside of the image are left out.
            images, pyramid = pyramid_of(model, batch)
            features = [pyramid[name] for name in model.head_in_features]
            found = model.forward_inference(images, features, model.head(features))
        else:
            found = [result["instances"] for result in model(batch)]
        return max(instances.scores.max() for instances in found)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_by_which_the_detector_ranks_what_it_finds(kind):
    model, batch = detached(kind), make_batch(sizes=[(64, 96), (96, 64)])
    _, pyramid = pyramid_of(model, batch)
    scores = object_scores(model, pyramid)
    assert list(scores) == scored_levels(model) != []
    for name, score in scores.items():
        assert score.shape == pyramid[name][:, 0].shape and score.dtype == torch.float32
        assert 0 <= score.min() and score.max() <= 1
    finest = next(iter(scores.values()))
    assert finest.unique().numel() > 10
    # Padding is scored too, but these have objects of their own beside it.
    images = model.preprocess_image(batch[:1])
    assert images.tensor.shape[-2:] == batch[0]["image"].shape[-2:]
    alone = object_scores(model, pyramid_of(model, batch[:1])[1])
    best = max(score.max() for score in alone.values())
    torch.testing.assert_close(best, best_score(model, batch[:1]))


def test_scores_of_a_yolox_by_its_stems_are_the_same():
    model, batch = detached("yolox"), make_batch()
    _, pyramid = pyramid_of(model, batch)
    _, stems = pyramid_of(model, batch, stems=True)
    assert not torch.equal(pyramid["p3"], stems["p3"])
    ours, theirs = object_scores(model, stems, stems=True), object_scores(model, pyramid)
    for name, score in ours.items():
        torch.testing.assert_close(score, theirs[name])


def test_no_gradient_and_full_precision_whatever_the_pyramid():
    model, batch = detached("retinanet"), make_batch()
    pyramid = {k: v.bfloat16() for k, v in pyramid_of(model, batch)[1].items()}
    with torch.autocast("cpu", torch.bfloat16):
        low = object_scores(model, {k: v.clone().requires_grad_() for k, v in pyramid.items()})
    for name, score in object_scores(model, {k: v.float() for k, v in pyramid.items()}).items():
        assert low[name].dtype == torch.float32 and not low[name].requires_grad
        torch.testing.assert_close(low[name], score, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("criterion", [G2SDLoss, lambda: DFDLoss(certainty=True)])
def test_every_kind_of_teacher_serves_a_criterion_that_asks(kind, criterion):
    seen = []

    def spy(criterion):
        forward = criterion.forward
        criterion.forward = lambda level: seen.append(level) or forward(level)
        return criterion

    model = distilled(teacher=detached(kind), criterion=criterion())
    for level in model.head.criteria.values():
        spy(level)
    losses, _ = train_step(model, make_batch())
    assert len(seen) == len(model.head.pairs) > 0
    assert all(level.objectness.shape == level.teacher[:, 0].shape for level in seen)
    assert all(losses[f"loss_dfd_{pair.name}"] > 0 for pair in model.head.pairs)


def test_distilled_stems_are_scored_as_stems():
    model = distilled(
        student=build("yolox"),
        teacher=detached("yolox"),
        criterion=DFDLoss(certainty=True),
        stems=True,
    )
    calls = []
    stems = feature_modules(model.teacher.model, "teacher", stems=True)[0]
    stems.register_forward_hook(lambda *_: calls.append(1))
    losses, _ = train_step(model, make_batch())
    assert losses["loss_dfd_p3"] > 0 and len(calls) == 1


class Own(nn.Module):
    """A detector of a kind that nobody knows."""

    def __init__(self, inner):
        super().__init__()
        self.backbone, self.preprocess_image = inner.backbone, inner.preprocess_image
        self.register_buffer("pixel_mean", inner.pixel_mean)
        self.pixel_std = inner.pixel_std


def test_teacher_without_scores_is_refused_for_a_criterion_that_asks():
    assert scored_levels(Own(build("retinanet"))) == []
    with pytest.raises(UserError, match="teacher, a Own, scores no cells of p3, p4, p5, p6"):
        distilled(
            student=build("retinanet"),
            teacher=Own(build("retinanet")),
            criterion=G2SDLoss(),
            levels=["p3", "p4", "p5", "p6"],
        )
    with pytest.raises(UserError, match="scores no cells of res2, .*set model.head.levels"):
        distilled(criterion=DFDLoss(certainty=True), trunk=True)


def test_detector_of_a_users_own_gives_its_scores():
    class Scored(Own):
        head_in_features = ("p3", "p4")

        def __init__(self, inner):
            super().__init__(inner)
            self.head = nn.Conv2d(inner.backbone.output_shape()["p3"].channels, 2, 1)

        def object_scores(self, pyramid, *, stems=False):
            return {name: self.head(x).sigmoid() for name, x in pyramid.items()}

    teacher = Scored(build("retinanet"))
    model = distilled(
        student=build("retinanet"), teacher=teacher, criterion=G2SDLoss(), levels=["p3", "p4"]
    )
    losses, _ = train_step(model, make_batch())
    assert losses["loss_dfd_p3"] > 0 and losses["loss_dfd_p4"] > 0
