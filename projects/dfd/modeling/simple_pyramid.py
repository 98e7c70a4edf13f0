"""ViTDet's simple feature pyramid, padded as its levels need."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling import Backbone, SimpleFeaturePyramid
from torch import nn

from ..errors import UserError


class SimplePyramid(SimpleFeaturePyramid):
    """Detectron2's ``SimpleFeaturePyramid``, with the same keys, for images of any size.

    Detectron2's own tells nobody that images must be padded to a multiple of 32: its key is
    misspelt and its ``size_divisibility`` is 0, so that without ``square_pad`` the coarse levels
    come out too small. Here both are told. With ``square_pad`` an image that is larger is refused
    (Detectron2 crops it in silence when it is alone in its batch).
    """

    def __init__(
        self,
        net: Backbone,
        out_channels: int,
        scale_factors: Sequence[float],
        in_feature: str = "last_feat",
        top_block: nn.Module | None = None,
        norm: str = "LN",
        square_pad: int = 0,
    ) -> None:
        """
        Args:
            net: a backbone of one feature map whose stride is a power of two.
            out_channels: of every level.
            scale_factors: of each level, its size over the map's: 4, 2, 1 or 0.5.
            in_feature: the name of the map.
            top_block: makes further levels of the last.
            norm: of the pyramid's convolutions.
            square_pad: side of the square that images are padded to, in pixels; 0: none.

        Raises:
            UserError: the stride is no power of two, or ``square_pad`` no multiple of what the
                levels need.
        """
        stride = net.output_shape()[in_feature].stride
        if stride & (stride - 1):
            raise UserError(
                f"SimplePyramid: the stride of {type(net).__name__} is {stride}, but that of a "
                "level p<n> is 2**n: give the network patch_size=16"
            )
        super().__init__(
            net=net,
            in_feature=in_feature,
            out_channels=out_channels,
            scale_factors=scale_factors,
            top_block=top_block,
            norm=norm,
            square_pad=square_pad,
        )
        # The network's own patches must divide the image too.
        self._size_divisibility = max(self._size_divisibility, stride)
        if self._square_pad % self._size_divisibility:
            raise UserError(
                f"SimplePyramid(square_pad={self._square_pad}): it must be a multiple of "
                f"{self._size_divisibility}"
            )

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}
