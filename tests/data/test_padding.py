"""Padding that augmentations make within an image is no more distilled than that of a batch."""

import logging
import pickle

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from coco_files import CLASSES, write_json
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from plain import PlainDetector

from dfd import DFDHead, DistilledDetector, FrozenTeacher, UserError
from dfd.data import MarkPadding, TwoSizeMapper, build_test_loader, build_train_loader, coco_json
from dfd.data.letterbox import BilinearResize
from dfd.data.padding import real_pixels
from dfd.distill.real_pixels import RealPixels, image_area
from dfd.engine.config.load import load_config
from dfd.engine.hooks.disparity_image import draw_disparity
from dfd.losses import CWDLoss, DFDLoss, FGDLoss, MimicLoss, PKDLoss

HEIGHT, WIDTH = 48, 80


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("image") / "image.png")
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(path, pixels)
    box = {"bbox": [10, 8, 50, 30], "bbox_mode": 1, "category_id": 1}
    box["segmentation"] = [[10, 8, 60, 8, 60, 38, 10, 38]]
    return {"file_name": path, "height": HEIGHT, "width": WIDTH, "annotations": [box]}


def mapper(augmentations, kind=DatasetMapper, **settings):
    settings = {"is_train": True, "image_format": "BGR"} | settings
    return MarkPadding(kind(augmentations=augmentations, **settings))


@pytest.fixture(scope="module")
def jitter():
    """The vitdet recipe's large-scale jitter, as a function of the size that it resizes to."""
    cfg = load_config("configs/vitdet/student_s_512.py", ())
    flip, resize, crop = cfg.dataloader.train.mapper.augmentations
    assert crop._target_ in (T.FixedSizeCrop, "detectron2.data.transforms.FixedSizeCrop")

    def to(size):
        resize.update(min_scale=1.0, max_scale=1.0, target_height=size, target_width=size)
        return [instantiate(flip), instantiate(resize)]

    return to


def seeded(mapper, record, seed=0):
    np.random.seed(seed)
    return mapper(record)


def distilled(criterion, student=8, scale=1.0, **head):
    torch.manual_seed(0)
    make = PlainDetector(num_classes=3, channels=student)
    teacher = FrozenTeacher(
        model=PlainDetector(num_classes=3, channels=8),
        allow_random=True, precision="fp32", scale=scale,
    )  # fmt: skip
    head = DFDHead(criterion=criterion, **head)
    return DistilledDetector(student=make, teacher=teacher, head=head).train()


def losses(model, batch):
    return {k: v for k, v in model(batch).items() if k.startswith("loss_dfd")}


