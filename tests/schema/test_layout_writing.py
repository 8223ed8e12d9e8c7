"""Writing a layout: names, shapes, refusals; and reading back what was written."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import read_part
from quantrecipe.schema.layout_writing import (
    has_place_for_bias,
    holds_many_parts,
    missing_role,
    module_tensors,
    other_name,
    refusal,
    unfit,
)
from quantrecipe.schema.registry import layout_names, named_layout
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, ScaledWeight, SmoothQuant, Weight
from quantrecipe.testing.strategies import weight_specs

ADAPTER: TypeAdapter[Any] = TypeAdapter(Weight)
PLAIN = ("float64", "float32", "float16", "bfloat16")


def weight(fmt: str, granularity: str | None = None, **fields: Any) -> Any:
    return ADAPTER.validate_python(
        {"format": fmt} | ({"granularity": granularity} if granularity else {}) | fields
    )


def smoothing(apply: str = "online") -> SmoothQuant:
    return SmoothQuant.model_validate(
        {"kind": "smoothquant", "alpha": 0.5, "apply": apply, "statistics": "s.safetensors"}
    )


def weights() -> list[Any]:
    """One weight format of each kind, whether or not a layout holds it."""
    found = [weight(dtype) for dtype in PLAIN]
    for scale in ("float32", "float16", "bfloat16"):
        found += [weight("int8", g, scale_dtype=scale) for g in ("tensor", "channel")]
        found.append(weight("int8", "group", group_size=4, scale_dtype=scale))
        for fmt in ("float8_e4m3fn", "float8_e5m2"):
            found += [weight(fmt, g, scale_dtype=scale) for g in ("tensor", "channel")]
            found.append(weight(fmt, "block", block_size=(128, 128), scale_dtype=scale))
            found.append(weight(fmt, "block", block_size=(64, 128), scale_dtype=scale))
    return found


def label(spec: Any) -> str:
    pieces = [spec.format]
    if isinstance(spec, ScaledWeight):
        pieces += [spec.granularity, spec.scale_dtype]
    if getattr(spec, "block_size", None) == (64, 128):
        pieces.append("64x128")
    return "-".join(pieces)


# -- what is held ---------------------------------------------------------------------------------

HELD = {
    "plain": set[str](),
    "fp8-scaled": {
        f"{fmt}-{granularity}-{scale}"
        for fmt in ("float8_e4m3fn", "float8_e5m2")
        for granularity in ("tensor", "channel", "block")
        for scale in ("float32", "float16", "bfloat16")
    },
    "int8-scaled": {
        f"int8-{granularity}-{scale}"
        for granularity in ("tensor", "channel", "group")
        for scale in ("float32", "float16", "bfloat16")
    },
    "transformerlab": {"int8-channel-float32"},
}


def refused(layout: Layout, spec: AnyWeight, smooth: SmoothQuant | None) -> Any:
    online = smooth is not None and smooth.apply == "online"
    return refusal(layout, spec, smoothed=smooth is not None, factors=online)


@pytest.mark.parametrize("layout", HELD)
def test_a_layout_holds_what_it_says_and_refuses_the_rest(layout: str) -> None:
    target = named_layout(layout)
    held = {label(spec) for spec in weights() if refusal(target, spec) is None}
    assert held == HELD[layout] | set(PLAIN)
    for spec in weights():
        refused = refusal(target, spec)
        if refused is not None:
            message, hint = refused
            assert layout in message
            assert hint


REFUSALS: dict[str, tuple[str, Any, Any, str, str]] = {
    "format": ("fp8-scaled", weight("int8", "channel"), None, "no place for int8", "float8_e4m3fn"),
    "nothing but plain": ("plain", weight("int8", "channel"), None, "int8", "plain dtypes only"),
    "granularity": (
        "transformerlab",
        weight("int8", "tensor"),
        None,
        "granularity 'tensor'",
        "channel",
    ),
    "block size": (
        "fp8-scaled",
        weight("float8_e5m2", "block", block_size=(64, 64)),
        None,
        "block_size [64, 64]",
        "[128, 128]",
    ),
    "scale dtype": (
        "transformerlab",
        weight("int8", "channel", scale_dtype="bfloat16"),
        None,
        "scales in bfloat16",
        "float32",
    ),
    "smoothing without a place": (
        "fp8-scaled",
        weight("float8_e4m3fn", "channel"),
        smoothing(),
        "smoothing applied 'online'",
        "Fold it",
    ),
    "smoothing of a plain weight": (
        "int8-scaled",
        weight("bfloat16"),
        smoothing(),
        "weights of this scheme are plain",
        "quantized weight format",
    ),
}


@pytest.mark.parametrize("layout", ["int8-scaled", "transformerlab"])
def test_smoothing_that_is_folded_needs_no_place(layout: str) -> None:
    assert refused(named_layout(layout), weight("int8", "channel"), smoothing("fold")) is None


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_what_and_what_would_do(case: str) -> None:
    layout, spec, smooth, said, hinted = REFUSALS[case]
    found = refused(named_layout(layout), spec, smooth)
    assert found is not None
    message, hint = found
    assert said in message
    assert hinted in hint


@pytest.mark.parametrize("layout", ["int8-scaled", "transformerlab"])
def test_smoothing_is_held_where_there_is_a_place(layout: str) -> None:
    assert refused(named_layout(layout), weight("int8", "channel"), smoothing()) is None


@pytest.mark.parametrize(
    ("layout", "many"),
    [("plain", False), ("fp8-scaled", False), ("int8-scaled", False), ("transformerlab", True)],
)
def test_parts_share_a_file_only_by_name(layout: str, many: bool) -> None:
    assert holds_many_parts(named_layout(layout)) is many


@pytest.mark.parametrize("layout", HELD)
def test_every_built_in_layout_has_a_place_for_a_bias(layout: str) -> None:
    target = named_layout(layout)
    for spec in weights():
        if refusal(target, spec) is None:
            assert has_place_for_bias(target, spec)


def test_a_layout_without_a_place_for_a_bias(headers: ModuleType) -> None:
    document = headers.layout()
    del document["modules"]["int8"]["bias"]
    target = headers.parsed(document)
    assert not has_place_for_bias(target, weight("int8", "channel"))
    assert has_place_for_bias(target, weight("bfloat16"))


@pytest.mark.parametrize(
    ("role", "has"),
    [("smoothing", {"smoothing": True}), ("bias", {"bias": True}), ("input_scale", None)],
)
def test_a_layout_may_ask_for_more_than_there_is(
    headers: ModuleType, role: str, has: dict[str, bool] | None
) -> None:
    document = headers.layout()
    tensors = document["modules"]["int8"]
    if role == "input_scale":
        tensors[role] = {"name": "{module}.input_scale"}
    tensors[role]["optional"] = False
    target, spec = headers.parsed(document), weight("int8", "channel")
    lacking = missing_role(target, spec, smoothing=False, bias=False)
    assert lacking is not None
    assert role.replace("_", " ") in lacking[0]
    if has is not None:
        wanted = {"smoothing": False, "bias": False} | has
        assert missing_role(target, spec, **wanted) is None
    assert missing_role(target, weight("bfloat16"), smoothing=False, bias=False) is None


# -- names and shapes -----------------------------------------------------------------------------

WRITTEN: dict[str, tuple[str, Any, dict[str, tuple[str, str, tuple[int, ...]]]]] = {
    "plain": ("plain", weight("float16"), {"weight": ("m.x.weight", "float16", (6, 8))}),
    "fp8-scaled": (
        "fp8-scaled",
        weight("float8_e4m3fn", "channel"),
        {
            "weight": ("m.x.weight", "float8_e4m3fn", (6, 8)),
            # One dimension, as the Ideogram 4 FP8 base has it.
            "weight_scale": ("m.x.weight_scale", "float32", (6,)),
        },
    ),
    "fp8-scaled tensor": (
        "fp8-scaled",
        weight("float8_e5m2", "tensor", scale_dtype="bfloat16"),
        {
            "weight": ("m.x.weight", "float8_e5m2", (6, 8)),
            "weight_scale": ("m.x.weight_scale", "bfloat16", ()),
        },
    ),
    "int8-scaled": (
        "int8-scaled",
        weight("int8", "channel"),
        {
            "weight": ("m.x.weight", "int8", (6, 8)),
            # Two dimensions: a 1-D scale of a square weight is silently wrong with many readers.
            "weight_scale": ("m.x.weight_scale", "float32", (6, 1)),
        },
    ),
    "int8-scaled group": (
        "int8-scaled",
        weight("int8", "group", group_size=4),
        {
            "weight": ("m.x.weight", "int8", (6, 8)),
            "weight_scale": ("m.x.weight_scale", "float32", (6, 2)),
        },
    ),
    "transformerlab": (
        "transformerlab",
        weight("int8", "channel"),
        {
            "weight": ("p.m.x.wq", "int8", (6, 8)),
            "weight_scale": ("p.m.x.ws", "float32", (6,)),
            "smoothing": ("p.m.x.smooth", "float32", (8,)),
            "bias": ("p.m.x.bias", "bfloat16", (6,)),
        },
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written(headers: ModuleType, case: str) -> None:
    layout, spec, expected = WRITTEN[case]
    bias = headers.tensor("whatever", "bfloat16", 6) if "bias" in expected else None
    found = module_tensors(
        named_layout(layout), "p", "m.x", (6, 8), spec, smoothing="smoothing" in expected, bias=bias
    )
    assert {role: (t.name, t.dtype, t.shape) for role, t in found.items()} == expected


def test_blocks_at_the_edges_count() -> None:
    spec = weight("float8_e4m3fn", "block", block_size=(128, 128))
    found = module_tensors(
        named_layout("fp8-scaled"), "p", "x", (300, 129), spec, smoothing=False, bias=None
    )
    assert found["weight_scale"].shape == (3, 2)


# -- what is written is read back -----------------------------------------------------------------

SEGMENT = st.text("abz09_-", min_size=1, max_size=4) | st.sampled_from(
    ["weight", "bias", "ws", "weight_scale", "{part}", "{module}", "ä", "layers"]
)
NAME = st.lists(SEGMENT, min_size=1, max_size=3).map(".".join)
OTHERS = st.sampled_from(
    [
        ("bfloat16", (7,)),
        ("float64", ()),
        ("int64", (2, 3)),
        ("float32", (2, 3, 1, 1)),
        ("bool", ()),
    ]
)
ANY_WEIGHT = weight_specs(
    group_sizes=st.integers(1, 8), block_sizes=st.sampled_from([(128, 128), (64, 128)])
)


def said(templates: Any) -> set[str]:
    """The roles that a layout has a tensor for."""
    return {role for role, template in templates if template is not None}


@given(st.data(), st.sampled_from(layout_names()))
def test_what_is_written_is_read_back(
    headers: ModuleType, data: st.DataObject, layout: str
) -> None:
    target = named_layout(layout)
    names = data.draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    tensors, expected = [], {}
    for name in names:
        spec = data.draw(ANY_WEIGHT)
        held = refusal(target, spec) is None
        if not held:
            continue
        out, inn = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
        inn *= getattr(spec, "group_size", 1)
        # Packed codes fill whole numbers.
        inn *= {"int4": 8, "nf4": 64}.get(spec.format, 1)
        multiples = target.holds[spec.format].multiples if spec.format in target.holds else None
        out, inn = (out, inn) if multiples is None else (out * multiples[0], inn * multiples[1])
        smooth = data.draw(st.booleans()) and refused(target, spec, smoothing()) is None
        bias = headers.tensor("", "float16", out) if data.draw(st.booleans()) else None
        outputs = module_tensors(
            target, "part", name, (out, inn), spec, smoothing=smooth, bias=bias
        )
        two_levels = getattr(spec, "has_two_levels", False)
        templates = getattr(target.modules, spec.format, None) or target.modules.plain
        assert set(outputs) == (
            {"weight"}
            | ({"weight_scale"} if isinstance(spec, ScaledWeight) else set())
            | ({"weight_zero_point"} if getattr(spec, "has_zero_points", False) else set())
            | ({"second_scale"} if two_levels else set())
            | ({"scale_offset", "scale_map"} & said(templates) if two_levels else set())
            | ({"weight_shape", "marker", "code_map", "zeros"} & said(templates))
            | ({"smoothing"} if smooth else set())
            | ({"bias"} if bias is not None else set())
        )
        tensors += list(outputs.values())
        expected[name] = (spec, (out, inn), outputs)
    others = {}
    for name in data.draw(st.lists(NAME, max_size=3, unique=True)):
        dtype, shape = data.draw(OTHERS)
        others[f"{name}.norm"] = (dtype, shape)
        tensors.append(headers.tensor(other_name(target, "part", f"{name}.norm"), dtype, *shape))
    # Module "a.bias" and the bias of module "a" do not meet: each ends in a word of its own.
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    contents: dict[str, bytes] = {}
    for spec, shape, outputs in expected.values():
        contents |= headers.marker(target, spec, shape, outputs)
    shuffled = data.draw(st.permutations(tensors))
    read = read_part(target, headers.source(*shuffled, name="part", contents=contents))
    assert not read.problems
    assert read.modules.keys() == expected.keys()
    assert {name: (info.dtype, info.shape) for name, info in read.others.items()} == others
    for name, (spec, shape, outputs) in expected.items():
        module = read.modules[name]
        assert (module.out_features, module.in_features) == shape
        assert {role: (i.name, i.dtype, i.shape) for role, i in module.tensors.items()} == {
            role: (tensor.name, tensor.dtype, tensor.shape) for role, tensor in outputs.items()
        }
        assert_same(spec, module.weight, shape)


def assert_same(written: Any, read: Any, shape: tuple[int, int]) -> None:
    if isinstance(written, PlainWeight):
        assert read == written
        return
    # Files do not show how scales were chosen.
    written = written.model_copy(update={"quantizer": read.quantizer})
    assert (read.format, read.scale_dtype) == (written.format, written.scale_dtype)
    assert read.scale_grid(*shape) == written.scale_grid(*shape)
    one_row, one_column = shape[0] == 1, written.scale_grid(*shape)[1] == 1
    if written.granularity == "tensor" or not (one_row or one_column):
        assert read == written
    if written.granularity == "channel" and not one_row:
        assert read == written


@given(st.data(), st.sampled_from(layout_names()), ANY_WEIGHT)
def test_every_weight_is_refused_or_held(
    headers: ModuleType, data: st.DataObject, layout: str, spec: Any
) -> None:
    target = named_layout(layout)
    apply = data.draw(st.sampled_from([None, "online"]))
    found = refused(target, spec, smoothing(apply) if apply else None)
    out, inn = data.draw(st.tuples(st.integers(2, 300), st.integers(2, 300)))
    assume(spec.refuses(out, inn) is None)
    if found is not None:
        assert all(found)
        return
    assume(unfit(target, spec, (out, inn)) is None)
    outputs = module_tensors(
        target, "p", "m", (out, inn), spec, smoothing=apply is not None, bias=None
    )
    contents = headers.marker(target, spec, (out, inn), outputs)
    read = read_part(target, headers.source(*outputs.values(), name="p", contents=contents))
    assert not read.problems
    assert_same(spec, read.modules["m"].weight, (out, inn))
