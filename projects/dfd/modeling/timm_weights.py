"""timm models as trunks of detectors: made by name, weights from timm or from a file."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from torch import nn

from ..errors import UserError, first_line
from ..weights.files import file_sha256
from ..weights.strict import local_path, read_weights

logger = logging.getLogger(__name__)

# What checkpoints hold beside the trunk: classifiers, and what only pre-training needs.
_NOT_OF_THE_TRUNK = ("head", "fc_norm", "attn_pool", "decoder", "mask_token", "lm_head")


def known_model(model_name: str) -> None:
    """
    Raises:
        UserError: timm has no model of this name.
    """
    name = model_name.partition(".")[0]
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), 5)
    raise UserError(
        f"timm {timm.__version__} has no model {model_name!r}"
        + (f"; near it: {', '.join(near)}" if near else "")
    )


def plain(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments as timm takes them, without the lists and dicts of a config."""
    return {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in (arguments or {}).items()
    }


def pretrained_files(model: nn.Module) -> list[dict[str, str]]:
    """``path`` and ``sha256`` of each file that a timm model within was given for its weights.

    What timm fetched by a name has the name as its path, and no hash.
    """
    found = {}
    for module in model.modules():
        source = getattr(module, "pretrained", False) if hasattr(module, "model_name") else False
        if source is True:
            found[module.model_name] = {"path": module.model_name, "sha256": ""}
        elif isinstance(source, str):
            with contextlib.suppress(UserError):  # No file: a name of somebody else's module.
                sha256 = file_sha256(local_path(source, "pretrained"))
                found[source] = {"path": source, "sha256": sha256}
    return list(found.values())


def pixel_statistics(model_name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that a timm model wants, RGB, for pixels in [0, 255].

    Raises:
        UserError: timm has no model of this name.
    """
    known_model(model_name)
    try:
        cfg = timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        raise UserError(f"{model_name}: {first_line(error)}") from error
    mean, std = (cfg.mean, cfg.std) if cfg else timm.models.DefaultCfg().default
    return [255 * value for value in mean], [255 * value for value in std]


def create_trunk(
    model_name: str,
    *,
    pretrained: bool | str,
    final_norm: bool = False,
    kinds: Sequence[type[nn.Module]] = (nn.Module,),
    **arguments: Any,
) -> nn.Module:
    """A timm model without its classifier; its weights random, timm's or a file's.

    Args:
        pretrained: True: timm's own, by download; a path: of a checkpoint that timm, MAE or DINOv2
            wrote, or safetensors, read without running code from it; False: random.
        final_norm: whether the last norm is used; else a file need not hold it.
        kinds: the classes that will do.
        arguments: timm's.

    Raises:
        UserError: an unknown or unsuitable model or argument, or weights that cannot be had.
    """
    known_model(model_name)
    try:
        model = timm.create_model(
            model_name, pretrained=pretrained is True, num_classes=0, **arguments
        )
    except Exception as error:
        # timm raises what it meets: of arguments a TypeError, of sizes an AssertionError, of
        # downloads whatever its client raises. A model of another kind lacks arguments.
        _check_kind(_plain_model(model_name), model_name, kinds)
        raise not_made(f"timm model {model_name}", error, pretrained) from error
    _check_kind(model, model_name, kinds)
    if isinstance(pretrained, str):
        load_trunk(model, pretrained, model_name, final_norm)
    return model


def not_made(what: str, error: Exception, pretrained: bool | str) -> UserError:
    """The error for a model that timm could not make."""
    fetch = " (if its weights cannot be fetched, name a file of them: pretrained=PATH)"
    return UserError(
        f"{what} cannot be made: {first_line(error)}{fetch if pretrained is True else ''}"
    )


def _plain_model(model_name: str) -> nn.Module | None:
    """The model by its name alone, without memory; None if that cannot be had."""
    try:
        with torch.device("meta"):
            return timm.create_model(model_name)
    except Exception:
        return None


def _check_kind(model: nn.Module | None, model_name: str, kinds: Sequence[type[nn.Module]]) -> None:
    if model is not None and not isinstance(model, tuple(kinds)):
        raise UserError(
            f"timm model {model_name} is a {type(model).__name__}; it must be one of "
            f"{', '.join(kind.__name__ for kind in kinds)} (for hierarchical models take "
            "TimmPyramid)"
        )


def load_trunk(model: nn.Module, path: str, model_name: str, final_norm: bool = False) -> None:
    """Load a file's weights; those of classifiers and of pre-training alone are left out.

    Position embeddings and patch kernels of another size are resampled, by timm's own filter.

    Raises:
        UserError: a weight of the trunk is missing, or the file has one that the trunk has not.
    """
    what = f"weights of {model_name}"
    state: dict[str, Any] = dict(read_weights(path, what).model)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, RuntimeError, AttributeError, ValueError) as error:
            raise UserError(f"{what}: {path} does not fit: {first_line(error)}") from error
    expected = model.state_dict()
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    optional = (
        _NOT_OF_THE_TRUNK
        + (() if final_norm else ("norm.",))
        + tuple(f"{name}." for name in classifiers)
    )
    beside = [key for key in state if key not in expected and key.startswith(optional)]
    state = {key: value for key, value in state.items() if key not in beside}
    wrong = [
        f"{key} is missing" for key in expected if key not in state and not key.startswith(optional)
    ]
    wrong += [f"{key} is unexpected" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(value.shape)}, the model {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UserError(f"{what}: {path} does not fit: {'; '.join(wrong[:5])}{more}")
    with torch.no_grad():
        model.load_state_dict(state, strict=False)
    logger.info("%s: %d tensors from %s, left out: %s", what, len(state), path, beside or "none")
