"""The cases themselves: what goes in, and what each one shows."""

from __future__ import annotations

import copy
from typing import Any

from tests.testing.exact import Json, Spec, Tensor, tensor
from tests.testing.generate import (
    FILE,
    Case,
    Linear,
    file_json,
    layout_name,
    merged,
    noise,
    recipe,
    rough,
    statistics,
)

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
NORM = {"norm.weight": tensor("bfloat16", [1.0, 0.5, -2.0])}


def blocks(rows: int, columns: int) -> Json:
    """A layout that holds fp8 by small blocks."""

    def module(weight: str) -> Json:
        return {
            "weight": {"name": f"{{module}}.{weight}"},
            "weight_scale": {
                "name": "{module}.weight_scale",
                "dtypes": ["float32"],
                "shapes": {"block": [["row_blocks", "column_blocks"]]},
            },
        }

    held = {"granularity": ["block"], "block_size": [rows, columns]}
    return {
        "kind": "layout",
        "version": 1,
        "name": "small-blocks",
        "modules": {
            "plain": {"weight": {"name": "{module}.weight"}},
            E4M3: module("weight"),
            E5M2: module("weight"),
        },
        "others": {"name": "{tensor}"},
        "holds": {E4M3: held, E5M2: held},
    }


# int8

BIAS = tensor("bfloat16", [0.25, -1.5, 3.0])
X = noise(1, 2, 5)

INT8 = [
    Case(
        "int8-channel",
        "int8, one scale for each output channel",
        "scale = max|w| / 127 of each row in float32, code = round(w / scale). The bias and the "
        "norm, which is no module, keep their bytes.",
        (
            Linear("block.a", rough(1, 3, 5), BIAS, inputs=(X,)),
            Linear("block.b", rough(2, 2, 3), inputs=(noise(2, 1, 3),)),
        ),
        others=NORM,
        dtypes=("float32", "bfloat16"),
    ),
    Case(
        "int8-channel-w8a8",
        "inputs quantized to int8 by token",
        "Each row of the input gets its own scale max|x| / 127; products of codes are added as "
        "integers. A row of zeros gives the bias alone.",
        (
            Linear(
                "block.a",
                rough(3, 3, 5),
                BIAS,
                activation=True,
                inputs=(
                    tensor("float32", [[1.0, -0.3, 0.7, 40.0, 0.1], [0.0] * 5, [-3, 2, 1, 7, -5]]),
                    tensor("bfloat16", [[0.5, -0.25, 3.0, 1.125, -2.0]]),
                ),
            ),
        ),
    ),
    Case(
        "int8-channel-w8a8-ties",
        "ties of activations go to the even code",
        "With max|x| = 127 the scale is 1, so 0.5, 1.5 and 2.5 become 0, 2 and 2.",
        (
            Linear(
                "a",
                tensor("float32", [[127, 1, 1, 1], [0, 0, 0, 127]]),
                activation=True,
                inputs=(tensor("float32", [[127.0, 0.5, 1.5, 2.5], [127, -0.5, -1.5, -2.5]]),),
            ),
        ),
    ),
    Case(
        "int8-channel-ties",
        "ties of weights go to the even code",
        "A largest weight of 127/128 makes the scale 1/128, and every other weight half a step.",
        (
            Linear(
                "a",
                tensor("float32", [[127, 0.5, 1.5, 2.5, -0.5], [-127, -1.5, -2.5, 63.5, -126.5]]),
            ),
            Linear("b", tensor("bfloat16", [[v / 128 for v in (127, 0.5, 1.5, 62.5)]])),
        ),
    ),
    Case(
        "int8-channel-zero-rows",
        "a row of zeros has scale 1 and codes 0",
        "There is no largest magnitude to divide by; negative zeros are zeros too.",
        (
            Linear(
                "a",
                tensor("float32", [[0.0, 0.0, 0.0], [0.5, -1.0, 0.25], [-0.0, 0.0, -0.0]]),
                inputs=(noise(3, 2, 3),),
            ),
        ),
    ),
    Case(
        "int8-channel-subnormal",
        "weights so small that their scale would be subnormal",
        "A scale is never below 2^-126, the smallest normal number; codes are computed from it.",
        (
            Linear(
                "a",
                tensor(
                    "float32",
                    [
                        [2.0**-126, -(2.0**-127), 2.0**-149, 0.0],
                        [2.0**-120, 2.0**-126, -(2.0**-121), 3 * 2.0**-127],
                        [127 * 2.0**-126, 2.0**-127, 1.5 * 2.0**-126, 2.5 * 2.0**-126],
                    ],
                ),
            ),
        ),
    ),
    Case(
        "int8-channel-odd-shapes",
        "shapes that no vector register likes",
        "One weight, one row, one column, and thirteen of each.",
        (
            Linear("one", tensor("float32", [[-0.3]]), inputs=(noise(4, 1, 1),)),
            Linear("row", rough(4, 1, 7, dtype="float32"), inputs=(noise(5, 1, 7),)),
            Linear("column", rough(5, 7, 1, dtype="float32"), inputs=(noise(6, 3, 1),)),
            Linear("odd", rough(6, 13, 13), inputs=(noise(7, 1, 13),)),
        ),
    ),
    Case(
        "int8-channel-bfloat16-scale",
        "scales that are stored in bfloat16",
        "Codes are computed from the scale as stored, not from the one that was rounded.",
        (Linear("a", rough(7, 4, 6), spec=Spec("int8", scale_dtype="bfloat16")),),
    ),
    Case(
        "int8-channel-float16-scale",
        "scales that are stored in float16",
        "float16 has no scale below 2^-14 that is normal: the small row gets 2^-14.",
        (
            Linear(
                "a",
                tensor("float32", [[0.7, -0.2, 0.11], [1e-4, -3e-3, 2e-5]]),
                spec=Spec("int8", scale_dtype="float16"),
            ),
        ),
    ),
    Case(
        "int8-tensor",
        "int8, one scale for the whole weight",
        "The largest weight is in the last row, and the first row has few codes to itself.",
        (
            Linear(
                "a",
                tensor("float32", [[0.01, -0.02, 0.03], [0.2, 0.1, -0.15], [1.0, -0.5, 0.77]]),
                spec=Spec("int8", granularity="tensor"),
                activation=True,
                inputs=(noise(8, 2, 3),),
            ),
        ),
    ),
    Case(
        "int8-group",
        "int8, one scale for each four columns of a row",
        "Scales are a matrix [out, groups]; a group of zeros has scale 1.",
        (
            Linear(
                "a",
                tensor(
                    "bfloat16",
                    [[0.1, 0.2, -0.3, 0.4, 8, -4, 2, 1], [0, 0, 0, 0, 0.03, 0.02, 0.01, -0.04]],
                ),
                spec=Spec("int8", (1, 4), "group"),
                inputs=(noise(9, 1, 8),),
            ),
        ),
    ),
    Case(
        "int8-from-float16",
        "a source in float16, subnormal numbers among them",
        "Weights are taken to float32 first, which holds each of them.",
        (Linear("a", tensor("float16", [[0.1, -65504, 3], [2.0**-24, -(2.0**-20), 2.0**-15]])),),
    ),
    Case(
        "int8-from-float64",
        "a source in float64",
        "Weights are rounded to float32 first: the scale comes from those.",
        (Linear("a", tensor("float64", [[0.1, -0.3, 1 / 3], [1e-9, 2e-9, -3.1e-9]])),),
    ),
]

