"""timm's hierarchical models as Detectron2 backbones, for an FPN on top.

Shape shorthand: N images, C channels, H x W cells of one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from detectron2.modeling import Backbone
from timm.layers import Format, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError, first_line
from .timm_weights import create_trunk, known_model, not_made, plain

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_USUAL = ("c2", "c3", "c4", "c5")
NORMS = ("", "FrozenBN", "SyncBN")
# Not square, so that height and width are not mistaken for one another; windows of 7 do not fit.
_PROBE = (96, 160)
# Made for one size unless they are told otherwise, down to a last stage that is one window of its
# size and shifts none.
_ANY_SIZE = {
    f"timm.models.{name}": {"strict_img_size": False, "always_partition": True}
    for name in ("swin_transformer", "swin_transformer_v2")
}


class TimmPyramid(Backbone):
    """The stages of a hierarchical timm model, named by stride: c2 has stride 4, c5 stride 32.

    ResNet, RegNet, ConvNeXt, Swin, EfficientNet, MobileNet, hybrids of convolution and attention:
    what timm's ``features_only`` offers with strides that are powers of two. The model is tried
    out when it is made, so that an unsuitable one is refused then. Its keys are those of timm's
    ``features_only`` model, after ``body.``.
    """

    def __init__(
        self,
        *,
        model_name: str,
        out_features: Sequence[str] | None = None,
        pretrained: bool | str = False,
        img_size: int | None = None,
        norm: str = "",
        freeze_at: int = 0,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model_name: as in ``timm.list_models()``, e.g. "convnext_tiny.fb_in22k".
            out_features: the levels to put out, by name; None: those of c2 to c5 that it has.
            pretrained: True: timm's own weights, by download; a path: a local file, of timm, or
                safetensors; False: random.
            img_size: for models that work at one size only (MaxViT, CoAtNet, Hiera): the side of
                the square that all images are padded to, in pixels. None: images of any size.
            norm: of its batch norms: "": timm's; "FrozenBN": constant, statistics and weights;
                "SyncBN": statistics over all processes.
            freeze_at: the levels up to c<this> and all before them are frozen, batch norms
                included; 0: none. Detectron2's ``freeze_at=2`` is 2.
            model_args: more arguments of timm's model, e.g. ``{"drop_path_rate": 0.1}``.

        Raises:
            UserError: an unknown or unsuitable model, weights that do not fit, or a setting
                outside its range.
        """
        super().__init__()
        self._where = f"TimmPyramid({model_name})"
        self.model_name, self.pretrained = model_name, pretrained
        self._img_size = img_size
        known_model(model_name)
        function = timm.model_entrypoint(model_name.partition(".")[0])  # Without weights' tag.
        arguments = dict(_ANY_SIZE.get(function.__module__, {}))
        if img_size is not None:
            arguments["img_size"] = img_size
        arguments.update(plain(model_args))
        with torch.device("meta"):  # Only its description is wanted.
            description = self._create(model_name, False, **arguments).feature_info
        names = self._levels(description.reduction())
        wanted = [n for n in _USUAL if n in names] if out_features is None else list(out_features)
        if not wanted or any(name not in names for name in wanted):
            raise UserError(
                f"{self._where}: it has the levels {', '.join(names)}, but out_features is "
                f"{wanted or 'c2 to c5'}"
            )
        wanted.sort(key=lambda name: names[name])
        self.body = self._create(
            model_name, pretrained, out_indices=[names[name] for name in wanted], **arguments
        )
        info = self.body.feature_info
        self._channels_last = getattr(self.body, "output_fmt", None) == Format.NHWC
        self._out_features = wanted
        self._out_feature_channels = dict(zip(wanted, info.channels(), strict=True))
        self._out_feature_strides = {name: 2 ** int(name[1:]) for name in wanted}
        self._try_out()
        self._freeze(norm, freeze_at, names)

    def _create(self, model_name: str, pretrained: bool | str, **arguments: Any) -> nn.Module:
        try:
            if isinstance(pretrained, str):
                # Through the whole model, for timm loads what fits into one of features_only and
                # says nothing of the rest.
                of_whole = {k: v for k, v in arguments.items() if k != "out_indices"}
                whole = create_trunk(model_name, pretrained=pretrained, **of_whole)
                arguments["pretrained_cfg_overlay"] = {"state_dict": whole.state_dict()}
            return timm.create_model(
                model_name, features_only=True, pretrained=bool(pretrained), **arguments
            )
        except UserError:
            raise
        except Exception as error:
            # timm raises what it meets: of arguments a TypeError, of weights a RuntimeError.
            raise not_made(self._where, error, pretrained) from error

    def _levels(self, strides: Sequence[int]) -> dict[str, int]:
        """Level name to timm's index of it."""
        names: dict[str, int] = {}
        for index, stride in enumerate(strides):
            name = f"c{stride.bit_length() - 1}"
            if stride & (stride - 1) or name in names:
                raise UserError(
                    f"{self._where}: the strides of its features are {list(strides)}, but levels "
                    "need different powers of two"
                    + ("; for a plain ViT take TimmViT" if name in names else "")
                )
            names[name] = index
        return names

    @torch.no_grad()
    def _try_out(self) -> None:
        """Run it, and compare what comes out with what timm says of it.

        Raises:
            UserError: it fails at a size, or shapes are other than its strides say.
        """
        if self._img_size is not None:
            self._try_size((self._img_size, self._img_size))
            return
        self._try_size(_PROBE)
        if _has_tables(self.body):
            # One of positions that is too short for more than the model's own size is read at other
            # positions below it.
            described = timm.get_pretrained_cfg(self.model_name)
            own = max(described.input_size[1:]) if described is not None else 224
            self._try_size((own + 32, own + 64))

    def _try_size(self, size: tuple[int, int]) -> None:
        was_training = self.body.training
        try:
            features = self.eval()(torch.zeros(1, 3, *size))
        except UserError:
            raise
        except Exception as error:
            remedy = (
                "if it works at one size only, set img_size here and square_pad of the FPN"
                if self._img_size is None
                else "choose another img_size"
            )
            raise UserError(
                f"{self._where}: it fails on an image of {size[0]} x {size[1]} pixels "
                f"({first_line(error)}): {remedy}"
            ) from error
        finally:
            self.train(was_training)
        for name, feature in features.items():
            stride, channels = self._out_feature_strides[name], self._out_feature_channels[name]
            expected = (channels, -(-size[0] // stride), -(-size[1] // stride))
            if tuple(feature.shape[1:]) != expected:
                raise UserError(
                    f"{self._where}: of an image of {size[0]} x {size[1]} pixels, {name} has "
                    f"the shape {tuple(feature.shape[1:])}; stride {stride} and {channels} "
                    f"channels make {expected}"
                )

    def _freeze(self, norm: str, freeze_at: int, levels: Mapping[str, int]) -> None:
        if norm not in NORMS:
            raise UserError(f"{self._where}: norm is {norm!r}; it must be one of {NORMS}")
        if norm and not any(isinstance(m, _BatchNorm) for m in self.body.modules()):
            raise UserError(f"{self._where}: norm is {norm!r}, but it has no batch norms")
        level = f"c{freeze_at}"
        if freeze_at and level not in levels:
            raise UserError(
                f"{self._where}: freeze_at is {freeze_at}; it must be 0, or the number of one of "
                f"{', '.join(levels)}"
            )
        if norm == "FrozenBN":
            self.body = freeze_batch_norm_2d(self.body)
        elif norm == "SyncBN":
            self.body = convert_sync_batchnorm(self.body)
        if freeze_at:
            self._freeze_up_to(self.body.feature_info.module_name(levels[level]))

    def _freeze_up_to(self, module: str) -> None:
        """Freeze all that the model runs up to a module, which timm keeps in that order."""
        paths = [path for path, _ in self.body.named_modules()]
        # timm takes the model apart, and calls stages.0 of it stages_0, or wraps it as "model".
        names = (module, module.replace(".", "_"), f"model.{module}")
        path = next((name for name in names if name in paths), None)
        if path is None:
            raise UserError(
                f"{self._where}: freeze_at cannot be set, for timm does not tell where in it "
                f"{module} is: freeze_at must be 0"
            )
        last = max(i for i, p in enumerate(paths) if p == path or p.startswith(f"{path}."))
        for index, name in enumerate(paths[: last + 1]):
            owner = self.body.get_submodule(name)
            for parameter in owner.parameters(recurse=False):
                parameter.requires_grad = False
            if index and isinstance(owner, _BatchNorm):
                parent, _, child = name.rpartition(".")
                setattr(self.body.get_submodule(parent), child, freeze_batch_norm_2d(owner))

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    @property
    def padding_constraints(self) -> dict[str, int]:
        constraints = {"size_divisibility": self.size_divisibility}
        return constraints | ({"square_size": self._img_size} if self._img_size else {})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (N,3,height,width), normalised.

        Returns:
            Level name to (N,C,H,W).
        """
        if self._img_size is not None and images.shape[-2:] != (self._img_size, self._img_size):
            raise UserError(
                f"{self._where}: a batch of {images.shape[-2]} x {images.shape[-1]} pixels, but it "
                f"was made for {self._img_size} x {self._img_size}: set square_pad of the FPN to "
                f"{self._img_size}"
            )
        features = self.body(images)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._out_features, features, strict=True))


def _has_tables(model: nn.Module) -> bool:
    """Whether it has weights of positions: others than those of convolutions, linear and norms."""
    layers = (nn.Linear, *_CONVOLUTIONS)
    others = [module for module in model.modules() if not isinstance(module, layers)]
    return any(p.dim() > 1 for module in others for p in module.parameters(recurse=False))
