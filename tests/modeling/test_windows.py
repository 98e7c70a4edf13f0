"""Windows of tokens: what goes in comes out."""

import pytest
import torch

from dfd.modeling.windows import TokenOrder, attend_in_windows, choose_window

SIZES = [(8, 8, 4), (7, 9, 4), (4, 12, 4), (3, 2, 4)]


@pytest.mark.parametrize(("height", "width", "size"), [*SIZES, (5, 6, 0)])
def test_order_is_undone(height, width, size):
    order = TokenOrder(height=height, width=width, window=size)
    x = torch.randn(2, height * width, 3)
    inside = order.enter(x)
    torch.testing.assert_close(order.leave(inside), x.unflatten(1, (height, width)))
    if size:
        torch.testing.assert_close(order.join(order.split(inside)), inside)


@pytest.mark.parametrize(
    ("grid", "window"),
    [((64, 64), 16), ((32, 32), 16), ((40, 40), 10), ((56, 56), 14), ((37, 37), 14), ((8, 8), 0)],
)
def test_chosen_window_divides_the_grid_where_one_does(grid, window):
    assert choose_window(*grid) == window


def test_each_window_sees_itself_and_the_prefix_alone():
    order = TokenOrder(height=4, width=4, window=2)
    x = torch.randn(1, 1 + 16, 3)

    def mean(tokens):
        return tokens.mean(1, keepdim=True).expand_as(tokens)

    out = attend_in_windows(mean, x, order, 1)
    for window in range(4):
        members = x[0, 1 + 4 * window : 5 + 4 * window]
        expected = torch.cat([x[0, :1], members]).mean(0)
        torch.testing.assert_close(out[0, 1 + 4 * window], expected)
    torch.testing.assert_close(out[0, 0], out[0, 1:].mean(0))
