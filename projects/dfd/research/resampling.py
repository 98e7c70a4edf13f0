"""Images drawn again and again, with replacement: what else a test set might have been."""

from __future__ import annotations

import numpy as np

_SEED = 0


def draw_images(images: int, draws: int) -> np.ndarray:
    """(draws, images): how often each image is drawn, each row adding up to ``images``.

    Always the same ones.
    """
    generator = np.random.default_rng(_SEED)
    return generator.multinomial(images, np.full(images, 1 / images), size=draws)
