"""The teacher's passes from a store, by the content of what it would see."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..weights.feature_store import FeatureStore

logger = logging.getLogger(__name__)

# After so many images it is told if next to none was found.
_TELL_AFTER, _FEW = 5000, 0.1


class StoredPasses:
    """Runs a network on the images whose features are not in a store, and keeps them there.

    The key of an image is a hash of its pixels as the network is shown them, of the size that its
    batch is padded to, and of the network, which is known by what it makes of a fixed image of that
    size: weights, structure, precision, code, device and the pixels' statistics all show there. An
    image that is mirrored or changed by one pixel has another key. Each image is computed alone, so
    that an entry does not depend on the batch in which it came first.
    """

    def __init__(self, folder: str, max_gib: float) -> None:
        self._store = FeatureStore(folder, max_gib)
        self._networks: dict[Hashable, bytes] = {}
        self._asked = self._found = 0
        self._told = False

    def __call__(
        self,
        shown: Sequence[Tensor],
        images: Tensor,
        run: Callable[[Tensor], dict[str, Tensor]],
        probe: Callable[[], Tensor],
        variant: Hashable,
    ) -> dict[str, Tensor]:
        """
        Args:
            shown: (3,height,width) of each image, before mean, deviation and padding.
            images: (N,3,H,W), the network's input of these.
            run: the network, from its input to its features by name.
            probe: the network's input of a fixed image.
            variant: what ``run`` depends on, device and precision say: calls of one variant are of
                the same network.

        Returns:
            Name to (N,C,H,W), as ``run(images)`` but for rounding.
        """
        if variant not in self._networks:
            self._networks[variant] = _fingerprint(run(probe()))
        network = self._networks[variant]
        rows = []
        for i, image in enumerate(shown):
            key = _key(network, image, images.shape[-2:])
            row = self._store.get(key)
            self._asked += 1
            self._found += row is not None
            if row is None:
                row = {name: x[0].contiguous() for name, x in run(images[i : i + 1]).items()}
                self._store.put(key, row)
            rows.append(row)
        self._tell()
        return {
            name: torch.stack([row[name].to(images.device, non_blocking=True) for row in rows])
            for name in rows[0]
        }

    def _tell(self) -> None:
        if not self._told and self._asked >= _TELL_AFTER and self._found < _FEW * self._asked:
            self._told = True
            logger.warning(
                "model.teacher.store: %d of %d images were found. Images that are resized or "
                "cropped at random do not come again: the store costs time and disk for nothing",
                self._found,
                self._asked,
            )


def _fingerprint(features: Mapping[str, Tensor]) -> bytes:
    """What tells a network from another: a hash of its features of a fixed image."""
    digest = hashlib.sha256()
    for name, feature in sorted(features.items()):
        digest.update(f"{name} {tuple(feature.shape)} {feature.dtype}".encode())
        digest.update(feature.float().cpu().contiguous().numpy())
    return digest.digest()


def _key(network: bytes, image: Tensor, padded: Sequence[int]) -> str:
    digest = hashlib.sha256(network)
    digest.update(f"{tuple(image.shape)} {image.dtype} {tuple(padded)}".encode())
    digest.update(image.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
