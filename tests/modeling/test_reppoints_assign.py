"""The assigners, all objects at once, against one object after the other."""

import math

import pytest
import torch

from dfd.errors import UserError
from dfd.modeling.reppoints import assign_boxes, assign_points
from dfd.modeling.reppoints.points import cell_points

STRIDES = (8, 16, 32)
SIZES = ((8, 12), (4, 6), (2, 3))


def cells():
    return cell_points(SIZES, STRIDES, "cpu")


def plain_points(points, gt_boxes, num_pos, valid):
    """The rule as it is told: a later object takes a cell over only if it is nearer."""
    assigned = [-1] * len(points)
    nearest = [math.inf] * len(points)
    levels = [int(math.log2(stride)) for stride in points[:, 2].tolist()]
    for index, (x0, y0, x1, y1) in enumerate(gt_boxes.tolist()):
        width, height = max(x1 - x0, 1e-6), max(y1 - y0, 1e-6)
        level = int((math.log2(width / 4) + math.log2(height / 4)) / 2)
        level = min(max(level, min(levels)), max(levels))
        distances = []
        for cell, (x, y, _) in enumerate(points.tolist()):
            if levels[cell] == level and valid[cell]:
                away = (x - (x0 + x1) / 2) / width, (y - (y0 + y1) / 2) / height
                distances.append((math.hypot(*away), cell))
        for distance, cell in sorted(distances)[:num_pos]:
            if distance < nearest[cell]:
                nearest[cell], assigned[cell] = distance, index
    return assigned


def iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-6)


def plain_boxes(boxes, gt_boxes, positive, negative, valid):
    """The rule as it is told: each object in order takes the boxes that overlap it most."""
    table = [[iou(gt, box) for box in boxes.tolist()] for gt in gt_boxes.tolist()]
    assigned = []
    for cell, inside in enumerate(valid):
        column = [row[cell] for row in table]
        best = max(column)
        if not inside:
            assigned.append(-2)
        elif best >= positive:
            assigned.append(column.index(best))
        else:
            assigned.append(-1 if best < negative else -2)
    for index, row in enumerate(table):
        best = max(value for value, inside in zip(row, valid, strict=True) if inside)
        for cell, value in enumerate(row):
            if valid[cell] and best > 0 and value == best:
                assigned[cell] = index
    return assigned


def random_objects(generator, count, integer):
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 80
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64).square() * 70
    boxes = torch.cat([corners, corners + sides], dim=1)
    return boxes.round() if integer else boxes


@pytest.mark.parametrize("num_pos", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_points_as_one_object_after_the_other(seed, num_pos):
    generator = torch.Generator().manual_seed(seed)
    # Many more than there are cells, so that they contend.
    gt_boxes = random_objects(generator, 60, integer=False)
    gt_boxes[7] = gt_boxes[3]  # As near: the earlier one keeps it.
    points = cells().double()
    valid = torch.rand(len(points), generator=generator) < (0.6 if seed % 2 else 2.0)
    found = assign_points(points, gt_boxes, num_pos=num_pos, valid=valid)
    assert found.tolist() == plain_points(points, gt_boxes, num_pos, valid.tolist())
    assert not (found == 7).any()


@pytest.mark.parametrize("seed", range(4))
def test_boxes_as_one_object_after_the_other(seed):
    generator = torch.Generator().manual_seed(seed)
    # Whole pixels and twins, so that there are ties.
    gt_boxes = random_objects(generator, 15, integer=True)
    gt_boxes[5] = gt_boxes[2]
    gt_boxes[9, 2:] = gt_boxes[9, :2]
    boxes = random_objects(generator, 150, integer=True)
    boxes[:9] = gt_boxes[:9]
    boxes[20:40] = boxes[40:60]
    valid = torch.rand(len(boxes), generator=generator) < (0.6 if seed % 2 else 2.0)
    found = assign_boxes(boxes, gt_boxes, valid=valid)
    assert found.tolist() == plain_boxes(boxes, gt_boxes, 0.5, 0.4, valid.tolist())
    assert not (found == 2).any()  # Its twin is later.
    assert not (found == 9).any()  # It has no area.
    strict = assign_boxes(boxes, gt_boxes, positive=0.8, negative=0.1)
    every = [True] * len(boxes)
    assert strict.tolist() == plain_boxes(boxes, gt_boxes, 0.8, 0.1, every)


def test_no_objects():
    points, none = cells(), torch.zeros(0, 4)
    assert assign_points(points, none).tolist() == [-1] * len(points)
    assert assign_boxes(torch.rand(5, 4), none).tolist() == [-1] * 5
    valid = torch.tensor([True, False, True, True, False])
    assert assign_boxes(torch.rand(5, 4), none, valid=valid).tolist() == [-1, -2, -1, -1, -2]


def test_no_cells():
    gt_boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    assert len(assign_points(torch.zeros(0, 3), gt_boxes)) == 0
    assert len(assign_boxes(torch.zeros(0, 4), gt_boxes)) == 0


@pytest.mark.parametrize("num_pos", [7, 10**6])
def test_more_cells_wanted_than_a_level_has(num_pos):
    huge = torch.tensor([[0.0, 0.0, 200.0, 200.0]])
    points = cells()
    found = assign_points(points, huge, num_pos=num_pos)
    assert found.tolist() == [0 if stride == 32 else -1 for stride in points[:, 2].tolist()]


def test_a_size_whose_level_is_missing_gets_no_cell():
    points = torch.tensor([[0.0, 0.0, 8.0], [0.0, 0.0, 32.0]])
    assert assign_points(points, torch.tensor([[0.0, 0.0, 64.0, 64.0]])).tolist() == [-1, -1]


def test_objects_that_nothing_overlaps_get_no_box():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 20.0]])
    gt_boxes = torch.tensor([[50.0, 50.0, 60.0, 60.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 9.0]])
    assert assign_boxes(boxes, gt_boxes).tolist() == [-1, -1]
    # The same beside an object that has one.
    more = torch.cat([gt_boxes, boxes[1:]])
    assert assign_boxes(boxes, more).tolist() == [-1, 3]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("strange", [[NAN] * 4, [0, 0, INF, NAN], [9, 9, 2, 2]], ids=str)