CRITERIA = {
    "dfd": DFDLoss,
    "dfd-level": lambda: DFDLoss(scale="level", split="quantile", lenient="tail"),
    "mimic": MimicLoss,
    "pkd": PKDLoss,
    "cwd": CWDLoss,
    "fgd": FGDLoss,
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("width", "height"), [(80, 48), (96, 58)])
def test_neither_content_nor_amount_of_jitters_padding_changes_the_loss(
    record, jitter, criterion, width, height
):
    """Whether or not the image ends where cells end."""
    found = []
    for size, value in (((96, 96), 128.0), ((96, 96), 0.0), ((160, 128), 255.0)):
        crop = T.FixedSizeCrop(size, pad_value=value)
        item = seeded(mapper([*jitter(width), crop]), record)
        assert item["image"].shape[-2:] == size
        assert item["valid"][:height, :width].all() and item["valid"].sum() == height * width
        if value:
            item["image"][:, ~item["valid"]] = 7  # Nor what was drawn there later.
        found.append(losses(distilled(CRITERIA[criterion](), student=6), [item]))
    if height % 16 == 0:  # Else the padding of the batch is in the border's cells.
        item = seeded(mapper([*jitter(width), T.FixedSizeCrop((96, 96), pad=False)]), record)
        assert "valid" not in item
        found.append(losses(distilled(CRITERIA[criterion](), student=6), [item]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("criterion", ["dfd", "mimic"])
def test_padding_beside_a_larger_image_of_the_batch(record, criterion):
    """And above and to the left of an image."""
    whole = seeded(mapper([]), record)
    expected = None
    for value in (0, 99.0):
        small = mapper([T.Resize((29, 46)), T.PadTransform(16, 8, 24, 3, pad_value=value)])
        small = small(record)
        assert small["valid"].nonzero().amin(0).tolist() == [8, 16]
        model = distilled(CRITERIA[criterion]())
        ours = losses(model, [whole, small])
        expected = expected or ours
        torch.testing.assert_close(ours, expected)
        _, valid = model.disparity_maps([whole, small])["p3"]
        assert valid[0].sum() == 6 * 10 and valid[1].sum() == (24 // 8) * (40 // 8)
        assert not valid[1, 0].any() and not valid[1, :, :2].any()


@pytest.mark.parametrize("align", ["stride", "resize"])
@pytest.mark.parametrize("scale", [2.0, 1.5, 0.5])
def test_images_in_two_sizes(record, align, scale):
    if align == "stride" and scale == 1.5:
        return  # Nothing pairs.
    found = []
    for crop, value in ((96, 0), (96, 200), (144, 50)):
        make = mapper(
            [T.Resize((66, 90)), T.FixedSizeCrop((crop, crop), pad_value=value)],
            TwoSizeMapper, teacher_scale=scale,
        )  # fmt: skip
        item = make(record)
        assert item["teacher_valid"].sum() == 66 * 90
        assert item["valid"].shape == item["image"].shape[-2:]
        # But for a border that resizing has mixed with padding.
        assert 0.85 < item["valid"].sum() * scale**2 / (66 * 90) <= 1
        model = distilled(MimicLoss(), scale=scale, align=align, level_weights="equal")
        found.append(losses(model, [item]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_tokens_and_trunks_are_masked_as_levels_are():
    real = RealPixels([(64, 64), (64, 64)], [None, torch.ones(64, 64).bool().tril()])
    for stride in (8, 16, 32, 12):
        cells = -(-64 // stride)
        valid = real.cells(stride, cells + 1, cells)
        assert valid[0, :cells].all() and not valid[:, cells].any()
        # Those on the diagonal are half filled up.
        assert torch.equal(valid[1, :cells], torch.ones(cells, cells).bool().tril(-1))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([T.HFlipTransform(WIDTH), T.CropTransform(3, 2, 20, 10)], None),
        ([T.PadTransform(0, 0, 0, 0)], None),
        # The fill cannot be told from the image by its value.
        ([T.PadTransform(2, 3, 4, 5, pad_value=64, seg_pad_value=64)], (3, 51, 2, 82)),
        ([T.PadTransform(2, 3, 4, 5, seg_pad_value=1), T.HFlipTransform(86)], (3, 51, 4, 84)),
        ([T.PadTransform(8, 8, 8, 8), T.ResizeTransform(64, 96, 32, 48)], (5, 27, 5, 43)),
        ([T.PadTransform(8, 8, 8, 8), BilinearResize(64, 96, 32, 48)], (5, 27, 5, 43)),
        ([BilinearResize(HEIGHT, WIDTH, 24, 40)], None),
        ([BilinearResize(HEIGHT, WIDTH, 24, 40), T.PadTransform(0, 0, 9, 9)], (0, 24, 0, 40)),
        ([T.PadTransform(8, 8, 8, 8), T.CropTransform(8, 8, WIDTH, HEIGHT)], None),
        ([T.ExtentTransform((-20, -12, 80, 48), (60, 100), fill=64)], (12, 60, 20, 100)),
        ([T.PadTransform(0, 0, 0, 9), T.ColorTransform(lambda x: x * 0)], (0, 48, 0, 80)),
    ],
)
def test_the_transforms_tell_what_is_real(steps, expected):
    real = real_pixels(T.TransformList(steps), HEIGHT, WIDTH)
    if expected is None:
        assert real is None
        return
    top, bottom, left, right = expected
    assert real[top:bottom, left:right].all()
    assert real.sum() == (bottom - top) * (right - left)


def test_corners_of_a_turned_image_are_not_real():
    real = real_pixels(T.TransformList([T.RotationTransform(40, 40, 45)]), 40, 40)
    assert real[28, 28] and real[2, 28] and not real[3, 3] and not real[-3, 3]


class Noise(T.Transform):
    """A user's, which knows colour images alone."""

    def apply_image(self, image):
        assert image.shape[2] == 3
        return image // 2 + 20

    def apply_coords(self, coords):
        return coords


class Broken(Noise):
    calls = 0

    def apply_image(self, image):
        self.calls += 1
        if self.calls > 1:
            raise ValueError("once only")
        return image


def test_transform_of_a_user_that_pads_nothing(record):
    assert "valid" not in mapper([Noise()])(record)
    item = mapper([Noise(), T.PadTransform(0, 0, 5, 0), Noise()])(record)
    assert item["valid"].sum() == HEIGHT * WIDTH


class Photometric(T.Transform):
    """A user's that changes pixels where they are, with nothing but what it must have."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def apply_image(self, image):
        return self.change(image.astype(float)).clip(0, 255).astype(np.uint8)

    def apply_coords(self, coords):
        return coords


def stretched(image):
    return (image - image.min()) / max(1, np.ptp(image)) * 255


def erased(image):
    image[:8, :16] = 0
    return image


@pytest.mark.parametrize(
    ("change", "real"),
    [
        (stretched, None),
        (lambda image: image + 200, None),
        (lambda image: image + np.random.normal(0, 40, image.shape), None),
        (erased, HEIGHT * WIDTH - 8 * 16),
    ],
)
def test_a_users_colours_are_not_taken_for_padding(change, real):
    """Else images would not be distilled, in part or at all."""
    np.random.seed(0)
    steps = T.TransformList([Photometric(change)])
    found = real_pixels(steps, HEIGHT, WIDTH)
    assert (None if found is None else int(found.sum())) == real
    assert np.random.rand() == np.random.RandomState(0).rand()  # The training's draws stay.
    padded = T.TransformList([T.PadTransform(0, 0, 16, 8), *steps.transforms])
    found = real_pixels(padded, HEIGHT, WIDTH)
    assert int(found.sum()) == (real or HEIGHT * WIDTH)


class Noisy(Photometric):
    """A user's that draws when it is applied, from a generator of its own."""

    def __init__(self, moves=0):
        generator = np.random.default_rng(0)
        super().__init__(lambda image: image + generator.normal(0, 40, image.shape))
        self.moves = moves

    def apply_coords(self, coords):
        return coords + self.moves


def test_noise_of_a_generator_of_its_own_is_not_taken_for_padding():
    """Pixels that come out the same by chance would each cost a cell."""
    steps = T.TransformList([T.PadTransform(0, 0, 16, 8), Noisy()])
    assert int(real_pixels(steps, HEIGHT, WIDTH).sum()) == HEIGHT * WIDTH
    with pytest.raises(UserError, match="Noisy does another thing each time it is applied"):
        real_pixels(T.TransformList([Noisy(moves=1)]), HEIGHT, WIDTH)


def test_noise_of_torch_leaves_the_draws_of_the_training():
    torch.manual_seed(0)
    step = Photometric(lambda image: image + 20 * torch.randn(image.shape).numpy())
    assert real_pixels(T.TransformList([step]), HEIGHT, WIDTH) is None
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))


def test_a_step_that_pads_and_levels_the_shades_is_not_all_real():
    def padded(image):
        return np.pad(stretched(image), ((0, 8), (0, 16), (0, 0))[: image.ndim])

    found = real_pixels(T.TransformList([Photometric(padded)]), HEIGHT, WIDTH)
    assert tuple(found.shape) == (HEIGHT + 8, WIDTH + 16) and not found.any()


class Moved(Photometric):
    def apply_coords(self, coords):
        return coords + np.array([16, 8])


def test_a_step_that_moves_and_levels_the_shades_is_not_all_real():
    """Else what it fills up would be distilled."""

    def moved(image):
        return np.pad(stretched(image), ((8, 0), (16, 0), (0, 0))[: image.ndim])[:HEIGHT, :WIDTH]

    found = real_pixels(T.TransformList([Moved(moved)]), HEIGHT, WIDTH)
    assert found is not None and not found.any()


def test_transform_that_cannot_be_asked_is_one_line(record):
    with pytest.raises(UserError, match="Broken does not tell .*once only.*`valid`") as error:
        mapper([Broken()])(record)
    assert "\n" not in str(error.value)


class TwoImages(DatasetMapper):
    """Puts two images into one, as a mosaic does."""

    def __call__(self, record):
        one, other = (super(TwoImages, self).__call__(record) for _ in range(2))
        one["image"] = torch.cat([one["image"], other["image"]], dim=2)
        return one


def test_images_joined_after_they_were_padded_are_refused(record):
    plain = mapper([T.Resize((32, 32))], TwoImages)(record)
    assert plain["image"].shape[-1] == 64 and "valid" not in plain
    with pytest.raises(UserError, match="TwoImages pads .*image.png .*of 2 augmented images"):
        mapper([T.FixedSizeCrop((96, 96))], TwoImages)(record)


def test_mapper_that_tells_by_itself_is_believed(record):
    def own(record):
        item = DatasetMapper(True, augmentations=[], image_format="BGR")(record)
        return item | {"valid": torch.ones(HEIGHT, WIDTH).bool().tril()}

    item = MarkPadding(own)(record)
    assert torch.equal(item["valid"], torch.ones(HEIGHT, WIDTH).bool().tril())
    valid = distilled(MimicLoss()).disparity_maps([item])["p3"][1]
    assert torch.equal(valid[0], torch.ones(6, 10).bool().tril(-1))


@pytest.mark.parametrize("mask", [torch.ones(3, 4).bool(), torch.ones(HEIGHT, WIDTH)])
def test_mask_of_another_size_or_type_is_refused(record, mask):
    item = mapper([])(record) | {"valid": mask}
    with pytest.raises(UserError, match=r"valid of .*image.png is .* make it bool of \(48, 80\)"):
        distilled(MimicLoss())([item])


def test_mapper_that_does_not_say_is_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert MarkPadding(lambda record: {"image": record})(5) == {"image": 5}
    assert len(caplog.records) == 1 and "every pixel is taken for real" in caplog.text


def test_the_users_mapper_is_not_changed_and_workers_can_have_it(record):
    inner = DatasetMapper(True, augmentations=[T.FixedSizeCrop((96, 96))], image_format="BGR")
    before = inner.augmentations
    there = pickle.loads(pickle.dumps(MarkPadding(inner)))
    assert there(record)["valid"].sum() == there(record)["valid"].sum() == HEIGHT * WIDTH
    assert inner.augmentations is before


def test_loaders_mark_what_their_mappers_pad(tmp_path, record):
    path = write_json(
        tmp_path / "a.json",
        [{"id": 1, "file_name": record["file_name"], "height": HEIGHT, "width": WIDTH}],
        [{"id": 1, "image_id": 1, "category_id": 1, "area": 9, "bbox": [1, 2, 30, 30],
          "iscrowd": 0}],
        enumerate(CLASSES, start=1),
    )  # fmt: skip
    name = coco_json(json=str(path), images="/")
    inner = DatasetMapper(True, augmentations=[T.FixedSizeCrop((96, 96))], image_format="BGR")
    train = build_train_loader(dataset=name, mapper=inner, total_batch_size=1, seed=0)
    test = build_test_loader(dataset=name, mapper=inner)
    for (item,) in (next(iter(train)), next(iter(test))):
        assert item["valid"].sum() == HEIGHT * WIDTH
        assert image_area([item])["masks"][0] is item["valid"]


def test_pictures_show_the_image_without_its_padding(record):
    model = distilled(MimicLoss())
    plain, padded = (
        mapper(steps)(record) for steps in ([], [T.PadTransform(16, 32, 48, 16, pad_value=9)])
    )
    first, second = (
        draw_disparity([item], model.disparity_maps([item]), "BGR") for item in (plain, padded)
    )
    np.testing.assert_array_equal(first, second)
