"""A ViT detector for images of any size: padded as its levels need, or refused."""

import pytest
from detectron2.modeling import SimpleFeaturePyramid
from detectron2.utils.events import EventStorage
from toys import instantiate_seeded, make_batch
from vit_toys import timm_vit_config

from dfd import UserError
from dfd.distill.contract import check_fits_square_padding
from dfd.modeling import pixel_statistics


def vit_detector(**settings):
    return instantiate_seeded(timm_vit_config(**settings))


def test_detector_trains_on_images_of_different_sizes():
    model = vit_detector().train()
    batch = make_batch([(70, 90), (64, 100)])
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    images = model.preprocess_image(batch).tensor
    assert images.shape[-2:] == (96, 128)
    shapes = {name: tuple(f.shape[-2:]) for name, f in model.backbone(images).items()}
    assert shapes == {"p2": (24, 32), "p3": (12, 16), "p4": (6, 8), "p5": (3, 4), "p6": (2, 2)}


def test_padding_makes_no_level_too_small_as_detectron2s_does():
    """Its own tells nobody to pad: 80 x 96 pixels give a p5 of 2 rows in place of 3."""
    ours = vit_detector().backbone
    theirs = SimpleFeaturePyramid(
        net=ours.net, in_feature="last_feat", out_channels=8, scale_factors=(1.0, 0.5)
    )
    assert theirs.size_divisibility == 0
    assert (ours.size_divisibility, ours.padding_constraints["size_divisibility"]) == (32, 32)
    # Before the pool, whose key Detectron2's own has too.
    assert set(theirs.state_dict()) <= set(ours.state_dict())


def test_image_larger_than_the_square_is_refused_not_cropped():
    model = vit_detector(square_pad=64)
    assert model.preprocess_image(make_batch([(40, 60)])).tensor.shape[-2:] == (64, 64)
    with pytest.raises(UserError, match="larger than the square of 64"):
        check_fits_square_padding(model, make_batch([(70, 60)]), "student")
    with pytest.raises(UserError, match="square_pad=70.*multiple of 32"):
        vit_detector(square_pad=70)


def test_pixel_statistics_are_the_models_own():
    # augreg was trained on [-1, 1], DeiT with ImageNet's.
    assert pixel_statistics("vit_tiny_patch16_224.augreg_in21k") == ([127.5] * 3, [127.5] * 3)
    mean, std = pixel_statistics("deit_tiny_patch16_224")
    assert mean == pytest.approx([123.675, 116.28, 103.53])
    assert std == pytest.approx([58.395, 57.12, 57.375])
    with pytest.raises(UserError, match="no model 'vit_tiny_patch17'"):
        pixel_statistics("vit_tiny_patch17")
