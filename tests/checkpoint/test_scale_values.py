"""Values that no scale can have are found, whatever the dtype."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.checkpoint import read_header
from quantrecipe.checkpoint.scale_values import ScaleCheck, check_scales
from quantrecipe.schema.factors import Factor
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.tensors import OutputTensor

KINDS = ("nan-scale", "infinite-scale", "zero-scale", "negative-scale", "denormal-scale")


def check(folder: Path, dtype: str, payload: bytes, shape: tuple[int, ...]) -> ScaleCheck:
    path = folder / "a.safetensors"
    path.write_bytes(encode_header([OutputTensor("s", dtype, shape)], {}) + payload)
    file = read_header(path)
    return check_scales([file], [Factor(info) for info in file.tensors.values()])


def judge(value: float) -> str | None:
    """By arithmetic, where the code under test looks at bits."""
    if np.isnan(value):
        return "nan-scale"
    if np.isinf(value):
        return "infinite-scale"
    if value == 0:
        return "zero-scale"
    return "negative-scale" if value < 0 else None


@given(
    st.lists(st.floats(width=16), min_size=1, max_size=8),
    st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
)
def test_values_are_judged_as_arithmetic_judges_them(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], dtype: str
) -> None:
    if dtype == "bfloat16":
        bits = np.array(values, np.float32).view(np.uint32) >> 16
        payload = bits.astype("<u2").tobytes()
        seen = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        array = np.array(values, np.dtype(dtype).newbyteorder("<"))
        payload, seen = array.tobytes(), array.astype(np.float64)
    tiny = 2.0**-14 if dtype == "float16" else 0.0
    expected = {kind for value in seen.tolist() if (kind := judge(value)) is not None}
    if any(0 < abs(value) < tiny for value in seen.tolist()):
        expected.add("denormal-scale")
    found = check(tmp_path_factory.mktemp("s"), dtype, payload, (len(values),))
    assert {problem.kind for problem in found.problems} == expected
    assert (found.checked, found.skipped) == (1, 0)


@pytest.mark.parametrize(
    ("value", "kind"),
    list(zip((np.nan, np.inf, 0.0, -1.0, 1e-40), KINDS, strict=True)),
    ids=KINDS,
)
def test_the_first_of_its_kind_is_placed(tmp_path: Path, value: float, kind: str) -> None:
    payload = struct.pack("<6f", 1, 1, 1, value, 1, value)
    (problem,) = check(tmp_path, "float32", payload, (2, 3)).problems
    assert (problem.kind, problem.tensor) == (kind, "s")
    assert "2 of 6" in problem.message
    assert "[1, 0]" in problem.message


def test_a_scalar_has_a_place_too(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, "float32", struct.pack("<f", 0.0), ()).problems
    assert "at []" in problem.message


def test_an_empty_tensor_has_nothing_wrong_in_it(tmp_path: Path) -> None:
    assert check(tmp_path, "float32", b"", (0,)).problems == ()


def test_only_so_much_is_read_and_only_plain_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = [OutputTensor(name, "float32", (4,)) for name in "abc"]
    tensors.append(OutputTensor("d", "uint8", (4,)))
    payload = bytes(3 * 16 + 4)
    path.write_bytes(encode_header(tensors, {}) + payload)
    file = read_header(path)
    found = check_scales([file], [Factor(info) for info in file.tensors.values()], most_bytes=32)
    assert (found.checked, found.skipped, len(found.problems)) == (2, 2, 2)
