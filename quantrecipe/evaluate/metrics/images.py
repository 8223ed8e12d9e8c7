"""Images held against images: PSNR and SSIM. Needs Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.evaluate.metrics.protocol import IMAGES, Against, needs, unusable
from quantrecipe.schema.problems import InvalidInput

Image = NDArray[np.float64]

MOST_DECIBELS: Final = 100.0
"""The PSNR of images that are the same, and the largest one: infinity has no mean."""

_PEAK: Final = 255.0
_RADIUS: Final = 5
_SIGMA: Final = 1.5
_STEADY: Final = ((0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2)


class Psnr:
    """Peak signal to noise of 8-bit images in decibels: ``10 log10(255^2 / mean((a - b)^2))``."""

    name = "psnr"
    higher_is_better = True
    suffixes = IMAGES
    against: Against = "reference"

    def score(self, output: Path, against: Path | str) -> float:
        return psnr(*_both(self.name, output, Path(against)))


class Ssim:
    """Structural similarity of 8-bit images, see ``ssim``."""

    name = "ssim"
    higher_is_better = True
    suffixes = IMAGES
    against: Against = "reference"

    def score(self, output: Path, against: Path | str) -> float:
        a, b = _both(self.name, output, Path(against))
        if min(a.shape[:2]) <= 2 * _RADIUS:
            message = f"{_size(a)} is smaller than the window, {2 * _RADIUS + 1}x{2 * _RADIUS + 1}"
            raise unusable(output, "too-small", message)
        return ssim(a, b)


def psnr(a: Image, b: Image) -> float:
    """Peak signal to noise of two images ``[height, width, channels]`` from 0 to 255.

    Returns:
        Decibels, at most ``MOST_DECIBELS``.
    """
    error = float(np.square(a - b).mean())
    return min(MOST_DECIBELS, 10 * float(np.log10(_PEAK**2 / error))) if error else MOST_DECIBELS


def ssim(a: Image, b: Image) -> float:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004, section III.B).

    A Gaussian window of 11 by 11 with a deviation of 1.5, ``K1`` 0.01, ``K2`` 0.03, moments by the
    window's weights alone. The mean over every place where the window fits, channel by channel.

    Args:
        a: ``[height, width, channels]`` from 0 to 255, 11 or more wide and high.
        b: likewise.
    """
    first, second = _STEADY
    mean_a, mean_b = _blurred(a), _blurred(b)
    power_a = _blurred(a * a) - mean_a**2
    power_b = _blurred(b * b) - mean_b**2
    shared = _blurred(a * b) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + first) * (2 * shared + second)
    scale = (mean_a**2 + mean_b**2 + first) * (power_a + power_b + second)
    return float((similar / scale).mean())


def read_image(path: Path, metric: str) -> Image:
    """An image of 8-bit grey or RGB, ``[height, width, channels]`` from 0 to 255.

    Raises:
        InvalidInput: it is none, or Pillow is not installed.
    """
    needs("PIL", metric, "'quantrecipe[evaluate]'")
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    hint = "Save it as RGB with 8 bits a channel."
    try:
        with warnings.catch_warnings():
            # So many pixels that Pillow warns of a bomb are too many.
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            with Pillow.open(path) as image:
                if image.mode not in ("L", "RGB"):
                    message = f"the image has mode {image.mode}, which is neither L nor RGB"
                    raise unusable(path, "wrong-mode", message, hint)
                pixels = np.asarray(image, np.float64)
    except UnidentifiedImageError:
        raise unusable(path, "not-an-image", "no image that Pillow reads", hint) from None
    except (Pillow.DecompressionBombWarning, Pillow.DecompressionBombError) as error:
        raise unusable(path, "too-large", str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise unusable(path, "not-an-image", f"the image cannot be read: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _both(metric: str, output: Path, reference: Path) -> tuple[Image, Image]:
    a, b = read_image(output, metric), read_image(reference, metric)
    if a.shape != b.shape:
        raise _misshaped(output, a, b)
    return a, b


def _misshaped(output: Path, a: Image, b: Image) -> InvalidInput:
    message = f"the image is {_size(a)}, and the reference's is {_size(b)}"
    return unusable(output, "misshaped-image", message)


def _size(image: Image) -> str:
    height, width, channels = image.shape
    return f"{width}x{height} in {'grey' if channels == 1 else 'RGB'}"


def _blurred(image: Image) -> Image:
    """By the window, where it fits: rows, then columns."""
    weights = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        lines = np.moveaxis(image, axis, 0)
        places = len(lines) - 2 * _RADIUS
        found = np.zeros_like(lines[:places])
        for at, weight in enumerate(weights):
            found += weight * lines[at : at + places]
        image = np.moveaxis(found, 0, axis)
    return image
