"""What runs on the GPU, in Triton's language. Imported only where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inverse(y):
    """``1 / y``, correctly rounded but for rare cases at the ends of the range."""
    approximate = 1.0 / y
    return tl.fma(approximate, tl.fma(-y, approximate, 1.0), approximate)


@triton.jit
def _divide(x, y, inverse):
    """``x / y`` as IEEE rounds it, from ``inverse = 1 / y``, where nothing over- or underflows.

    One multiplication and one correction by the exact remainder (P. Markstein, IBM Journal of
    Research and Development 34(1), 1990).
    """
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def _largest_bits(x):
    # As integers, magnitudes keep their order, and a NaN is larger than everything.
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def _scale_of(bits):
    """The scale of a row, from the bits of its largest magnitude."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    # Not below the smallest normal number; written so that a NaN stays one.
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    return tl.where(bits == 0, 1.0, scale)


@triton.jit
def _codes(x, scale, inverse):
    # Adding 1.5 * 2^23 rounds to an integer, ties to even. max and min drop what is no number.
    rounded = (_divide(x, scale, inverse) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def quantize_rows(
    x_ptr,
    smoothing_ptr,
    codes_ptr,
    scale_ptr,
    M,
    K,
    row_stride,
    SMOOTHING: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows a program, each held in registers: ``FIRST + SECOND >= K``, powers of two."""
    left = tl.arange(0, FIRST)
    in_left = left < K
    right = FIRST + tl.arange(0, SECOND if SECOND else 1)
    in_right = right < K
    if SMOOTHING:
        left_factor = tl.load(smoothing_ptr + left, mask=in_left, other=1.0)
        left_inverse = _inverse(left_factor)
        if SECOND:
            right_factor = tl.load(smoothing_ptr + right, mask=in_right, other=1.0)
            right_inverse = _inverse(right_factor)
    for index in tl.static_range(ROWS):
        # Rows beyond the end are computed as the last one, and written over it with the same bytes.
        row = tl.minimum(tl.program_id(0) * ROWS + index, M - 1).to(tl.int64)
        a = tl.load(x_ptr + row * row_stride + left, mask=in_left, other=0.0).to(tl.float32)
        if SMOOTHING:
            a = _divide(a, left_factor, left_inverse)
        bits = _largest_bits(a)
        if SECOND:
            b = tl.load(x_ptr + row * row_stride + right, mask=in_right, other=0.0).to(tl.float32)
            if SMOOTHING:
                b = _divide(b, right_factor, right_inverse)
            bits = tl.maximum(bits, _largest_bits(b))
        scale = _scale_of(bits)
        inverse = _inverse(scale)
        tl.store(scale_ptr + row, scale)
        tl.store(codes_ptr + row * K + left, _codes(a, scale, inverse), mask=in_left)
        if SECOND:
            tl.store(codes_ptr + row * K + right, _codes(b, scale, inverse), mask=in_right)


@triton.jit
def _smoothed_block(x_ptr, smoothing_ptr, k, K, SMOOTHING: tl.constexpr):
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if SMOOTHING:
        factor = tl.load(smoothing_ptr + k, mask=k < K, other=1.0)
        x = _divide(x, factor, _inverse(factor))
    return x


@triton.jit
def quantize_long_row(
    x_ptr,
    smoothing_ptr,
    codes_ptr,
    scale_ptr,
    K,
    row_stride,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, too long for registers: the second look finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    codes_ptr += row * K
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        x = _smoothed_block(x_ptr, smoothing_ptr, start + tl.arange(0, BLOCK), K, SMOOTHING)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = _scale_of(tl.max(largest, axis=0))
    inverse = _inverse(scale)
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = _smoothed_block(x_ptr, smoothing_ptr, k, K, SMOOTHING)
        tl.store(codes_ptr + k, _codes(x, scale, inverse), mask=k < K)


@triton.jit(do_not_specialize=["M"])
def scaled_product(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    BY_CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[m, n] = float32(sum_k a[m, k] b[n, k]) * a_scale[m] * b_scale[n] + bias[n]``."""
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    span = GROUP * columns
    first = program // span * GROUP
    height = min(rows - first, GROUP)
    m0 = (first + program % span % height) * BLOCK_M
    n0 = (program % span) // height * BLOCK_N
    m, n, k = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = m < M, n < N
    # Rows beyond the end are read as the last one: no mask, and nothing of them is stored.
    a_at = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            inside = k < K - start
            a = tl.load(a_at, mask=inside[None, :], other=0)
            b = tl.load(b_at, mask=inside[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K
    a_scale = tl.load(a_scale_ptr + m, mask=in_m, other=0.0)
    if BY_CHANNEL:
        b_scale = tl.load(b_scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    else:
        b_scale = tl.load(b_scale_ptr).to(tl.float32)
    result = total.to(tl.float32) * a_scale[:, None] * b_scale
    if BIAS:
        result += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["M"])
def product_with_codes(
    x_ptr,
    b_ptr,
    out_ptr,
    smoothing_ptr,
    b_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    row_stride,
    BY_CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weight-only, for few rows: ``out[m, n] = sum_k x[m, k] b[n, k] * b_scale[n] + bias[n]``.

    Codes become numbers of the dtype of ``x`` in registers, exactly, and are read once.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < M, n < N
    x_at = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * row_stride + k[None, :]
    b_at = b_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        x = tl.load(x_at, mask=inside[None, :], other=0.0)
        if SMOOTHING:
            factor = tl.load(smoothing_ptr + start + k, mask=inside, other=1.0)
            smooth = _divide(x.to(tl.float32), factor[None, :], _inverse(factor)[None, :])
            x = smooth.to(x_ptr.dtype.element_ty)
        b = tl.load(b_at, mask=inside[:, None], other=0.0).to(x_ptr.dtype.element_ty)
        total = tl.dot(x, b, total, input_precision="ieee")
        x_at += BLOCK_K
        b_at += BLOCK_K
    if BY_CHANNEL:
        b_scale = tl.load(b_scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    else:
        b_scale = tl.load(b_scale_ptr).to(tl.float32)
    result = total * b_scale
    if BIAS:
        result += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def dequantize_rows(
    b_ptr,
    b_scale_ptr,
    out_ptr,
    N,
    K,
    BY_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``float32(b[n, k]) * b_scale[n]``, rounded to the dtype of ``out``."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(b_scale_ptr + (n if BY_CHANNEL else 0)).to(tl.float32)
    b = tl.load(b_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * K + k, (b * scale).to(out_ptr.dtype.element_ty), mask=k < K)