# float8

FLOAT8 = [
    case
    for name, fmt, seed in (("e4m3fn", E4M3, 20), ("e5m2", E5M2, 30))
    for case in (
        Case(
            f"float8-{name}-channel",
            f"fp8 {name}, one scale for each output channel",
            "scale = max|w| / largest code in float32, code = w / scale rounded to nearest.",
            (
                Linear(
                    "block.a", rough(seed, 3, 5), BIAS, spec=Spec(fmt), inputs=(noise(seed, 2, 5),)
                ),
            ),
            target="fp8-scaled",
            others=NORM,
        ),
        Case(
            f"float8-{name}-tensor",
            f"fp8 {name}, one scale for the whole weight",
            "The scale is a tensor without dimensions; here it is stored in bfloat16, and the "
            "largest weight is clamped or falls short of the largest code.",
            (
                Linear(
                    "a",
                    rough(seed + 1, 4, 3),
                    spec=Spec(fmt, granularity="tensor", scale_dtype="bfloat16"),
                    inputs=(noise(seed + 1, 1, 3),),
                ),
            ),
            target="fp8-scaled",
        ),
        Case(
            f"float8-{name}-block",
            f"fp8 {name}, one scale for each block of 2 x 3",
            "Blocks at the edges are smaller. A block of zeros has scale 1.",
            (
                Linear(
                    "a",
                    tensor(
                        "float32",
                        [
                            [1, 2, 3, 0, 0, 0, 0.7],
                            [-4, 5, 6, 0, 0, -0.0, 0.1],
                            [1e-3, 2e-3, -3e-3, 10, 20, 30, -0.4],
                        ],
                    ),
                    spec=Spec(fmt, (2, 3), "block"),
                    inputs=(noise(seed + 2, 2, 7),),
                ),
            ),
            target=blocks(2, 3),
        ),
        Case(
            f"float8-{name}-ties",
            f"ties between codes of {name}, subnormal ones too",
            "The largest weight is the largest code, so the scale is 1. Halfway between two codes "
            "the even one is taken, and what rounds to zero keeps its sign.",
            (
                Linear(
                    "a",
                    tensor(
                        "float32",
                        [
                            [448, 17, 19, 1.0625, 1.1875, 2.0**-9, -(2.0**-10), 3 * 2.0**-10]
                            if fmt == E4M3
                            else [57344, 9, 11, 1.125, 1.375, 2.0**-16, -(2.0**-17), 3 * 2.0**-17],
                        ],
                    ),
                    spec=Spec(fmt),
                ),
            ),
            target="fp8-scaled",
        ),
        Case(
            f"float8-{name}-zero-rows",
            f"fp8 {name}: a row of zeros, and a row of the smallest numbers",
            "Zeros keep their sign. The scale of the last row is 2^-126.",
            (
                Linear(
                    "a",
                    tensor(
                        "float32",
                        [[0.0, -0.0, 0.0], [0.5, 0.25, -1.0], [2.0**-149, 2.0**-130, 2.0**-126]],
                    ),
                    spec=Spec(fmt),
                ),
            ),
            target="fp8-scaled",
        ),
    )
]
FLOAT8.append(
    Case(
        "float8-block-128",
        "fp8 by blocks of 128 x 128, as the layout fp8-scaled holds them",
        "130 columns: two blocks, the second of which is two columns wide.",
        (Linear("a", rough(40, 1, 130), spec=Spec(E4M3, (128, 128), "block")),),
        target="fp8-scaled",
    )
)

