import numpy as np
import torch

from dfd.engine.hooks.disparity_image import draw_disparity


def picture(disparity, valid=None, input_format="BGR"):
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[0] = 200  # Blue, in BGR.
    valid = torch.ones_like(disparity, dtype=torch.bool) if valid is None else valid
    return draw_disparity([{"image": image}], {"p3": (disparity, valid)}, input_format)


def test_one_tile_for_the_image_and_one_per_level():
    drawn = picture(torch.zeros(1, 4, 6))
    assert drawn.dtype == np.uint8
    assert drawn.shape == (32 + 18, 2 * (48 + 2), 3)
    np.testing.assert_array_equal(drawn[18 + 5, 5], [0, 0, 200])
    np.testing.assert_array_equal(
        picture(torch.zeros(1, 4, 6), input_format="RGB")[18 + 5, 5], [200, 0, 0]
    )


def test_high_disparity_shows_where_it_is():
    disparity = torch.zeros(1, 4, 6)
    disparity[0, 1, 4] = 2.0
    drawn = picture(disparity).astype(int)
    level = drawn[18:, 50:98]
    different = np.abs(level - level[0, 0]).sum(axis=2) > 30
    rows, columns = np.nonzero(different)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 32, 39)


def test_cells_on_padding_are_not_drawn():
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, :4, :6] = True
    disparity = torch.full((1, 8, 8), 2.0)
    disparity[:, :4, :6] = 0
    np.testing.assert_array_equal(
        picture(disparity, valid)[18:], picture(torch.zeros(1, 4, 6))[18:]
    )
