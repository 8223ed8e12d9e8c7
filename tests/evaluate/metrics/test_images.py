"""PSNR and SSIM: those of scikit-image, and of images whose figures are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("PIL")
from PIL import Image

from quantrecipe.evaluate.metrics.images import Psnr, Ssim, psnr, ssim
from quantrecipe.schema.problems import InvalidInput

PIXELS = st.tuples(st.integers(11, 20), st.integers(11, 20), st.sampled_from([1, 3])).flatmap(
    lambda shape: st.tuples(arrays(np.uint8, shape), arrays(np.uint8, shape))
)


def save(path: Path, pixels: object, mode: str | None = None) -> Path:
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image if mode is None else image.convert(mode)).save(path)
    return path


@given(PIXELS)
@settings(max_examples=15)
def test_they_are_those_of_scikit_image(images: tuple[np.ndarray, np.ndarray]) -> None:
    theirs = pytest.importorskip("skimage.metrics")
    a, b = (image.astype(np.float64) for image in images)
    expected = theirs.structural_similarity(
        a,
        b,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)
    if not np.array_equal(a, b):
        assert psnr(a, b) == pytest.approx(theirs.peak_signal_noise_ratio(a, b, data_range=255))


@given(PIXELS)
@settings(max_examples=15)
def test_either_side_may_be_the_reference(images: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (image.astype(np.float64) for image in images)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert psnr(a, b) == psnr(b, a)
    assert ssim(a, a) == pytest.approx(1)
    assert psnr(a, a) == 100


def test_figures_by_hand() -> None:
    grey = np.full((16, 16, 1), 100.0)
    # All off by 5: 10 log10(255^2 / 25).
    assert psnr(grey, grey + 5) == pytest.approx(20 * math.log10(51))
    # Without any contrast, only brightness counts: (2 a b + c) / (a^2 + b^2 + c), c = 2.55^2.
    c = 2.55**2
    assert ssim(grey, grey + 50) == pytest.approx((30_000 + c) / (32_500 + c))


def test_files_are_read_and_held_against_each_other(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (12, 13, 3))
    a, b = save(tmp_path / "a.png", pixels), save(tmp_path / "b.bmp", pixels)
    assert Psnr().score(a, b) == 100
    assert Ssim().score(a, b) == pytest.approx(1)
    grey = save(tmp_path / "g.png", pixels[..., 0])
    assert Psnr().score(grey, grey) == 100


@pytest.mark.parametrize(
    ("shape", "mode", "kind"),
    [
        ((12, 14, 3), None, "misshaped-image"),
        ((12, 13), None, "misshaped-image"),
        ((12, 13, 4), None, "wrong-mode"),
        ((12, 13), "1", "wrong-mode"),
        ((12, 13), "P", "wrong-mode"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, shape: tuple[int, ...], mode: str | None, kind: str
) -> None:
    reference = save(tmp_path / "r.png", np.zeros((12, 13, 3)))
    bad = save(tmp_path / "bad.png", np.zeros(shape), mode)
    with pytest.raises(InvalidInput) as caught:
        Psnr().score(bad, reference)
    assert [(p.kind, p.file) for p in caught.value.problems] == [(kind, str(bad))]


def test_what_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path / "r.png", np.random.default_rng(0).integers(0, 255, (12, 13, 3)))
    for content in (b"no image", good.read_bytes()[:-200]):
        bad = tmp_path / "bad.png"
        bad.write_bytes(content)
        with pytest.raises(InvalidInput) as caught:
            Ssim().score(bad, good)
        assert caught.value.problems[0].kind == "not-an-image"
    small = save(tmp_path / "s.png", np.zeros((10, 13, 3)))
    with pytest.raises(InvalidInput, match="13x10 in RGB is smaller than the window"):
        Ssim().score(small, small)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InvalidInput) as caught:
        Psnr().score(good, good)
    assert caught.value.problems[0].kind == "too-large"