# Plain dtypes


def protected(dtype: str, **fields: Any) -> Json:
    return {"protected": [{"modules": ["b"], "dtype": dtype, "reason": "spikes", **fields}]}


def plain(dtype: str, source: Tensor, identifier: str, title: str, shows: str) -> Case:
    return Case(
        identifier,
        title,
        shows,
        (
            Linear("a", tensor("float32", [[1.0, -0.5, 0.3]]), inputs=(noise(50, 1, 3),)),
            Linear("b", source, spec=None, dtype=dtype, inputs=(noise(51, 1, 3, dtype=dtype),)),
        ),
        fields=protected(dtype),
    )


PLAIN = [
    plain(
        "bfloat16",
        tensor("float32", [[1.00390625, 1.01171875, -(1 + 2.0**-8 + 2.0**-20)]]),
        "plain-bfloat16",
        "a protected module in bfloat16",
        "float32 is rounded to nearest; of two equally near the even one.",
    ),
    plain(
        "float16",
        tensor("float32", [[2.0**-25, 3 * 2.0**-26, 1 + 2.0**-11]]),
        "plain-float16",
        "a protected module in float16",
        "Subnormal numbers are kept: 2^-25 is a tie and becomes 0, 3 * 2^-26 becomes 2^-24.",
    ),
    plain(
        "float32",
        tensor("bfloat16", [[0.1, 2.0**-133, -3e38]]),
        "plain-float32",
        "a protected module in more digits than it had",
        "Nothing is rounded.",
    ),
    plain(
        "bfloat16",
        tensor("float64", [[1 + 2.0**-8 + 2.0**-30, 1 - 2.0**-9 - 2.0**-40, 0.1]]),
        "plain-twice-rounded",
        "float64 to bfloat16 goes through float32",
        "1 + 2^-8 + 2^-30 is rounded to the tie 1 + 2^-8 first, then to the even 1.",
    ),
    Case(
        "plain-passed-through",
        "what no rule takes keeps its bytes",
        "A module in its own dtype, a NaN in a tensor of no module, whole numbers, a number "
        "without dimensions, and a tensor without numbers.",
        (
            Linear("a", rough(52, 2, 4)),
            Linear(
                "c",
                rough(53, 2, 4, dtype="float16"),
                spec=None,
                inputs=(noise(52, 1, 4, dtype="float16"),),
            ),
        ),
        others={
            "norm.weight": Tensor("float32", (2,), raw=bytes.fromhex("0100c07f000080ff")),
            "steps": tensor("int64", [-1, 2**40]),
            "gain": tensor("float32", 0.1),
            "none": Tensor("float32", (0, 3)),
        },
    ),
]

# Sources that are quantized already


def codes(fmt: str, rows: list[list[float]]) -> Tensor:
    return tensor(fmt, rows)


