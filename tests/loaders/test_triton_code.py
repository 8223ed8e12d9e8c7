"""What the code in Triton's language computes, by Triton's interpreter: on the CPU, in numpy."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.loaders.kernels import on_triton
from quantrecipe.loaders.kernels.arithmetic import (
    dequantize_weight,
    quantize_activations,
    smoothed,
)
from quantrecipe.loaders.kernels.configs import TritonProduct

pytest.importorskip("triton")

EPSILON: Final = 2.0**-24
FEW = settings(max_examples=15)


# What the interpreter lacks: it leaves functions of Triton's library compiled where Triton was
# imported without it, puts back only some of what it replaces, and rounds twice in `fma`.


def fused(x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` of float32, rounded once: in float64 to odd, which a second rounding takes."""
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(even, odd, total).astype(np.float32)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False).filter(
    lambda x: x == 0 or 2.0**-40 < abs(x) < 2.0**40
)


@given(FLOATS, FLOATS, st.one_of(FLOATS, st.none()))
def test_fma_rounds_once(x: float, y: float, z: float | None) -> None:
    # Without an addend: the remainder of a product, where rounding twice is most wrong.
    a, b = np.float32(x), np.float32(y)
    c = -(a * b) if z is None else np.float32(z)
    exact = Fraction(x) * Fraction(y) + Fraction(float(c))
    got = float(fused(np.asarray(a), np.asarray(b), np.asarray(c)))
    near = np.nextafter(np.float32(got), np.array([-np.inf, np.inf], np.float32))
    distance = abs(Fraction(got) - exact)
    assert all(distance <= abs(Fraction(float(each)) - exact) for each in near)


@pytest.fixture(scope="module")
def code() -> Iterator[ModuleType]:
    """``triton_code``, interpreted."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels themselves are tested")
    from triton import language
    from triton.language import core, standard
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    replaced = [language, core, language.math, standard, core.tensor, core.dtype]
    kept = [dict(vars(each)) for each in replaced]
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_too(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # numpy makes no int of an array of one number any more.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_too)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
        for library in (language, standard):
            for name, function in list(vars(library).items()):
                if isinstance(function, JITFunction):
                    setattr(library, name, interpreter.InterpretedFunction(function.fn))
        spec = importlib.util.find_spec("quantrecipe.loaders.kernels.triton_code")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        with np.errstate(all="ignore"):
            yield made
    for each, before in zip(replaced, kept, strict=True):
        for name, value in list(vars(each).items()):
            if name not in before:
                delattr(each, name)
            elif value is not before[name]:
                setattr(each, name, before[name])


def numbers(rows: int, columns: int, seed: int, spread: float = 1.0) -> Tensor:
    """Random numbers, each row of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randn(rows, 1, generator=generator) * spread)


def codes_of(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)


SEEDS = st.integers(0, 1 << 20)
SMALL = st.integers(1, 40)


