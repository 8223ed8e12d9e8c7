"""Every way of cutting the work gives the bytes of the reference; and those bytes are right."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.testing.strategies import GROUP_SIZE, linear_shapes, weights
from tests.converter.making import (
    FLOAT8,
    KINDS,
    PLAIN_DTYPES,
    WEIGHTS,
    Json,
    everything,
    numbers,
    parsed,
    raw,
    read_lock,
    recipe,
    result_of,
    save,
    save_statistics,
)


def agree(document: Json, source: Path, folder: Path, *sizes: int) -> Path:
    """Convert in every way; all results are one. Returns the reference's."""
    made = parsed(document)
    reference = convert(made, source, folder / "reference", converter="reference").out
    expected = result_of(reference)
    for size in sizes:
        out = convert(made, source, folder / f"streaming-{size}", block_bytes=size).out
        assert result_of(out) == expected, size
    return reference


def grid_of_everything(folder: Path, shape: tuple[int, int]) -> tuple[Path, Json]:
    """A source with every kind of weight once for every way of storing one, and its recipe."""
    rng = np.random.default_rng(7)
    tensors: dict[str, Tensor] = {}
    for kind, how in KINDS.items():
        for target in (*WEIGHTS, *PLAIN_DTYPES):
            for role, tensor in how.build(rng, *shape).items():
                tensors[f"{kind}.{target}.{role}"] = tensor
            tensors[f"{kind}.{target}.bias"] = torch.zeros(shape[0], dtype=torch.float16)
    # The layout calls the scales of every format the same, so the formats can share a file.
    rules = [{"modules": [f"*.{target}"], "scheme": target} for target in WEIGHTS]
    document = recipe(
        source=everything(),
        target=everything(),
        schemes={target: {"weight": weight} for target, weight in WEIGHTS.items()},
        rules=rules,
        protected=[
            {"modules": [f"*.{dtype}"], "dtype": dtype, "reason": "the test says so"}
            for dtype in PLAIN_DTYPES
        ],
    )
    return save(folder / "source.safetensors", tensors), document


def test_every_kind_to_every_format_in_every_block_size(tmp_path: Path) -> None:
    source, document = grid_of_everything(tmp_path, (4, 8))
    out = agree(document, source, tmp_path, 1)
    lock = read_lock(out)
    assert len(lock["modules"]) == len(KINDS) * (len(WEIGHTS) + len(PLAIN_DTYPES))
    assert {module["disposition"] for module in lock["modules"]} == {"quantized", "protected"}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("converter", ["streaming", "reference"])
def test_the_number_of_threads_makes_no_difference(
    tmp_path: Path, threads: int, converter: str
) -> None:
    rng = np.random.default_rng(0)
    # Wide enough that torch would share it out between threads.
    source = save(
        tmp_path / "m.safetensors",
        {"a.weight": numbers(rng, 3, 70_001).float(), "b.weight": numbers(rng, 1, 1 << 18).half()},
    )
    made = parsed(recipe())
    expected = result_of(convert(made, source, tmp_path / "expected").out)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = convert(made, source, tmp_path / "found", converter=converter).out
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert result_of(found) == expected