FP8_ROWS = [[448.0, -1.5, 2.0**-9, 0.875], [-20.0, 0.0, 3.5, 208.0]]
SOURCES = [
    Case(
        f"source-{name}",
        f"an fp8 source with {what}",
        "Its numbers are float32(code) * float32(scale), rounded once to float32 and to no smaller "
        "dtype; int8 is made of those. A module that no rule takes becomes bfloat16.",
        (
            Linear("a", codes(fmt, FP8_ROWS), BIAS2, scale, held, spec=INT8_SPEC),
            Linear("b", codes(fmt, FP8_ROWS), None, scale, held, spec=None, dtype="bfloat16"),
        ),
        source="fp8-scaled",
    )
    for INT8_SPEC, BIAS2 in [(Spec("int8"), tensor("bfloat16", [0.5, -0.25]))]
    for name, what, fmt, scale, held in (
        (
            "float8-tensor",
            "one scale, a tensor without dimensions",
            E4M3,
            tensor("float32", 0.0123),
            Spec(E4M3, granularity="tensor"),
        ),
        (
            "float8-channel",
            "a scale for each row",
            E4M3,
            tensor("float32", [0.0123, 3.3]),
            Spec(E4M3),
        ),
        (
            "float8-channel-column",
            "scales of shape [out, 1]",
            E5M2,
            tensor("float32", [[0.0123], [3.3]]),
            Spec(E5M2),
        ),
        (
            "float8-bfloat16-scale",
            "scales in bfloat16",
            E4M3,
            tensor("bfloat16", [0.0123, 3.3]),
            Spec(E4M3, scale_dtype="bfloat16"),
        ),
    )
]
SOURCES += [
    Case(
        "source-float8-block",
        "an fp8 source with a scale for each block",
        "Each number takes the scale of its block.",
        (
            Linear(
                "a",
                codes(E4M3, FP8_ROWS),
                None,
                tensor("float32", [[0.5, 0.3]]),
                Spec(E4M3, (2, 3), "block"),
                spec=Spec("int8", granularity="tensor"),
            ),
        ),
        source=blocks(2, 3),
    ),
    Case(
        "source-float8-older-names",
        "an fp8 source that says scale_weight",
        "Read by its alias, written under the new name; the marker scaled_fp8 is not carried on.",
        (
            Linear(
                "a",
                codes(E4M3, FP8_ROWS),
                None,
                tensor("float32", 0.25),
                Spec(E4M3, granularity="tensor"),
                scale_name="scale_weight",
            ),
        ),
        source="fp8-scaled",
        markers={"scaled_fp8": Tensor("float32", (0,))},
    ),
    Case(
        "source-float8-kept",
        "an fp8 module that is passed on as it is",
        "With passthrough_dtype keep, codes and scale keep their bytes.",
        (
            Linear(
                "a",
                codes(E4M3, FP8_ROWS),
                None,
                tensor("float32", [0.0123, 3.3]),
                Spec(E4M3),
                spec=None,
                inputs=(noise(60, 1, 4),),
            ),
            Linear(
                "b",
                rough(60, 2, 4),
                spec=Spec(E4M3),
            ),
        ),
        source="fp8-scaled",
        target={"layout": "fp8-scaled", "passthrough_dtype": "keep"},
    ),
    Case(
        "source-int8",
        "an int8 source, -128 among its codes",
        "-128 is read as -128, and never written: with one scale for the whole weight, codes are "
        "chosen anew.",
        (
            Linear(
                "a",
                codes("int8", [[-128, 127, 1, 0], [5, -3, 127, 64]]),
                None,
                tensor("float32", [[0.01], [0.02]]),
                Spec("int8"),
                spec=Spec("int8", granularity="tensor"),
            ),
        ),
        source="int8-scaled",
    ),
]

# Smoothing

SMOOTHED_INPUT = tensor("float32", [[3.9, -0.2, 0.0, 0.5], [-1.0, 0.13, 0.01, -0.3]])
SMOOTHING = [
    Case(
        "smoothing-online",
        "activations divided by stored factors",
        "factor = (max|X| / max|W|)^0.5 for each input channel, the largest over all bins; weights "
        "are multiplied by it before they are quantized, and inputs divided by it at run time. A "
        "channel that was never seen, or has no weights, has factor 1.",
        (
            Linear(
                "a",
                tensor("float32", [[0.5, -0.25, 0.0, 1.0], [0.25, 4.0, -0.0, 0.5]]),
                tensor("float32", [0.125, -0.25]),
                measured=((4.5, 1.0, 3.0, 0.0), (2.0, 0.5, 1.0, 0.0)),
                activation=True,
                inputs=(SMOOTHED_INPUT, tensor("bfloat16", SMOOTHED_INPUT.rows)),
            ),
        ),
        dtypes=("float32", "float16"),
    ),
    Case(
        "smoothing-weight-only",
        "smoothing without quantized activations",
        "Inputs are divided by the factors; dividing the weight's columns means the same.",
        (
            Linear(
                "a",
                rough(70, 3, 4),
                measured=((0.3, 7.0, 1.1, 90.0),),
                inputs=(SMOOTHED_INPUT,),
            ),
        ),
    ),
]

