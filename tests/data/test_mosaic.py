"""Mosaic and mixup: boxes lie where the objects are seen, real is what a photograph shows."""

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image

from dfd import UserError
from dfd.data import Letterbox, MosaicMapper, closing_batch

SIZE = 128
COLOURS = [
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255),
    (255, 255, 255),
]  # fmt: skip
NOTHING = dict(
    mosaic_probability=0.0, mixup_probability=0.0, hsv_probability=0.0, flip_probability=0.0
)


def record_of(path, pixels, boxes=(), **more):
    """A record of an image that is written; the class of a box is its place."""
    cv2.imwrite(str(path), pixels)
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    height, width = pixels.shape[:2]
    return {"file_name": str(path), "image_id": path.stem, "height": height, "width": width,
            "annotations": annotations} | more  # fmt: skip


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Dark images of several ratios, each with one rectangle in a colour of its own."""
    folder, rng, records = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0), []
    for i, colour in enumerate(COLOURS):
        height, width = rng.integers(70, 200, 2)
        pixels = np.full((height, width, 3), 40, np.uint8)
        x0, y0 = rng.integers(0, 40, 2)
        x1, y1 = min(x0 + rng.integers(20, 90), width), min(y0 + rng.integers(20, 90), height)
        pixels[y0:y1, x0:x1] = colour
        box = [int(v) for v in (x0, y0, x1, y1)]
        record = record_of(folder / f"{i}.png", pixels, [box])
        record["annotations"][0]["category_id"] = i
        records.append(record)
    return records


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    """Images of one level each, so that whatever is mixed has another."""
    folder = tmp_path_factory.mktemp("gray")
    sizes = [(150, 90), (64, 200), (120, 120)]
    return [
        record_of(folder / f"{g}.png", np.full((*size, 3), g, np.uint8), [(0, 0, *size[::-1])])
        for g, size in zip(LEVELS, sizes, strict=True)
    ]


LEVELS = (20, 60, 220)
PAIRS = {(a + b) // 2 for a in LEVELS for b in LEVELS}


def mapper_of(records, **settings):
    mapper = MosaicMapper(**{"size": SIZE} | settings)
    mapper.bind(records, 0)
    return mapper


def seeded(mapper, record, seed):
    np.random.seed(seed)
    return mapper(record)


def seen_box(image, colour):
    """Around the pixels of a colour, mostly; None if there are none."""
    near = np.abs(image.astype(int) - np.array(colour)[:, None, None]).max(axis=0) < 128
    rows, columns = near.nonzero()
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def check_boxes(item, *, tight):
    """Each object is where its colour is, and each colour that is seen is an object."""
    image, instances = item["image"].numpy(), item["instances"]
    size = image.shape[1]
    near = max(1.01, 1.01 * size / SIZE)  # Pixels before the picture was resized.
    classes = instances.gt_classes.tolist()
    for i, colour in enumerate(COLOURS):
        seen = seen_box(image, colour)
        if i not in classes:
            assert seen is None or (seen[2:] - seen[:2]).min() <= 2
            continue
        box = instances.gt_boxes.tensor[classes.index(i)].numpy()
        assert (box >= 0).all() and (box <= size).all()
        assert seen is not None or (box[2:] - box[:2]).min() < 3
        if seen is None:
            continue
        assert (seen[:2] > box[:2] - near).all() and (seen[2:] < box[2:] + near).all()
        # A corner that is cut off leaves the box around the others too large.
        if tight or ((box > 0) & (box < size)).all() and (seen[2:] - seen[:2]).min() > 3:
            np.testing.assert_allclose(box, seen, atol=near)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize(
    ("settings", "tight"),
    [
        (dict(rotation=0, shear=0, scale=(0.5, 1.5)), True),
        (dict(rotation=0, shear=0, scale=(2, 2), translation=0), True),
        (dict(rotation=25, shear=8, scale=(0.4, 1.2)), False),
        (dict(rotation=0, shear=0, scale=(1, 1), sizes=[64, 96, 192]), True),
    ],
)
def test_boxes_are_where_the_objects_of_a_mosaic_are_seen(coloured, settings, tight, image_format):
    settings = dict(mixup_probability=0, hsv_probability=0, image_format=image_format) | settings
    mapper, checked, objects = mapper_of(coloured, **settings), 0, 0
    for seed in range(40):
        mapper.at_batch(10 * seed)
        item = seeded(mapper, coloured[seed % len(coloured)], seed)
        classes = item["instances"].gt_classes.tolist()
        if len(set(classes)) == len(classes) and not repeated(item):
            if image_format == "BGR":
                item["image"] = item["image"].flip(0)
            item["image"] = item["image"].flip(0)  # The images were written as BGR.
            check_boxes(item, tight=tight)
            checked, objects = checked + 1, objects + len(classes)
    assert checked >= 8 and objects >= 12


def repeated(item):
    """Whether an image is in a mosaic twice, and one of its two objects was dropped."""
    image = item["image"].numpy()
    for colour in COLOURS:
        near = np.abs(image.astype(int) - np.array(colour)[:, None, None]).max(axis=0) < 128
        swapped = np.abs(image[::-1].astype(int) - np.array(colour)[:, None, None])
        for mask in (near, swapped.max(axis=0) < 128):
            number, _ = cv2.connectedComponents(mask.astype(np.uint8))
            if number > 2:
                return True
    return False


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_of_both_images_of_a_mixup(coloured, flip):
    """At half their contrast; the mosaic is of one image, the second one is another."""
    first, second = coloured[0], coloured[1]
    # The second is in hardly any mosaic, and the only one that is mixed in.
    mapper = mapper_of([{**first, "annotations": []}] * 2000 + [second], rotation=0, shear=0,
                       scale=(1, 1), hsv_probability=0, flip_probability=flip)  # fmt: skip
    found = 0
    for seed in range(30):
        item = seeded(mapper, first, seed)
        classes = item["instances"].gt_classes.tolist()
        if classes.count(1) != 1:
            continue
        # The second object raises green by half, whatever it lies on.
        image = item["image"].numpy().astype(int)
        lies_on = image[1] - np.minimum(image[0], image[2])
        rows, columns = (lies_on > 64).nonzero()
        box = item["instances"].gt_boxes.tensor[classes.index(1)].numpy()
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, seen, atol=1.01)
        found += 1
    assert found > 15


def test_second_image_of_a_mixup_lies_in_its_square_as_the_official_one(tmp_path):
    """Turned over with its fill of 114; beyond the square is 0."""
    dark = np.full((SIZE, SIZE, 3), 20, np.uint8)
    first = record_of(tmp_path / "first.png", dark, [(0, 0, 99, 99)])
    tall = np.full((SIZE, SIZE // 2, 3), 220, np.uint8)
    second = record_of(tmp_path / "second.png", tall, [(0, 0, 64, 128)])
    bare = [{**first, "annotations": []}] * 2000
    plain = dict(rotation=0, shear=0, translation=0, scale=(2, 2), hsv_probability=0,
                 flip_probability=0, mixup_scale=(0.5, 0.5))  # fmt: skip
    mapper, sides = mapper_of([*bare, second], **plain), set()
    for seed in range(20):
        image = seeded(mapper, first, seed)["image"][0].numpy()
        # Half of what the second one shows; the other half is of 20 to 114.
        ranges = [image >= 120, (image >= 67) & (image <= 114), image <= 57]
        shown = np.select(ranges, [220, 114, 0], -1)
        left = shown[0, 0] == 220
        sides.add(bool(left))
        expected = np.zeros((SIZE, SIZE), int)
        expected[:64, :32], expected[:64, 32:64] = (220, 114) if left else (114, 220)
        np.testing.assert_array_equal(shown, expected)
    assert sides == {True, False}


def around(mask):
    """3 x 3 about each pixel of a mask; what is outside the picture is left out."""
    padded = np.pad(mask, 1, mode="edge")
    height, width = mask.shape
    return [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        (dict(mixup_probability=0), LEVELS),
        (dict(mixup_probability=0, scale=(2, 2)), LEVELS),
        (dict(mixup_probability=0, scale=(0.1, 0.1)), LEVELS),
        (dict(mixup_probability=0, sizes=[64, 224]), LEVELS),
        (dict(scale=(0.8, 1.2)), PAIRS),
        (dict(mixup_scale=(2, 3), sizes=[96, 160]), PAIRS),
        (dict(mosaic_probability=0, mixup_probability=0, sizes=[64, 160]), LEVELS),
    ],
)
def test_real_pixels_show_photographs_and_nothing_beside_them(gray, settings, levels):
    """And most of those that show photographs are real."""
    mapper, real, inner = mapper_of(gray, hsv_probability=0, **settings), 0, 0
    for seed in range(20):
        mapper.at_batch(10 * seed)
        item = seeded(mapper, gray[seed % 3], seed)
        image, valid = item["image"][0].numpy(), item["valid"].numpy()
        assert item["valid"].dtype == torch.bool and item["valid"].shape == item["image"].shape[1:]
        assert set(np.unique(image[valid])) <= set(levels)
        alike = np.logical_and.reduce([n == image for n in around(image)])
        height, width = valid.any(axis=1).sum(), valid.any(axis=0).sum()
        if not (valid[:height, :width].all() and image[0, 0] in LEVELS):  # Several images.
            assert alike[valid].all()  # No seam, and no pixel beside one.
        far = alike & np.isin(image, list(levels))
        for _ in range(2):
            far = np.logical_and.reduce(around(far))
        real, inner = real + (far & valid).sum(), inner + far.sum()
    # Not all: where two photographs of one level meet, there is a seam.
    assert real >= 0.75 * inner > 500


def test_letterbox_is_the_official_one(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (334, 500, 3), np.uint8)
    record = record_of(tmp_path / "a.png", pixels, [(50, 100, 450, 300)])
    mapper = mapper_of([record], size=640, **NOTHING)
    item = mapper(record)
    # Cut, not rounded: 427.52.
    expected = np.full((640, 640, 3), 114, np.uint8)
    expected[:427] = cv2.resize(pixels, (640, 427), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), expected)
    assert item["valid"][:427].all() and not item["valid"][427:].any()
    box = item["instances"].gt_boxes.tensor[0].numpy()
    np.testing.assert_allclose(box, np.array([50, 100, 450, 300]) * 1.28, atol=0.6)
    known = ("file_name", "image_id", "height", "width")
    assert {k: item[k] for k in known} == {k: record[k] for k in known}
    # What is evaluated is resized in the same way; the detector pads it.
    inputs = T.AugInput(pixels)
    tested = Letterbox(640)(inputs).apply_box(np.array([[0, 0, 500, 334]]))
    np.testing.assert_array_equal(inputs.image, expected[:427])
    np.testing.assert_allclose(tested, [[0, 0, 640, 427]])


def test_image_that_is_no_mosaic_lies_in_the_corner_after_its_flip(tmp_path):
    pixels = np.full((60, 120, 3), 50, np.uint8)
    pixels[10:30, 20:50] = 250
    record = record_of(tmp_path / "a.png", pixels, [(20, 10, 50, 30)])
    item = mapper_of([record], **NOTHING | dict(flip_probability=1.0))(record)
    image = item["image"][0].numpy()
    assert (image[:64] != 114).all() and (image[64:] == 114).all()
    rows, columns = (image > 200).nonzero()
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(item["instances"].gt_boxes.tensor[0], seen, atol=1.01)
    assert columns.min() > 60


def test_hsv_jitter_moves_what_it_may(tmp_path):
    record = record_of(tmp_path / "a.png", np.full((64, 64, 3), (60, 120, 180), np.uint8))
    plain = {tuple(mapper_of([record], **NOTHING)(record)["image"][:, 0, 0].tolist())}
    assert plain == {(60, 120, 180)}
    only_value = NOTHING | dict(hsv_probability=1.0, hsv_gains=(0, 0, 30))
    mapper = mapper_of([record], **only_value)
    values = {int(seeded(mapper, record, s)["image"].max()) for s in range(60)}
    assert min(values) < 160 and max(values) > 200 and 150 <= min(values) and max(values) <= 210
    assert 180 in values  # Not always.
    mapper = mapper_of([record], **NOTHING | dict(hsv_probability=1.0, hsv_gains=(90, 0, 0)))
    hues = [seeded(mapper, record, s)["image"][:, 0, 0].tolist() for s in range(40)]
    # Round the circle of hues: each channel is the largest of some.
    assert {int(np.argmax(h)) for h in hues} == {0, 1, 2}
    for image in hues:
        np.testing.assert_allclose([max(image), min(image)], [180, 60], atol=3)


def test_where_all_boxes_would_be_dropped_the_image_is_taken_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    boxes = [(10, 10, 11, 11), (20, 20, 50, 20.5)]
    record = record_of(tmp_path / "a.png", pixels, boxes)
    for mapper in (mapper_of([record]), mapper_of([record], **NOTHING | dict(hsv_probability=1))):
        item = seeded(mapper, record, 0)
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), pixels)
        np.testing.assert_allclose(item["instances"].gt_boxes.tensor, boxes)
        assert item["valid"].all()
    # One that is left is enough.
    record = record_of(tmp_path / "b.png", pixels, [*boxes, (5, 5, 60, 60)])
    item = mapper_of([record], **NOTHING)(record)
    np.testing.assert_allclose(item["instances"].gt_boxes.tensor, [[5, 5, 60, 60]])


def test_crowds_and_empty_areas_are_no_objects(tmp_path, caplog):
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    record = record_of(tmp_path / "a.png", pixels, [(0, 0, 40, 40)] * 5)
    crowd, empty, negative, unknown, _ = record["annotations"]
    crowd["iscrowd"], empty["area"], negative["area"], unknown["area"] = 1, 0, -1.0, None
    item = mapper_of([record], **NOTHING)(record)
    assert item["instances"].gt_classes.tolist() == [3, 4]
    assert "leaves out, of an area not above 0: 2, e.g. in image a" in caplog.text


def test_boxes_in_both_modes_and_beyond_the_image(tmp_path):
    record = record_of(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8), [(-9, 4, 70, 30)] * 2)
    record["annotations"][1].update(bbox=[10, 20, 30, 30], bbox_mode=BoxMode.XYWH_ABS)
    boxes = mapper_of([record], size=64, **NOTHING)(record)["instances"].gt_boxes.tensor
    np.testing.assert_allclose(boxes, [[0, 4, 64, 30], [10, 20, 40, 50]])


def test_one_image_is_enough_and_none_with_objects_is_an_error(coloured, tmp_path):
    item = seeded(mapper_of(coloured[:1]), coloured[0], 0)
    assert set(item["instances"].gt_classes.tolist()) == {0}
    bare = [{**record, "annotations": []} for record in coloured]
    with pytest.raises(UserError, match="none of the 7 images has an object.*mixup_probability=0"):
        mapper_of(bare)
    item = seeded(mapper_of(bare, mixup_probability=0), bare[0], 0)
    assert len(item["instances"]) == 0 and item["valid"].any()
    # The second image is always one with an object.
    some = [*bare, coloured[3]]
    mapper, mixed = mapper_of(some, translation=0, scale=(0.3, 1)), 0
    for seed in range(20):
        mixed += 3 in seeded(mapper, coloured[3], seed)["instances"].gt_classes
    assert mixed > 15


def test_mapper_without_records_says_what_is_missing(coloured):
    with pytest.raises(UserError, match="no other images.*build_train_loader"):
        MosaicMapper(size=SIZE)(coloured[0])
    assert MosaicMapper(size=SIZE, **NOTHING)(coloured[0])["valid"].any()


def test_images_are_read_by_the_rules_of_the_loaders(tmp_path, coloured):
    photo = Image.fromarray(np.full((40, 80, 3), 200, np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # To be turned by a quarter.
    photo.save(tmp_path / "a.jpg", exif=exif)
    record = {"file_name": str(tmp_path / "a.jpg"), "image_id": 1, "annotations": []}
    for height, width in ((40, 80), (80, 40)):  # As stored, as turned.
        item = MosaicMapper(size=SIZE, **NOTHING)({**record, "height": height, "width": width})
        shown = item["valid"].nonzero().amax(0) + 1
        assert shown.tolist() == [height * SIZE // 80, width * SIZE // 80]
    # Those of a mosaic that are not the record's own, too.
    (tmp_path / "bad.png").write_bytes(b"no image")
    broken = {**record, "file_name": str(tmp_path / "bad.png")}
    mapper = mapper_of([broken], mixup_probability=0)
    with pytest.raises(UserError, match=r"cannot load image .*bad\.png"):
        mapper(coloured[0])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(size=100), "MosaicMapper.size is 100; it must be a multiple of 32"),
        (dict(size=0), "MosaicMapper.size is 0;"),
        (dict(size=64.0), "MosaicMapper.size is 64.0;"),
        (dict(size="large"), "MosaicMapper.size is 'large';"),
        (dict(sizes=[64, 70]), "one of MosaicMapper.sizes is 70; it must be a multiple of 32"),
        (dict(sizes=[]), "MosaicMapper.sizes is [];"),
        (dict(sizes=64), "MosaicMapper.sizes is 64; it must be a list"),
        (dict(size_period=0), "MosaicMapper.size_period is 0;"),
        (dict(off_from_batch=-1), "MosaicMapper.off_from_batch is -1;"),
        (dict(off_from_batch=1.5), "MosaicMapper.off_from_batch is 1.5;"),
        (dict(mosaic_probability=1.1), "MosaicMapper.mosaic_probability is 1.1; it must be a num"),
        (dict(mixup_probability=-0.1), "MosaicMapper.mixup_probability is -0.1;"),
        (dict(hsv_probability="often"), "MosaicMapper.hsv_probability is 'often';"),
        (dict(flip_probability=float("nan")), "MosaicMapper.flip_probability is nan;"),
        (dict(flip_probability=True), "MosaicMapper.flip_probability is True;"),
        (dict(mosaic_probability=0), "mixup is of mosaics, and mosaic_probability is 0"),
        (dict(rotation=-1), "MosaicMapper.rotation is -1;"),
        (dict(translation=None), "MosaicMapper.translation is None;"),
        (dict(shear=90), "MosaicMapper.shear is 90; it must be a number from 0 to 89"),
        (dict(scale=(0, 1)), "MosaicMapper.scale is (0, 1); it must be two numbers above 0"),
        (dict(scale=(2, 1)), "MosaicMapper.scale is (2, 1);"),
        (dict(mixup_scale=0.5), "MosaicMapper.mixup_scale is 0.5;"),
        (dict(hsv_gains=(5, 30)), "MosaicMapper.hsv_gains is (5, 30); it must be three numbers"),
        (dict(image_format="L"), "MosaicMapper.image_format is 'L'; it must be one of BGR, RGB"),
    ],
)
def test_setting_outside_its_range_is_one_line(settings, named):
    with pytest.raises(UserError) as error:
        MosaicMapper(**settings)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [100, -32, "a", 32.0, None])
def test_size_of_a_letterbox_is_checked(size):
    with pytest.raises(UserError, match="Letterbox.size is .*multiple of 32"):
        Letterbox(size)


def test_closing_part_is_a_share_of_the_run_in_batches():
    assert closing_batch(max_iter=300) == 285
    assert closing_batch(max_iter=300, accumulation_steps=4) == 4 * 285
    assert closing_batch(max_iter=10, closing=0) == 10 and closing_batch(max_iter=9, closing=1) == 0
    with pytest.raises(UserError, match="closing is 15; it must be a number from 0 to 1"):
        closing_batch(max_iter=300, closing=15)