@given(
    weight=linear_shapes().flatmap(weights),
    target=st.sampled_from(sorted(WEIGHTS)),
    size=st.integers(1, 600),
    alpha=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_awkward_weights_come_out_the_same(
    weight: Tensor, target: str, size: int, alpha: float | None, seed: int
) -> None:
    spec = WEIGHTS[target]
    if spec["granularity"] == "group" and weight.shape[1] % GROUP_SIZE:
        spec = {**spec, "granularity": "channel"}
        del spec["group_size"]
    scheme: Json = {"weight": spec}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save(folder / "m.safetensors", {"a.weight": weight})
        document = recipe(target=everything(), schemes={"all": scheme})
        path = folder / "recipe.json"
        if alpha is not None:
            maxima = np.random.default_rng(seed).lognormal(0, 3, (2, weight.shape[1]))
            maxima[:, ::5] = 0
            save_statistics(
                folder / "s.safetensors", "model", {"a": torch.from_numpy(maxima).float()}
            )
            scheme["smoothing"] = {
                "kind": "smoothquant",
                "alpha": alpha,
                "apply": "online",
                "statistics": "s.safetensors",
            }
        path.write_text(json.dumps(document))
        results: list[Any] = []
        for converter in ("reference", "streaming"):
            try:
                out = convert(
                    path, source, folder / converter, converter=converter, block_bytes=size
                ).out
                results.append(result_of(out))
            except InvalidInput as error:
                results.append(str(error))
        assert results[0] == results[1]
        if not isinstance(results[0], str):
            assert (folder / "streaming" / "model.safetensors").stat().st_size > weight.numel()


def float8_table(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The 256 values of an fp8 type, from the definition of its bits; NaN where there is none."""
    exponent_bits, mantissa_bits = (4, 3) if name == "float8_e4m3fn" else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = code >> mantissa_bits & (2**exponent_bits - 1)
        mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        value = (
            (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)
        )
        finite = code & 0x7F != 0x7F if name == "float8_e4m3fn" else exponent != 31
        values.append(sign * value if finite else np.nan)
    return np.array(values, np.float32)


@given(
    name=st.sampled_from(FLOAT8),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 2000),
)
@settings(max_examples=30)
def test_row_scaled_fp8_to_int8_equals_numpy(
    name: str, rows: int, columns: int, seed: int, size: int
) -> None:
    """The published base of Ideogram 4 has 1-D row scales: its arithmetic, written again."""
    rng, table = np.random.default_rng(seed), float8_table(name)
    finite = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    codes = rng.choice(finite, (rows, columns))
    codes[rng.random(rows) < 0.1] = 0
    scales = (2.0 ** rng.uniform(-12, 2, rows)).astype(np.float32)

    weight = table[codes] * scales[:, None]
    largest = np.abs(weight).max(1)
    stored = np.where(
        largest == 0, np.float32(1), np.maximum(largest / np.float32(127), np.float32(2.0**-126))
    )
    expected = np.clip(np.rint(weight / stored[:, None]), -127, 127).astype(np.int8)
    assert stored.dtype == weight.dtype == np.float32

    with tempfile.TemporaryDirectory() as folder:
        source = save(
            Path(folder) / "m.safetensors",
            {
                "a.weight": torch.from_numpy(codes).view(getattr(torch, name)),
                "a.weight_scale": torch.from_numpy(scales),
            },
        )
        made = parsed(recipe(source="fp8-scaled"))
        out = convert(made, source, Path(folder) / "out", block_bytes=size).out
        found = load_file(out / "model.safetensors")
        assert found["a.weight"].numpy().tobytes() == expected.tobytes()
        assert found["a.weight_scale"].shape == (rows, 1)
        assert found["a.weight_scale"].numpy().tobytes() == stored.tobytes()


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("converter", ["streaming", "reference"])
def test_protected_in_its_own_dtype_keeps_every_bit(
    tmp_path: Path, dtype: str, converter: str
) -> None:
    """NaN payloads, infinities, negative zeros and subnormals too."""
    size = getattr(torch, dtype).itemsize
    noise = np.random.default_rng(1).integers(0, 256, (6, 10 * size), np.uint8)
    noise[0] = 0xFF  # NaNs with every payload bit set
    noise[1, size - 1 :: size] = 0x7F
    weight = torch.from_numpy(noise).view(getattr(torch, dtype))
    tensors = {"a.weight": weight, "a.bias": weight[:, 0].contiguous(), "free": weight.clone()}
    source = save(tmp_path / "m.safetensors", {**tensors, "b.weight": torch.ones(2, 2)})
    keep = [{"modules": ["a"], "dtype": dtype, "reason": "bits"}]
    out = convert(
        parsed(recipe(protected=keep)), source, tmp_path / "out", converter=converter, block_bytes=7
    ).out
    with safe_open(out / "model.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            assert raw(file.get_tensor(name)) == raw(tensor), name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_keep_passes_a_stored_format_on(tmp_path: Path, kind: str) -> None:
    tensors = KINDS[kind].build(np.random.default_rng(2), 7, 12)
    source = save(
        tmp_path / "m.safetensors",
        {f"a.{role}": tensor for role, tensor in tensors.items()} | {"b.weight": torch.ones(2, 8)},
    )
    document = recipe(
        source=everything(),
        target=everything(),
        target_fields={"passthrough_dtype": "keep"},
        rules=[{"modules": ["b"], "scheme": "all"}],
    )
    out = agree(document, source, tmp_path, 1, 200, 1 << 30)
    module = read_lock(out)["modules"][0]
    assert module["disposition"] == "passthrough"
    assert "error" not in module
    blob = (out / "model.safetensors").read_bytes()
    for role, tensor in tensors.items():
        place = module["tensors"][role]
        assert blob[place["offset"] : place["offset"] + place["bytes"]] == raw(tensor)