GATE = tensor("float32", [[0.5, -0.25, 0.0, 1.0], [0.25, 4.0, -0.0, 0.5]])
UP = tensor("bfloat16", [[-3.0, 0.125, 0.0, 0.25], [0.5, 0.5, 0.75, 0.0], [1.0, 1.0, 0.0, 0.0]])
SIBLING: dict[str, Any] = {
    "measured": ((4.5, 1.0, 3.0, 0.0), (2.0, 0.5, 1.0, 0.0)),
    "activation": True,
    "inputs": (SMOOTHED_INPUT,),
}
SMOOTHING += [
    Case(
        "smoothing-siblings",
        "two modules with the same input share their factors",
        "max|W| is over the weights of both, and both store the same factors. The third has its "
        "own.",
        (
            Linear("mlp.gate", GATE, beside=(UP,), **SIBLING),
            Linear("mlp.up", UP, beside=(GATE,), **SIBLING),
            Linear("mlp.down", GATE, **SIBLING),
        ),
        fields={"siblings": [["*.gate", "*.up"]]},
    ),
    Case(
        "smoothing-power-of-two",
        "factors rounded to powers of two",
        "Each factor is the nearest power of two by ratio: from the square root of 2 on it is 2.",
        (Linear("a", GATE, power_of_two=True, **SIBLING),),
    ),
]

# Rotation

ROTATION = [
    Case(
        "rotation-w8a8",
        "inputs and weights rotated by a Hadamard matrix",
        "Blocks of 16 columns are multiplied by R (x) R, R = [[1, 1, 1, -1], [1, 1, -1, 1], "
        "[1, -1, 1, 1], [-1, 1, 1, 1]] / 2, before weights are quantized, and those of inputs "
        "before they are. The matrix is its own inverse.",
        (
            Linear(
                "a",
                rough(80, 3, 32),
                BIAS,
                rotation=16,
                activation=True,
                inputs=(noise(81, 2, 32), noise(82, 1, 32, dtype="bfloat16")),
            ),
        ),
        target="quantrecipe",
        dtypes=("float32", "bfloat16"),
    ),
    Case(
        "rotation-smoothed",
        "smoothed first, then rotated",
        "The columns of the weight are multiplied by the factors before they are rotated, and "
        "inputs divided by them before they are.",
        (
            Linear(
                "a",
                tensor("float32", [[0.5, -0.25, 0.0, 1.0], [0.25, 4.0, -0.0, 0.5]]),
                measured=((4.5, 1.0, 3.0, 0.0), (2.0, 0.25, 1.0, 0.0)),
                rotation=4,
                activation=True,
                inputs=(tensor("float32", [[3.75, -0.25, 0.0, 0.5], [-0.75, 0.125, 7.25, -2.5]]),),
            ),
        ),
        target="quantrecipe",
    ),
    Case(
        "rotation-weight-only",
        "rotation without quantized activations",
        "Rotating the weight back means the same as rotating inputs.",
        (Linear("a", rough(83, 3, 8), rotation=4, inputs=(noise(84, 2, 8),)),),
        target="quantrecipe",
    ),
]

# Names

ROWS = rough(95, 6, 4)
Q, K, V = (tensor("bfloat16", ROWS.rows[start : start + 2]) for start in (0, 2, 4))
KV = tensor("bfloat16", ROWS.rows[2:])
FP8_QK = codes(E4M3, [*FP8_ROWS, *FP8_ROWS])

