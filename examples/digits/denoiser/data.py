"""The digits of scikit-learn, described in words, and the text features of those words.

``digits.npz`` holds scikit-learn's copy of the test set of *Optical Recognition of Handwritten
Digits* (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0): 1,797 images of
8 by 8 pixels with 17 levels of grey. ``python -m denoiser.data`` writes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "digits.npz"

SIDE = 8
PATCH = 2
GRID = SIDE // PATCH
CHANNELS = PATCH * PATCH
IMAGE_TOKENS = GRID * GRID

THICKNESSES = ("thin", "medium", "bold")
SLANTS = ("backward", "upright", "forward")
WIDTHS = ("narrow", "regular", "wide")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*THICKNESSES, *SLANTS, *WIDTHS, *NUMERALS)
TEXT_TOKENS = 4
TEXT_FEATURES = 64
# Hidden states of large language models have a few channels far above the others.
TEXT_OUTLIERS = {5: 16.0, 41: -24.0}

HELD_OUT = 360
SPLIT_SEED = 20_240_601
FEATURE_SEED = 4


@dataclass(frozen=True)
class Prompt:
    """Four words: how thick, how slanted, how wide, which digit."""

    thickness: str
    slant: str
    width: str
    numeral: str

    @property
    def words(self) -> tuple[str, str, str, str]:
        """One word a token, in the order of the sentence."""
        return (self.thickness, self.slant, self.width, self.numeral)

    @property
    def label(self) -> int:
        """The digit that is asked for."""
        return NUMERALS.index(self.numeral)

    def __str__(self) -> str:
        return " ".join(self.words)


PROMPTS = tuple(Prompt(*words) for words in product(THICKNESSES, SLANTS, WIDTHS, NUMERALS))
"""All 270 of them."""


@dataclass(frozen=True)
class Digits:
    """Images float32 ``[N, 64]`` from -1 (paper) to 1 (ink), their labels, their descriptions."""

    images: Tensor
    labels: Tensor
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: NDArray[np.int64]) -> Digits:
        """Those of them, in that order."""
        prompts = tuple(self.prompts[index] for index in indices)
        chosen = torch.from_numpy(indices)
        return Digits(self.images[chosen], self.labels[chosen], prompts)


def load_digits() -> tuple[Digits, Digits]:
    """The images to train on, and the 360 that are held out."""
    with np.load(IMAGES) as arrays:
        levels, labels = arrays["images"], arrays["labels"]
    images = torch.from_numpy(levels.astype(np.float32).reshape(len(levels), -1) / 8 - 1)
    whole = Digits(images, torch.from_numpy(labels.astype(np.int64)), describe(levels, labels))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(whole))
    return whole.take(order[HELD_OUT:]), whole.take(order[:HELD_OUT])


def describe(levels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[Prompt, ...]:
    """Words for images ``[N, 8, 8]``: each style is a third of the images of its digit."""
    ink = levels.astype(np.float64)
    total = ink.sum((1, 2))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    row = rows - ((ink * rows).sum((1, 2)) / total)[:, None, None]
    column = columns - ((ink * columns).sum((1, 2)) / total)[:, None, None]
    height = (ink * row * row).sum((1, 2)) / total
    # Ink leans forward where what is higher (a smaller row) is further right.
    lean = -(ink * row * column).sum((1, 2)) / total / height
    upright = column + lean[:, None, None] * row
    width = (ink * upright * upright).sum((1, 2)) / total
    measures = ((THICKNESSES, total), (SLANTS, lean), (WIDTHS, width))
    styles = [_thirds(names, values, labels) for names, values in measures]
    numerals = [NUMERALS[label] for label in labels]
    return tuple(Prompt(*words) for words in zip(*styles, numerals, strict=True))


def _thirds(
    names: tuple[str, str, str], values: NDArray[np.float64], labels: NDArray[np.uint8]
) -> list[str]:
    words = np.empty(len(values), dtype=object)
    for label in np.unique(labels):
        same = labels == label
        edges = np.quantile(values[same], (1 / 3, 2 / 3))
        words[same] = np.array(names, dtype=object)[np.searchsorted(edges, values[same])]
    return words.tolist()


def text_features(prompts: tuple[Prompt, ...]) -> Tensor:
    """What stands in for a language model: fixed vectors, float32 ``[N, 4, TEXT_FEATURES]``."""
    indices = [[WORDS.index(word) for word in prompt.words] for prompt in prompts]
    return _word_vectors()[torch.tensor(indices)]


def _word_vectors() -> Tensor:
    random = np.random.default_rng(FEATURE_SEED)
    vectors = random.standard_normal((len(WORDS), TEXT_FEATURES)).astype(np.float32)
    for channel, factor in TEXT_OUTLIERS.items():
        vectors[:, channel] = factor * (1 + 0.1 * vectors[:, channel])
    return torch.from_numpy(vectors)


def to_tokens(images: Tensor) -> Tensor:
    """Images ``[N, 64]`` as patches of 2 by 2: ``[N, 16, 4]``."""
    patches = images.reshape(-1, GRID, PATCH, GRID, PATCH).transpose(2, 3)
    return patches.reshape(-1, IMAGE_TOKENS, CHANNELS)


def to_images(tokens: Tensor) -> Tensor:
    """The inverse of ``to_tokens``."""
    patches = tokens.reshape(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3)
    return patches.reshape(-1, SIDE * SIDE)


def main() -> None:
    """Write ``digits.npz`` from scikit-learn."""
    from sklearn.datasets import load_digits as from_sklearn

    bunch = from_sklearn()
    levels = bunch.images.astype(np.uint8)
    np.savez_compressed(IMAGES, images=levels, labels=bunch.target.astype(np.uint8))
    print(f"{IMAGES}: {len(levels)} images")


if __name__ == "__main__":
    main()
