"""ViTDet's simple feature pyramid, padded as its levels need."""

from __future__ import annotations

from detectron2.modeling import SimpleFeaturePyramid

from ..errors import UserError


class SimplePyramid(SimpleFeaturePyramid):
    """Detectron2's ``SimpleFeaturePyramid``, with the same keys, for images of any size.

    Detectron2's own tells nobody that images must be padded to a multiple of 32: its key is
    misspelt and its ``size_divisibility`` is 0, so that without ``square_pad`` the coarse levels
    come out too small. Here both are told. With ``square_pad`` an image that is larger is refused
    (Detectron2 crops it in silence when it is alone in its batch).
    """

    def __init__(self, net, in_feature: str = "last_feat", **kwargs) -> None:
        """
        Args:
            net: a backbone of one feature map whose stride is a power of two.
            in_feature: its name.
            kwargs: as Detectron2's: ``out_channels``, ``scale_factors``, ``top_block``, ``norm``,
                ``square_pad``.

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
        super().__init__(net=net, in_feature=in_feature, **kwargs)
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