def test_a_box_that_is_no_number_changes_nothing_for_the_others(strange):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 20.0], [1.0, 0.0, 10.0, 9.0]])
    of_one = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    both = torch.cat([of_one, torch.tensor([strange], dtype=torch.float32)])
    expected = [0, -1, 0]
    assert assign_boxes(boxes, of_one).tolist() == assign_boxes(boxes, both).tolist() == expected
    assert assign_boxes(boxes, both[1:]).tolist() == [-1] * 3
    # As one that is predicted, too.
    assert assign_boxes(torch.cat([boxes, both[1:]]), of_one).tolist() == [*expected, -1]
    if strange[2] > strange[0] or strange[0] != strange[0]:
        assert not (assign_points(cells(), both) == 1).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_low_precision_is_computed_in_full(dtype):
    """Areas of a thousand pixels squared are beyond fp16."""
    boxes = torch.tensor([[0.0, 0.0, 512.0, 512.0], [0.0, 0.0, 1024.0, 1024.0]])
    gt_boxes = torch.tensor([[0.0, 0.0, 768.0, 768.0]])
    assert assign_boxes(boxes, gt_boxes).tolist() == [-2, 0]
    assert assign_boxes(boxes.to(dtype), gt_boxes).tolist() == [-2, 0]
    assert assign_boxes(boxes.to(dtype), gt_boxes.to(dtype)).tolist() == [-2, 0]
    # The object's centre, 1028.25, is nearer to the second; rounded, it is between the two.
    points = torch.tensor([[1024.0, 0, 8], [1032.0, 0, 8], [1040.0, 0, 8]])
    gt_boxes = torch.tensor([[1010.0, 0.0, 1046.5, 8.0]])
    assert assign_points(points, gt_boxes).tolist() == [-1, 0, -1]
    assert assign_points(points.to(dtype), gt_boxes).tolist() == [-1, 0, -1]


@pytest.mark.parametrize("thresholds", [(0.3, 0.4), (0.5, -0.1), (math.nan, 0.4)])
def test_thresholds_that_leave_open_what_a_box_is(thresholds):
    with pytest.raises(UserError, match="negative_iou is .* and positive_iou"):
        assign_boxes(torch.rand(3, 4), torch.rand(2, 4), *thresholds)


@pytest.mark.parametrize("num_pos", [0, -1, 1.5])
def test_no_cells_of_an_object(num_pos):
    with pytest.raises(UserError, match=f"num_pos is {num_pos}; it must be an integer"):
        assign_points(cells(), torch.rand(2, 4), num_pos=num_pos)