NAMES = [
    Case(
        "names-split",
        "rows of one module become three",
        "The rows of qkv are cut into three equal parts, in the order of the names, and out is "
        "called to_out.0. Rules speak of the new names.",
        (
            *(Linear(f"a.to_{name}", rows) for name, rows in (("q", Q), ("k", K), ("v", V))),
            Linear("a.to_out.0", rough(96, 2, 4), tensor("bfloat16", [0.5, -1.0])),
        ),
        apart={
            "a.qkv.weight": ROWS,
            "a.out.weight": rough(96, 2, 4),
            "a.out.bias": tensor("bfloat16", [0.5, -1.0]),
        },
        target={
            "layout": "int8-scaled",
            "names": [
                {"from": "*.qkv", "into": ["*.to_q", "*.to_k", "*.to_v"]},
                {"from": "*.out", "into": "*.to_out.0"},
            ],
        },
    ),
    Case(
        "names-merged",
        "rows of two modules become one",
        "The rows of q, then those of kv, as if they had been one weight; biases likewise. Pieces "
        "may differ in their number of rows.",
        (
            Linear(
                "a.qkv",
                ROWS,
                tensor("bfloat16", [0.5, -1.0, 2.0, 0.25, -0.5, 8.0]),
                activation=True,
                inputs=(noise(97, 2, 4),),
            ),
        ),
        apart={
            "a.kv.weight": KV,
            "a.kv.bias": tensor("bfloat16", [2.0, 0.25, -0.5, 8.0]),
            "a.q.weight": Q,
            "a.q.bias": tensor("bfloat16", [0.5, -1.0]),
        },
        target={
            "layout": "int8-scaled",
            "names": [{"from": ["*.q", "*.kv"], "into": "*.qkv"}],
        },
    ),
    Case(
        "names-merged-tensor-scales",
        "pieces with one scale each",
        "Passed on as they are, they are one module with a scale for each row: that of its piece.",
        (
            Linear(
                "qk",
                FP8_QK,
                None,
                tensor("float32", [[0.0123], [0.0123], [3.3], [3.3]]),
                Spec(E4M3),
                spec=None,
            ),
            Linear("o", rough(98, 2, 4), spec=Spec(E4M3)),
        ),
        apart={
            "q.weight": codes(E4M3, FP8_ROWS),
            "q.weight_scale": tensor("float32", 0.0123),
            "k.weight": codes(E4M3, FP8_ROWS),
            "k.weight_scale": tensor("float32", 3.3),
            "o.weight": rough(98, 2, 4),
        },
        source="fp8-scaled",
        target={
            "layout": "quantrecipe",
            "names": [{"from": ["q", "k"], "into": "qk"}],
            "passthrough_dtype": "keep",
        },
    ),
]

# Parts and files


def two_parts(
    identifier: str, title: str, shows: str, target: Json, files: dict[str, str], **fields: Any
) -> Json:
    """The same module names in two parts, with other numbers."""
    parts = {
        part: (
            Linear(
                "blocks.0.w",
                rough(seed, 2, 3),
                tensor("bfloat16", [seed / 4, -seed / 4]),
                activation=True,
                measured=fields.get("measured", ()),
                inputs=(tensor("float32", [[1.0, 0.3, -0.7]]),),
            ),
        )
        for part, seed in (("conditional", 3), ("unconditional", 5))
    }
    norms = {
        part: {"norm.weight": tensor("bfloat16", [float(number), 0.5])}
        for number, part in enumerate(parts, start=1)
    }
    one_file = layout_name(target) == "transformerlab"
    stored: dict[str, dict[str, Tensor]] = {}
    for part, linears in parts.items():
        own = merged(linear.stored(layout_name(target), part) for linear in linears)
        others = {f"{part}.{n}" if one_file else n: kept for n, kept in norms[part].items()}
        stored.setdefault(files[part], {}).update({**own, **others})
    return {
        "id": identifier,
        "title": title,
        "shows": shows,
        "recipe": recipe(
            parts["conditional"],
            "plain",
            target,
            source_fields={"parts": {part: part for part in parts}},
        ),
        "source": {
            f"{part}/{FILE}": file_json({**merged(one.source() for one in linears), **norms[part]})
            for part, linears in parts.items()
        },
        **statistics(parts),
        "target": {file: file_json(tensors, with_bytes=True) for file, tensors in stored.items()},
        "loads": [
            {
                "part": part,
                "names": "source",
                "dtype": "float32",
                "tensors": file_json({**merged(one.loaded() for one in linears), **norms[part]}),
            }
            for part, linears in parts.items()
        ],
        "outputs": [
            entry
            for part, linears in parts.items()
            for linear in linears
            for entry in linear.outputs(part)
        ],
    }


def sharded() -> Json:
    case = Case(
        "parts-shards",
        "one part in numbered files, with an index",
        "A shard holds at most max_shard_size bytes of tensors, and what belongs to a module stays "
        "together.",
        (
            Linear("a", rough(80, 3, 4), tensor("bfloat16", [1, 2, 3]), inputs=(noise(80, 1, 4),)),
            Linear("b", rough(81, 3, 4), inputs=(noise(81, 1, 4),)),
        ),
        target={"layout": "int8-scaled", "max_shard_size": "32B"},
        others={"norm.weight": tensor("bfloat16", [1.0, 0.5])},
    ).as_json()
    tensors = case["target"].pop(FILE)
    shards = (
        ("a.weight", "a.weight_scale", "a.bias"),
        ("b.weight", "b.weight_scale", "norm.weight"),
    )
    for number, names in enumerate(shards, start=1):
        case["target"][f"model-{number:05}-of-00002.safetensors"] = {
            name: tensors.pop(name) for name in names
        }
    assert not tensors
    return case


