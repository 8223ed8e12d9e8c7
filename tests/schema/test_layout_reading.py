"""Reading a part through a layout: what is a module, what is not, and what is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.layout_reading import PartContents, fill_template, match_template, read_part
from quantrecipe.schema.registry import layout_names, named_layout

T = tuple[str, str, tuple[int, ...]]
W = ("a.weight", "float8_e4m3fn", (6, 4))
I8 = ("a.weight", "int8", (6, 4))


def read(headers: ModuleType, layout: Any, *tensors: T, part: str = "model") -> PartContents:
    found = named_layout(layout) if isinstance(layout, str) else layout
    made = [headers.tensor(name, dtype, *shape) for name, dtype, shape in tensors]
    return read_part(found, headers.source(*made, name=part))


def kinds(contents: PartContents) -> list[str]:
    return [problem.kind for problem in contents.problems]


# -- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layout_names())
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_layout_reads_plain_modules(headers: ModuleType, layout: str, dtype: str) -> None:
    prefix = "main." if "{part}" in named_layout(layout).others.name else ""
    tensors: list[T] = [
        (f"{prefix}x.0.lin.weight", dtype, (3, 2)),
        (f"{prefix}x.0.lin.bias", dtype, (3,)),
        (f"{prefix}x.norm.weight", dtype, (2,)),
    ]
    contents = read(headers, layout, *tensors, part="main")
    assert not contents.problems
    (module,) = contents.modules.values()
    assert (module.name, module.out_features, module.in_features) == ("x.0.lin", 3, 2)
    assert module.weight.format == dtype
    assert {role: info.name for role, info in module.tensors.items()} == {
        "weight": f"{prefix}x.0.lin.weight",
        "bias": f"{prefix}x.0.lin.bias",
    }
    assert set(contents.others) == {"x.norm.weight"}
    assert contents.claimed == {name for name, _, _ in tensors}


SCALES: list[tuple[str, str, str, str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    # layout, weight, dtype of the weight, scale, shape of the weight, of the scale, what is read
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (6, 4), (), {"g": "tensor"}),
    ("fp8-scaled", "weight", "float8_e5m2", "weight_scale", (6, 4), (), {"g": "tensor"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (6, 4), (1,), {"g": "tensor"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (6, 4), (6,), {"g": "channel"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (6, 4), (6, 1), {"g": "channel"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "scale_weight", (6, 4), (), {"g": "tensor"}),
    ("fp8-scaled", "weight", "float8_e5m2", "scale_weight", (6, 4), (6,), {"g": "channel"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (4, 4), (4,), {"g": "channel"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (1, 4), (1,), {"g": "tensor"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (300, 129), (3, 2), {"g": "block"}),
    ("fp8-scaled", "weight", "float8_e5m2", "weight_scale", (128, 128), (1, 1), {"g": "block"}),
    ("fp8-scaled", "weight", "float8_e4m3fn", "weight_scale", (256, 256), (2, 2), {"g": "block"}),
    ("int8-scaled", "weight", "int8", "weight_scale", (6, 4), (), {"g": "tensor"}),
    ("int8-scaled", "weight", "int8", "weight_scale", (6, 4), (1,), {"g": "tensor"}),
    ("int8-scaled", "weight", "int8", "weight_scale", (6, 4), (6,), {"g": "channel"}),
    ("int8-scaled", "weight", "int8", "weight_scale", (6, 4), (6, 1), {"g": "channel"}),
    ("int8-scaled", "weight", "int8", "weight_scale", (6, 4), (6, 2), {"g": "group", "size": 2}),
    ("int8-scaled", "weight", "int8", "weight_scale", (6, 4), (6, 4), {"g": "group", "size": 1}),
    ("int8-scaled", "weight", "int8", "weight_scale", (4, 4), (4, 2), {"g": "group", "size": 2}),
    ("transformerlab", "wq", "int8", "ws", (6, 4), (6,), {"g": "channel"}),
    ("transformerlab", "wq", "int8", "ws", (6, 4), (6, 1), {"g": "channel"}),
    ("transformerlab", "wq", "int8", "ws", (4, 4), (4,), {"g": "channel"}),
]


@pytest.mark.parametrize(
    "case", SCALES, ids=lambda case: f"{case[0]}-{case[2]}-{case[3]}-{case[4]}-{case[5]}"
)
def test_a_scale_says_the_granularity(headers: ModuleType, case: Any) -> None:
    layout, weight, dtype, scale, shape, scale_shape, expected = case
    start = "p.a" if layout == "transformerlab" else "a"
    for scale_dtype in getattr(named_layout(layout).modules, dtype).weight_scale.dtypes:
        tensors = (
            (f"{start}.{weight}", dtype, shape),
            (f"{start}.{scale}", scale_dtype, scale_shape),
        )
        contents = read(headers, layout, *tensors, part="p")
        assert not contents.problems
        stored: Any = contents.modules["a"].weight
        assert (stored.format, stored.granularity) == (dtype, expected["g"])
        assert stored.scale_dtype == scale_dtype
        assert getattr(stored, "group_size", None) == expected.get("size")
        if expected["g"] == "block":
            assert stored.block_size == (128, 128)
        assert contents.modules["a"].tensors["weight_scale"].shape == scale_shape
        assert not contents.others


def test_the_position_of_the_groups_is_the_layouts_business(headers: ModuleType) -> None:
    document = headers.layout()
    scale = document["modules"]["int8"]["weight_scale"]
    scale["shapes"]["group"] = [["groups", "out"]]
    contents = read(
        headers, headers.parsed(document), ("a.weight", "int8", (6, 4)),
        ("a.weight_scale", "float32", (2, 6)),
    )  # fmt: skip
    stored: Any = contents.modules["a"].weight
    assert (stored.granularity, stored.group_size) == ("group", 2)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_other_roles_of_a_module(headers: ModuleType, scale_dtype: str) -> None:
    contents = read(
        headers,
        "fp8-scaled",
        W,
        ("a.weight_scale", scale_dtype, ()),
        ("a.bias", "bfloat16", (6,)),
        ("a.scale_input", "float32", ()),
        ("scaled_fp8", "float8_e4m3fn", (0,)),
    )
    assert not contents.problems
    assert set(contents.modules["a"].tensors) == {"weight", "weight_scale", "bias", "input_scale"}
    assert contents.modules["a"].nbytes == 24 + (4 if scale_dtype == "float32" else 2) + 12 + 4
    # The marker is accounted for, and is no tensor of the model.
    assert "scaled_fp8" in contents.claimed
    assert not contents.others


def test_smoothing_is_read(headers: ModuleType) -> None:
    contents = read(
        headers, "transformerlab", ("p.a.wq", "int8", (6, 4)), ("p.a.ws", "float32", (6,)),
        ("p.a.smooth", "float32", (4,)), part="p",
    )  # fmt: skip
    assert not contents.problems
    assert contents.modules["a"].tensors["smoothing"].shape == (4,)


NO_MODULES: dict[str, T] = {
    "scalar": ("a.weight", "bfloat16", ()),
    "1-D": ("a.weight", "bfloat16", (8,)),
    "3-D": ("a.weight", "bfloat16", (2, 3, 4)),
    "4-D": ("a.weight", "float32", (8, 4, 3, 3)),
    "2-D under another name": ("a.table", "bfloat16", (3, 4)),
    "2-D of whole numbers": ("a.weight", "int64", (3, 4)),
    "1-D int8": ("a.steps", "int8", (8,)),
    "bool": ("a.mask", "bool", (3, 4)),
    "uint8": ("a.weight", "uint8", (3, 4)),
}


@pytest.mark.parametrize("layout", ["plain", "fp8-scaled", "int8-scaled"])
@pytest.mark.parametrize("case", NO_MODULES)
def test_what_is_no_module_is_carried_along(headers: ModuleType, layout: str, case: str) -> None:
    contents = read(headers, layout, NO_MODULES[case])
    assert not contents.problems
    assert not contents.modules
    assert set(contents.others) == {NO_MODULES[case][0]}


def test_an_embedding_is_a_module_by_its_shape(headers: ModuleType) -> None:
    contents = read(headers, "plain", ("embed_image_indicator.weight", "bfloat16", (2, 4608)))
    assert set(contents.modules) == {"embed_image_indicator"}


def test_two_parts_in_one_file(headers: ModuleType) -> None:
    tensors = [
        headers.tensor("conditional.a.wq", "int8", 6, 4),
        headers.tensor("conditional.a.ws", "float32", 6),
        headers.tensor("unconditional.a.weight", "bfloat16", 6, 4),
        headers.tensor("unconditional.norm.weight", "bfloat16", 4),
        headers.tensor("stray.weight", "bfloat16", 4),
    ]
    parts = headers.shared(["conditional", "unconditional"], *tensors)
    layout = named_layout("transformerlab")
    one, other = (read_part(layout, part) for part in parts)
    assert one.modules["a"].weight.format == "int8"
    assert other.modules["a"].weight.format == "bfloat16"
    assert set(other.others) == {"norm.weight"}
    assert not one.problems
    assert not other.problems
    # What is neither's is left for whoever sees all parts.
    assert one.claimed | other.claimed == {each.name for each in tensors} - {"stray.weight"}
    assert not one.claimed & other.claimed


# -- what is refused ------------------------------------------------------------------------------

SCALE: T = ("a.weight_scale", "float32", (6,))
REFUSED: dict[str, tuple[str, list[T], list[str]]] = {
    "fp8 without scale": ("fp8-scaled", [W], ["missing-scale"]),
    "fp8 without scale, with bias": (
        "fp8-scaled",
        [W, ("a.bias", "bfloat16", (6,))],
        ["missing-scale"],
    ),
    "int8 without scale": ("int8-scaled", [I8], ["missing-scale"]),
    "scale of an odd dtype": (
        "fp8-scaled",
        [W, ("a.weight_scale", "float64", (6,))],
        ["mistyped-scale"],
    ),
    "scale in e8m0": (
        "fp8-scaled",
        [W, ("a.weight_scale", "float8_e8m0fnu", (6, 1))],
        ["mistyped-scale"],
    ),
    "scale by columns": (
        "fp8-scaled",
        [W, ("a.weight_scale", "float32", (4,))],
        ["misshaped-scale"],
    ),
    "scale by columns of a square weight": (
        "fp8-scaled",
        [("a.weight", "float8_e4m3fn", (4, 4)), ("a.weight_scale", "float32", (1, 4))],
        ["misshaped-scale"],
    ),
    "scale too long by one": (
        "int8-scaled",
        [I8, ("a.weight_scale", "float32", (7, 1))],
        ["misshaped-scale"],
    ),
    "groups that do not divide": (
        "int8-scaled",
        [I8, ("a.weight_scale", "float32", (6, 3))],
        ["misshaped-scale"],
    ),
    "no groups at all": (
        "int8-scaled",
        [I8, ("a.weight_scale", "float32", (6, 0))],
        ["misshaped-scale"],
    ),
    "groups of no columns": (
        "int8-scaled",
        [("a.weight", "int8", (6, 0)), ("a.weight_scale", "float32", (6, 3))],
        ["misshaped-scale"],
    ),
    "groups larger than any recipe says": (
        "int8-scaled",
        [("a.weight", "int8", (1, 1 << 22)), ("a.weight_scale", "float32", (1, 2))],
        ["misshaped-scale"],
    ),
    "blocks of another size": (
        "fp8-scaled",
        [("a.weight", "float8_e4m3fn", (256, 256)), ("a.weight_scale", "float32", (4, 4))],
        ["misshaped-scale"],
    ),
    "scale in four dimensions": (
        "fp8-scaled",
        [W, ("a.weight_scale", "float32", (6, 1, 1, 1))],
        ["misshaped-scale"],
    ),
    "two scales": ("fp8-scaled", [W, SCALE, ("a.scale_weight", "float32", (6,))], ["doubly-owned"]),
    "a scale of a plain weight": (
        "fp8-scaled",
        [("a.weight", "bfloat16", (6, 4)), SCALE],
        ["orphan-scale"],
    ),
    "a scale of nothing": ("fp8-scaled", [SCALE], ["orphan-scale"]),
    "an aliased scale of nothing": (
        "fp8-scaled",
        [("a.scale_weight", "float32", ())],
        ["orphan-scale"],
    ),
    "an input scale of nothing": (
        "fp8-scaled",
        [("a.input_scale", "float32", ())],
        ["orphan-scale"],
    ),
    "smoothing of nothing": ("int8-scaled", [("a.smoothing", "float32", (4,))], ["orphan-scale"]),
    "fp8 in plain": ("plain", [W, SCALE], ["unscaled"]),
    "int8 in plain": ("plain", [I8], ["unscaled"]),
    "int8 under another name": ("plain", [("a.codes", "int8", (6, 4))], ["unscaled"]),
    "int8 in fp8-scaled": ("fp8-scaled", [I8], ["unscaled"]),
    "fp8 in int8-scaled": ("int8-scaled", [W], ["unscaled"]),
    "fp8 of an odd kind": ("fp8-scaled", [("a.weight", "float8_e4m3fnuz", (6, 4))], ["unscaled"]),
    "fp8 in three dimensions": (
        "fp8-scaled",
        [("a.weight", "float8_e4m3fn", (2, 6, 4))],
        ["unscaled"],
    ),
    "fp8 vector": ("fp8-scaled", [("norm.weight", "float8_e4m3fn", (6,))], ["unscaled"]),
    "fp4": ("plain", [("a.weight", "float4_e2m1fn_x2", (6, 4))], ["unscaled"]),
    "bias too short": (
        "plain",
        [("a.weight", "bfloat16", (6, 4)), ("a.bias", "bfloat16", (5,))],
        ["misshaped-bias"],
    ),
    "bias in two dimensions": (
        "fp8-scaled",
        [W, SCALE, ("a.bias", "bfloat16", (6, 1))],
        ["misshaped-bias"],
    ),
    "bias in fp8": (
        "plain",
        [("a.weight", "bfloat16", (6, 4)), ("a.bias", "float8_e4m3fn", (6,))],
        ["mistyped-bias"],
    ),
    "smoothing by rows": (
        "int8-scaled",
        [I8, SCALE, ("a.smoothing", "float32", (6,))],
        ["misshaped-smoothing"],
    ),
    "smoothing in bfloat16": (
        "int8-scaled",
        [I8, SCALE, ("a.smoothing", "bfloat16", (4,))],
        ["mistyped-smoothing"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(headers: ModuleType, case: str) -> None:
    layout, tensors, expected = REFUSED[case]
    contents = read(headers, layout, *tensors)
    assert kinds(contents) == expected
    names = {name for name, _, _ in tensors}
    assert {problem.tensor for problem in contents.problems} <= names
    assert all(problem.file == "model.safetensors" for problem in contents.problems)
    # Refused, and still accounted for: one problem each, not one more for being nobody's.
    assert contents.claimed == names


def test_a_scale_of_an_unknown_shape_is_told_what_is_read(headers: ModuleType) -> None:
    (problem,) = read(headers, "fp8-scaled", W, ("a.weight_scale", "float32", (4,))).problems
    assert problem.message == (
        "scale of shape [4] for a weight of shape [6, 4]; layout 'fp8-scaled' reads [] (tensor) or "
        "[1] (tensor) or [out] (channel) or [out, 1] (channel) or [row_blocks, column_blocks] "
        "(block)"
    )


def test_a_missing_scale_is_called_by_its_name(headers: ModuleType) -> None:
    (problem,) = read(headers, "transformerlab", ("p.a.wq", "int8", (6, 4)), part="p").problems
    assert "'p.a.ws'" in problem.message


@pytest.mark.parametrize("kind", ["missing-scale", "mistyped-scale", "misshaped-scale"])
def test_a_module_with_a_bad_scale_is_broken_not_absent(headers: ModuleType, kind: str) -> None:
    scale = {"missing-scale": [], "mistyped-scale": [("a.weight_scale", "int8", (6,))]}
    tensors = scale.get(kind, [("a.weight_scale", "float32", (5,))])
    contents = read(headers, "fp8-scaled", W, *tensors)
    assert kinds(contents) == [kind]
    assert contents.broken == {"a"}
    assert not contents.modules


def test_a_weight_stored_twice(headers: ModuleType) -> None:
    contents = read(
        headers, "transformerlab", ("p.a.wq", "int8", (6, 4)), ("p.a.ws", "float32", (6,)),
        ("p.a.weight", "bfloat16", (6, 4)), part="p",
    )  # fmt: skip
    assert kinds(contents) == ["duplicate-weight"]
    assert contents.modules["a"].weight.format == "int8"


@pytest.mark.parametrize("role", ["smoothing", "bias"])
def test_what_a_layout_asks_for_has_to_be_there(headers: ModuleType, role: str) -> None:
    document = headers.layout()
    document["modules"]["int8"][role]["optional"] = False
    shape = (4,) if role == "smoothing" else (6,)
    layout = headers.parsed(document)
    assert kinds(read(headers, layout, I8, SCALE)) == [f"missing-{role}"]
    assert not read(headers, layout, I8, SCALE, (f"a.{role}", "float32", shape)).problems


# -- properties -----------------------------------------------------------------------------------

SUFFIXES = [
    "weight",
    "weight_scale",
    "scale_weight",
    "bias",
    "input_scale",
    "smoothing",
    "wq",
    "ws",
]
DTYPES = ["bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64"]
TENSOR = st.tuples(
    st.sampled_from(["a", "b.c", "conditional.a", "scaled_fp8"]),
    st.sampled_from(SUFFIXES),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)


@given(
    st.sampled_from(layout_names()),
    st.lists(TENSOR, max_size=8, unique_by=lambda tensor: tensor[:2]),
    st.randoms(use_true_random=False),
)
def test_every_tensor_has_one_fate_whatever_the_order(
    headers: ModuleType, layout: str, drawn: list[Any], random: Any
) -> None:
    tensors: list[T] = [(f"{name}.{end}", dtype, shape) for name, end, dtype, shape in drawn]
    contents = read(headers, layout, *tensors, part="conditional")
    fates = [
        *(info.name for module in contents.modules.values() for info in module.tensors.values()),
        *(info.name for info in contents.others.values()),
    ]
    assert len(fates) == len(set(fates))
    assert set(fates) <= contents.claimed <= {name for name, _, _ in tensors}
    if not contents.problems:
        assert set(fates) == contents.claimed
        assert not contents.broken
    for module in contents.modules.values():
        assert module.tensors["weight"].shape == (module.out_features, module.in_features)
    random.shuffle(tensors)
    again = read(headers, layout, *tensors, part="conditional")
    assert list(again.modules) == list(contents.modules)
    assert list(again.others) == list(contents.others)
    assert [str(problem) for problem in again.problems] == [str(p) for p in contents.problems]


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@given(
    st.sampled_from(["{module}.weight", "{part}.{module}.wq", "x{module}", "{part}/{module}"]),
    NAMES | st.sampled_from(["{module}", "{part}", "a.weight", "{part}.{module}"]),
)
def test_a_filled_template_reads_its_value_back(template: str, value: str) -> None:
    name = fill_template(template, "p", "module", value)
    assert match_template(template, name, "p", "module") == value


@pytest.mark.parametrize("name", [".weight", "weight", "a.weights", "", "a.bias"])
def test_a_template_reads_no_empty_value(name: str) -> None:
    assert match_template("{module}.weight", name, "p", "module") is None


def test_a_weight_stored_in_out_passes_through(headers: ModuleType) -> None:
    """GPT-2's Conv1D; scales by its rows would be scales by input channel."""
    contents = read(
        headers,
        "plain",
        ("h.0.c_attn.weight", "float32", (4, 12)),
        ("h.0.c_attn.bias", "float32", (12,)),
        ("h.0.c_proj.weight", "float32", (4, 4)),
        ("h.0.c_proj.bias", "float32", (4,)),
    )
    assert not contents.problems
    assert set(contents.modules) == {"h.0.c_proj"}
    assert set(contents.others) == {"h.0.c_attn.weight", "h.0.c_attn.bias"}