@st.composite
def activations(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    """Rows with zeros, outliers and what is no number, and factors or none."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    x = numbers(rows, columns, draw(SEEDS), draw(st.sampled_from([1.0, 20.0])))
    special = draw(st.lists(st.sampled_from(["zero", "outlier", "tie", "tiny", "nan", "inf"])))
    for row, what in enumerate(special[:rows]):
        if what == "zero":
            x[row] = 0.0
        elif what == "tiny":
            x[row] *= 2.0**-140
        elif what == "tie":  # halves of the scale, which is 1
            x[row] = torch.arange(columns) % 126 + 0.5
            x[row, 0] = 127.0
        else:
            x[row, -1] = {"outlier": 3e4, "nan": math.nan, "inf": -math.inf}[what]
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    factors = numbers(1, columns, draw(SEEDS))[0].abs() + 2.0**-10
    return x.to(dtype), factors if draw(st.booleans()) else None


def assert_quantized(x: Tensor, smoothing: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    values = smoothed(x, smoothing)
    right_codes, right_scale = quantize_activations(values, "int8:token")
    fine = values.isfinite().all(dim=1)
    assert torch.equal(scale.isfinite(), fine)
    assert torch.equal(scale[fine], right_scale[fine, 0])
    assert torch.equal(codes[fine], right_codes[fine])


@FEW
@given(case=activations(), rows_each=st.sampled_from([1, 2]))
def test_rows_become_the_codes_of_the_definition(
    code: ModuleType, case: tuple[Tensor, Tensor | None], rows_each: int
) -> None:
    x, smoothing = case
    rows, columns = x.shape
    codes = torch.full((rows, columns), 99, dtype=torch.int8)
    scale = torch.full((rows,), -1.0)
    first, second = on_triton.covering(columns)
    code.quantize_rows[(-(-rows // rows_each),)](
        x,
        smoothing,
        codes,
        scale,
        rows,
        columns,
        x.stride(0),
        SMOOTHING=smoothing is not None,
        FIRST=first,
        SECOND=second,
        ROWS=rows_each,
    )
    assert_quantized(x, smoothing, codes, scale)


@FEW
@given(case=activations())
def test_long_rows_too(code: ModuleType, case: tuple[Tensor, Tensor | None]) -> None:
    x, smoothing = case
    rows, columns = x.shape
    codes = torch.full((rows, columns), 99, dtype=torch.int8)
    scale = torch.full((rows,), -1.0)
    code.quantize_long_row[(rows,)](
        x,
        smoothing,
        codes,
        scale,
        columns,
        x.stride(0),
        SMOOTHING=smoothing is not None,
        BLOCK=16,
    )
    assert_quantized(x, smoothing, codes, scale)


def epilogue(
    rows: int, columns: int, seed: int, by_channel: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Scales of a weight, ``[columns, 1]`` or ``[1, 1]``, and a bias."""
    scale = numbers(columns if by_channel else 1, 1, seed).abs() + 2.0**-20
    return scale, numbers(1, columns, seed + 1, 8.0)[0] if bias else None


@FEW
@given(
    rows=SMALL,
    columns=SMALL,
    depth=st.integers(1, 100),
    by_channel=st.booleans(),
    bias=st.booleans(),
    group=st.sampled_from([1, 2]),
    seed=SEEDS,
)
def test_products_are_exact_and_then_scaled(
    code: ModuleType,
    rows: int,
    columns: int,
    depth: int,
    by_channel: bool,
    bias: bool,
    group: int,
    seed: int,
) -> None:
    a, b = codes_of(rows, depth, seed), codes_of(columns, depth, seed + 1)
    a_scale = numbers(rows, 1, seed + 2)[:, 0].abs()
    b_scale, added = epilogue(rows, columns, seed + 3, by_channel, bias)
    out = torch.full((rows, columns), math.nan)
    config = TritonProduct(16, 16, 32, 1, 1, group)
    code.scaled_product[(-(-rows // 16) * -(-columns // 16),)](
        a,
        b,
        out,
        a_scale,
        b_scale,
        added,
        rows,
        columns,
        depth,
        BY_CHANNEL=b_scale.numel() > 1,
        BIAS=bias,
        EVEN_K=depth % config.depth == 0,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.depth,
        GROUP=config.group,
    )
    scales = a_scale.double()[:, None] * b_scale.double().T
    product = (a.double() @ b.double().T) * scales
    exact = product if added is None else product + added.double()
    allowed = EPSILON * (4 * product.abs() + 2 * exact.abs()) + 2.0**-149
    assert ((out.double() - exact).abs() <= allowed).all()


@FEW
@given(
    rows=SMALL,
    columns=SMALL,
    depth=st.integers(1, 100),
    by_channel=st.booleans(),
    bias=st.booleans(),
    smoothing=st.booleans(),
    seed=SEEDS,
)
def test_products_with_codes_are_those_of_the_numbers(
    code: ModuleType,
    rows: int,
    columns: int,
    depth: int,
    by_channel: bool,
    bias: bool,
    smoothing: bool,
    seed: int,
) -> None:
    x, b = numbers(rows, depth, seed), codes_of(columns, depth, seed + 1)
    b_scale, added = epilogue(rows, columns, seed + 2, by_channel, bias)
    factors = numbers(1, depth, seed + 4)[0].abs() + 0.01 if smoothing else None
    out = torch.full((rows, columns), math.nan)
    code.product_with_codes[(-(-columns // 16), -(-rows // 16))](
        x,
        b,
        out,
        factors,
        b_scale,
        added,
        rows,
        columns,
        depth,
        x.stride(0),
        BY_CHANNEL=b_scale.numel() > 1,
        BIAS=bias,
        SMOOTHING=smoothing,
        BLOCK_M=16,
        BLOCK_N=16,
        BLOCK_K=32,
    )
    values = smoothed(x, factors).double()
    product = values @ b.double().T * b_scale.double().T
    size = values.abs() @ b.double().abs().T * b_scale.double().T
    exact = product if added is None else product + added.double()
    allowed = EPSILON * ((depth + 4) * size + 2 * exact.abs())
    assert ((out.double() - exact).abs() <= allowed).all()


@FEW
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    by_channel=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),  # the interpreter cuts bfloat16 off
    seed=SEEDS,
)
def test_dequantized_weights_are_exact(
    code: ModuleType, rows: int, columns: int, by_channel: bool, dtype: torch.dtype, seed: int
) -> None:
    b = codes_of(rows, columns, seed)
    scale = numbers(rows if by_channel else 1, 1, seed + 1).abs()
    out = torch.full((rows, columns), math.nan, dtype=dtype)
    code.dequantize_rows[(rows, -(-columns // 16))](
        b, scale, out, rows, columns, BY_CHANNEL=by_channel, BLOCK=16
    )
    group = (1 if by_channel else rows, columns)
    assert torch.equal(out, dequantize_weight(b, scale, group, dtype))