ONE = "both.safetensors"
PARTS = [
    two_parts(
        "parts-one-file",
        "two parts in one file, told apart by their names",
        "The layout transformerlab: wq, ws and smooth below the name of the part.",
        {"layout": "transformerlab", "file": ONE},
        {"conditional": ONE, "unconditional": ONE},
        measured=((2.0, 0.5, 8.0),),
    ),
    two_parts(
        "parts-two-files",
        "two parts with the same names, each in its own file",
        "Which part is meant is said when loading.",
        {
            "layout": "int8-scaled",
            "parts": {"conditional": f"one/{FILE}", "unconditional": f"two/{FILE}"},
        },
        {"conditional": f"one/{FILE}", "unconditional": f"two/{FILE}"},
    ),
    sharded(),
]

# Refusals


def small() -> Case:
    return Case(
        "refused",
        "",
        "",
        (
            Linear("a", rough(90, 2, 4), tensor("bfloat16", [1.0, 2.0])),
            Linear("b", rough(91, 2, 3)),
        ),
        others=NORM,
    )


def refused_recipe(
    identifier: str, title: str, kind: str, pointer: str, edit: Any, shows: str = ""
) -> Json:
    case = small().as_json()
    document = copy.deepcopy(case["recipe"])
    edit(document)
    return {
        "id": f"refused-{identifier}",
        "title": title,
        "shows": shows or "Refused while planning, before a weight is read.",
        "recipe": document,
        "source": case["source"],
        "refused": [{"kind": kind, "pointer": pointer}],
    }


def refused_source(
    identifier: str,
    title: str,
    problems: list[Json],
    source: dict[str, Tensor],
    *,
    layout: str = "plain",
    spec: Spec | None = None,
    **fields: Any,
) -> Json:
    chosen = spec or Spec("int8")
    target = "int8-scaled" if chosen.format == "int8" else "fp8-scaled"
    return {
        "id": f"refused-{identifier}",
        "title": title,
        "shows": "An error that names the tensor, and nothing is written.",
        "recipe": recipe(
            [Linear("a", tensor("float32", [[1.0]]), spec=chosen)], layout, target, **fields
        ),
        "source": {FILE: file_json(source)},
        "refused": problems,
    }


def refused_checkpoint(
    identifier: str, title: str, problem: Json, edit: Json, case: Json | None = None
) -> Json:
    case = dict(case or small().as_json())
    (file,) = case["target"]
    return case | {
        "id": f"refused-checkpoint-{identifier}",
        "title": title,
        "shows": "A converted checkpoint without its lock, edited. A loader refuses it and names "
        "the tensor.",
        "edited": {file: edit},
        "refused": [problem],
    }


FP8_WEIGHT = {"a.weight": tensor(E4M3, FP8_ROWS)}
REFUSALS = [
    refused_recipe(
        "unknown-field",
        "a field that the schema does not know",
        "unknown-field",
        "/rules/0/modlues",
        lambda recipe: recipe["rules"][0].update(modlues=["b"]),
        "Every unknown field is an error: a typo must not change what is done.",
    ),
    refused_recipe(
        "idle-rule",
        "a rule that takes no module",
        "takes-nothing",
        "/rules/1/modules/0",
        lambda recipe: recipe["rules"].append({"modules": ["c"], "scheme": "s1"}),
    ),
    refused_recipe(
        "count",
        "a count that does not hold",
        "count",
        "/rules/0/count",
        lambda recipe: recipe["rules"][0].update(count=3),
    ),
    refused_recipe(
        "unused-scheme",
        "a scheme that no rule uses",
        "unused-scheme",
        "/schemes/more",
        lambda recipe: recipe["schemes"].update(more={"weight": Spec("int8").as_json()}),
    ),
    refused_recipe(
        "target-cannot-hold",
        "a layout without a place for the format",
        "target-cannot-hold",
        "/schemes/s1/weight",
        lambda recipe: recipe["target"].update(layout="fp8-scaled"),
    ),
    refused_recipe(
        "shape",
        "a group size that does not divide the columns of a weight",
        "shape-refused",
        "/rules/0",
        lambda recipe: recipe["schemes"]["s1"].update(
            weight=Spec("int8", (1, 3), "group").as_json()
        ),
    ),
    refused_source(
        "missing-scale",
        "an fp8 source without its scale",
        [{"kind": "missing-scale", "tensor": "a.weight"}],
        FP8_WEIGHT,
        layout="fp8-scaled",
    ),
    refused_source(
        "misshaped-scale",
        "an fp8 source with a scale for each column",
        [{"kind": "misshaped-scale", "tensor": "a.weight_scale"}],
        {**FP8_WEIGHT, "a.weight_scale": tensor("float32", [1.0, 1.0, 1.0, 1.0])},
        layout="fp8-scaled",
    ),
    refused_source(
        "mistyped-scale",
        "an fp8 source with scales in float64",
        [{"kind": "mistyped-scale", "tensor": "a.weight_scale"}],
        {**FP8_WEIGHT, "a.weight_scale": tensor("float64", [1.0, 1.0])},
        layout="fp8-scaled",
    ),
    refused_source(
        "orphan-scale",
        "a scale beside a weight that is not quantized",
        [{"kind": "orphan-scale", "tensor": "b.weight_scale"}],
        {
            **FP8_WEIGHT,
            "a.weight_scale": tensor("float32", [1.0, 1.0]),
            "b.weight": rough(92, 2, 4),
            "b.weight_scale": tensor("float32", [1.0, 1.0]),
        },
        layout="fp8-scaled",
    ),
    refused_source(
        "not-a-number",
        "a NaN in a weight",
        [{"kind": "non-finite", "tensor": "a.weight"}],
        {"a.weight": Tensor("float32", (1, 2), raw=bytes.fromhex("0000803f0000c07f"))},
    ),
    refused_source(
        "infinity",
        "an infinity in a weight",
        [{"kind": "non-finite", "tensor": "a.weight"}],
        {"a.weight": Tensor("bfloat16", (1, 2), raw=bytes.fromhex("80ff803f"))},
    ),
    refused_source(
        "not-a-number-code",
        "an fp8 code that is no number",
        [{"kind": "non-finite", "tensor": "a.weight"}],
        {
            "a.weight": Tensor(E4M3, (1, 2), raw=bytes.fromhex("38ff")),
            "a.weight_scale": tensor("float32", 1.0),
        },
        layout="fp8-scaled",
    ),
    refused_source(
        "scale-out-of-range",
        "a scale that float16 cannot hold",
        [{"kind": "scale-out-of-range", "tensor": "a.weight"}],
        {"a.weight": tensor("float32", [[1.0, 2.0], [1e8, -1.0]])},
        spec=Spec("int8", scale_dtype="float16"),
    ),
    refused_source(
        "out-of-range",
        "a protected weight that float16 cannot hold",
        [{"kind": "out-of-range", "tensor": "b.weight"}],
        {"a.weight": tensor("float32", [[1.0]]), "b.weight": tensor("float32", [[1e5]])},
        **protected("float16"),
    ),
    refused_checkpoint(
        "missing-scale",
        "a quantized weight without its scale",
        {"kind": "missing-scale", "tensor": "a.weight"},
        {"remove": ["a.weight_scale"]},
    ),
    refused_checkpoint(
        "misshaped-scale",
        "scales for columns in place of rows",
        {"kind": "misshaped-scale", "tensor": "a.weight_scale"},
        {"put": file_json({"a.weight_scale": tensor("float32", [[1.0, 1.0, 1.0, 1.0]])})},
    ),
    refused_checkpoint(
        "orphan-scale",
        "a scale whose weight is no longer quantized",
        {"kind": "orphan-scale", "tensor": "a.weight_scale"},
        {"put": file_json({"a.weight": rough(90, 2, 4)})},
    ),
    refused_checkpoint(
        "misshaped-bias",
        "a bias of another length",
        {"kind": "misshaped-bias", "tensor": "a.bias"},
        {"put": file_json({"a.bias": tensor("bfloat16", [1.0, 2.0, 3.0])})},
    ),
    refused_checkpoint(
        "unscaled",
        "int8 numbers that nothing has a scale for",
        {"kind": "unscaled", "tensor": "extra"},
        {"put": file_json({"extra": tensor("int8", [[1, 2]])})},
    ),
    refused_checkpoint(
        "extra-tensor",
        "a tensor of no part",
        {"kind": "extra-tensor", "tensor": "third.norm.weight"},
        {"put": file_json({"third.norm.weight": tensor("bfloat16", [1.0, 0.5])})},
        {key: value for key, value in PARTS[0].items() if key != "outputs"},
    ),
]

FAMILIES: dict[str, list[Json]] = {
    "int8": [case.as_json() for case in INT8],
    "float8": [case.as_json() for case in FLOAT8],
    "plain": [case.as_json() for case in PLAIN],
    "sources": [case.as_json() for case in SOURCES],
    "smoothing": [case.as_json() for case in SMOOTHING],
    "rotation": [case.as_json() for case in ROTATION],
    "names": [case.as_json() for case in NAMES],
    "parts": PARTS,
    "refusals": REFUSALS,
}
