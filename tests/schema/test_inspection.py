"""Recognising layouts, summing up parts, and drafting recipes, all from headers in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from quantrecipe.schema.base import Name
from quantrecipe.schema.config_claims import claimed_kind, config_problems, model_type
from quantrecipe.schema.drafting import DraftSource, draft_recipe, slug
from quantrecipe.schema.dtypes import byte_size
from quantrecipe.schema.foreign_layouts import foreign_problems, sight
from quantrecipe.schema.inspection import formats_used, report_reading
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_writing import module_tensors, other_name
from quantrecipe.schema.planning import make_plan, recipe_metadata
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.provenance import embedded_recipe, target_files
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.recognition import (
    Verdict,
    part_names,
    recognise,
    recognise_together,
)
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.schemes import (
    AnyWeight,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    Int8Channel,
    Int8Group,
    Int8Tensor,
    PlainWeight,
)
from quantrecipe.schema.suspicions import idle_markers, scale_tensors, stray_scales
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo, SourcePart, TensorInfo

LAYOUTS = [named_layout(n) for n in ("fp8-scaled", "int8-scaled", "plain", "transformerlab")]
Spec = tuple[str, tuple[int, ...]]

BF16 = PlainWeight(format="bfloat16")
INT8 = Int8Channel(format="int8", granularity="channel")
FP8 = Float8Channel(format="float8_e4m3fn", granularity="channel")


def part(tensors: Mapping[str, Spec], name: str = "model", files: int = 1) -> SourcePart:
    """A part of ``files`` files that exists in memory only."""
    names = list(tensors)
    infos: dict[str, TensorInfo] = {}
    sources = []
    for number in range(files):
        path = Path(f"/nowhere/{name}-{number + 1:05d}-of-{files:05d}.safetensors")
        if files == 1:
            path = Path(f"/nowhere/{name}.safetensors")
        mine = {}
        for tensor in names[number::files]:
            dtype, shape = tensors[tensor]
            mine[tensor] = TensorInfo(tensor, dtype, shape, path, 8, byte_size(dtype, shape))
        infos |= mine
        sources.append(SourceFileInfo(path, path.name, 0, 0, "0" * 64, {}, mine))
    return SourcePart(name, Path("/nowhere"), tuple(sources), infos)


def stored(
    layout: Layout, modules: Mapping[str, tuple[AnyWeight, tuple[int, int]]], name: str = "model"
) -> dict[str, Spec]:
    """The tensors that ``layout`` stores these modules as."""
    found: dict[str, Spec] = {}
    for module, (weight, shape) in modules.items():
        bias = OutputTensor("", "bfloat16", shape[:1])
        for tensor in module_tensors(
            layout, name, module, shape, weight, smoothing=False, bias=bias
        ).values():
            found[tensor.name] = (tensor.dtype, tensor.shape)
    norm = other_name(layout, name, "norm.weight")
    return found | {norm: ("bfloat16", (8,))}


def tree(layers: int = 3, weight: AnyWeight = BF16) -> dict[str, tuple[AnyWeight, tuple[int, int]]]:
    modules: dict[str, tuple[AnyWeight, tuple[int, int]]] = {
        "tok_embedding": (BF16, (100, 64)),
        "proj_out": (BF16, (64, 64)),
    }
    for layer in range(layers):
        modules[f"layers.{layer}.qkv"] = (weight, (192, 64))
        modules[f"layers.{layer}.o"] = (weight, (64, 64))
    return modules


def only(tensors: Mapping[str, Spec], layouts: Sequence[Layout] = LAYOUTS) -> Verdict:
    return recognise([part(tensors)], layouts)


# -- recognition ----------------------------------------------------------------------------------

WEIGHTS: dict[str, list[AnyWeight]] = {
    "plain": [BF16, PlainWeight(format="float32"), PlainWeight(format="float16")],
    "int8-scaled": [
        INT8,
        Int8Tensor(format="int8", granularity="tensor"),
        Int8Group(format="int8", granularity="group", group_size=16),
    ],
    "fp8-scaled": [
        FP8,
        Float8Tensor(format="float8_e5m2", granularity="tensor", scale_dtype="bfloat16"),
        Float8Block(format="float8_e4m3fn", granularity="block", block_size=(128, 128)),
    ],
    "transformerlab": [INT8],
}
DIMS = st.sampled_from([32, 160, 272])


@given(st.data())
def test_what_a_layout_writes_is_recognised_as_that_layout(data: st.DataObject) -> None:
    layout = named_layout(data.draw(st.sampled_from(sorted(WEIGHTS))))
    weights = st.sampled_from([*WEIGHTS[layout.name], BF16])
    names = st.sampled_from([f"layers.{i}.{m}" for i in range(4) for m in "ab"])
    modules = data.draw(
        st.dictionaries(names, st.tuples(weights, st.tuples(DIMS, DIMS)), min_size=1)
    )
    modules["layers.9.first"] = (WEIGHTS[layout.name][0], (32, 160))
    parts = ["conditional", "unconditional"] if layout.name == "transformerlab" else ["model"]
    tensors: dict[str, Spec] = {}
    for name in parts:
        tensors |= stored(layout, modules, name)

    verdict = only(tensors)

    assert verdict.fits
    assert verdict.best.layout.name == layout.name
    assert [p.name for p in verdict.best.parts] == parts
    for contents in verdict.best.contents.values():
        assert {n: m.weight for n, m in contents.modules.items()} == {
            n: weight for n, (weight, _) in modules.items()
        }
    reports = report_reading(verdict.best, ".", sure=True, reason="")
    assert sum(report.nbytes for report in reports) == sum(byte_size(*t) for t in tensors.values())
    for report in reports:
        inside = sum(g.nbytes for g in report.modules) + sum(g.nbytes for g in report.others)
        assert inside == report.nbytes
        assert sum(group.count for group in report.modules) == len(modules)
    uses = formats_used(reports)
    assert sum(use.modules for use in uses) == len(modules) * len(parts)


FP8_TENSORS = stored(named_layout("fp8-scaled"), tree(weight=FP8))
INT8_TENSORS = stored(named_layout("int8-scaled"), tree(weight=INT8))
QKV = "layers.1.qkv.weight"
SCALE = "layers.1.qkv.weight_scale"


@pytest.mark.parametrize(
    ("tensors", "nearest", "kind"),
    [
        ({k: v for k, v in FP8_TENSORS.items() if k != SCALE}, "fp8-scaled", "missing-scale"),
        ({k: v for k, v in FP8_TENSORS.items() if k != QKV}, "fp8-scaled", "orphan-scale"),
        (FP8_TENSORS | {SCALE: ("float32", (191,))}, "fp8-scaled", "misshaped-scale"),
        (FP8_TENSORS | {SCALE: ("int8", (192,))}, "fp8-scaled", "mistyped-scale"),
        (INT8_TENSORS | {SCALE: ("float64", (192, 1))}, "int8-scaled", "mistyped-scale"),
        (FP8_TENSORS | {QKV: ("int8", (192, 64))}, "fp8-scaled", "unscaled"),
        ({"a.weight": ("int8", (8, 8))}, "int8-scaled", "missing-scale"),
        (
            {"a.weight": ("int8", (8, 8)), "a.weight_scale": ("float32", (7,))},
            "int8-scaled",
            "misshaped-scale",
        ),
        (
            {"a.weight": ("bfloat16", (8, 8)), "a.bias": ("bfloat16", (7,))},
            "plain",
            "misshaped-bias",
        ),
        ({"c.a.wq": ("int8", (8, 8))}, "transformerlab", "missing-scale"),
    ],
    ids=[
        "no scale", "no weight", "one short", "int scale", "float64 scale", "other format",
        "int8 alone", "only one module", "bias", "wq alone",
    ],
)  # fmt: skip
def test_what_no_layout_explains_is_held_against_the_nearest(
    tensors: dict[str, Spec], nearest: str, kind: str
) -> None:
    verdict = only(tensors)
    assert not verdict.fits
    assert verdict.best.layout.name == nearest
    assert kind in {problem.kind for problem in verdict.best.problems}


def test_nothing_quantized_is_plain() -> None:
    verdict = only(stored(named_layout("plain"), tree()))
    assert verdict.fits
    assert (verdict.best.layout.name, verdict.best.quantized, verdict.rivals) == ("plain", 0, ())


def test_two_layouts_that_say_the_same_are_ambiguous() -> None:
    twin = named_layout("int8-scaled").model_copy(update={"name": "int8-twin"})
    verdict = only(INT8_TENSORS, [*LAYOUTS, twin])
    assert (verdict.best.layout.name, verdict.rivals) == ("int8-scaled", ("int8-twin",))


def test_names_of_parts_are_those_in_front_of_the_tensors() -> None:
    layout = named_layout("transformerlab")
    assert part_names(layout, ["b.x.wq", "a.y.weight", "Not-A-Part.z", "alone"]) == ["a", "b"]
    assert part_names(layout, [f"p{i}.x" for i in range(100)]) == []
    assert part_names(named_layout("plain"), ["a.weight"]) == []


def test_parts_that_cannot_be_told_apart_do_not_share_a_file() -> None:
    tensors = stored(named_layout("plain"), tree())
    both = [part(tensors, "one"), part(tensors, "two")]
    kinds = {p.kind for p in recognise(both, [named_layout("plain")], named=True).best.problems}
    assert kinds == {"parts-share-file"}


def test_one_layout_for_all_files_is_the_one_that_explains_them_together() -> None:
    plain = stored(named_layout("plain"), tree())
    readings = recognise_together([[part(plain, "vae")], [part(FP8_TENSORS, "dit")]], LAYOUTS)
    assert [reading.layout.name for reading in readings] == ["fp8-scaled", "fp8-scaled"]
    assert not any(reading.problems for reading in readings)


def test_without_layouts_nothing_can_be_recognised() -> None:
    with pytest.raises(ValueError, match="no layout"):
        recognise([part(FP8_TENSORS)], [])
    with pytest.raises(ValueError, match="no layout"):
        recognise_together([[part(FP8_TENSORS)]], [])


# -- suspicions -----------------------------------------------------------------------------------


def test_a_scale_left_behind_among_plain_weights_is_seen() -> None:
    tensors = stored(named_layout("plain"), tree())
    assert not list(stray_scales(only(tensors).best, LAYOUTS))
    left = tensors | {"layers.0.o.weight_scale": ("float32", (64,))}
    (problem,) = stray_scales(only(left).best, LAYOUTS)
    assert (problem.kind, problem.tensor) == ("orphan-scale", "layers.0.o.weight_scale")


def test_a_scale_that_the_layout_complains_of_is_not_named_twice() -> None:
    reading = only(FP8_TENSORS | {"z.weight_scale": ("float32", (4,))}).best
    assert "z.weight_scale" in {problem.tensor for problem in reading.problems}
    assert not list(stray_scales(reading, LAYOUTS))


def test_a_marker_with_nothing_to_mark_is_seen() -> None:
    marker: dict[str, Spec] = {"scaled_fp8": ("float8_e4m3fn", (2,))}
    marked = only(FP8_TENSORS | marker)
    assert marked.fits
    assert not list(idle_markers(marked.best))
    idle = only(stored(named_layout("plain"), tree()) | marker)
    assert [problem.kind for problem in idle_markers(idle.best)] == ["idle-marker"]


def test_scale_tensors_are_the_scales() -> None:
    assert set(scale_tensors(only(FP8_TENSORS).best)) == {
        name for name in FP8_TENSORS if name.endswith("weight_scale")
    }


# -- layouts that are not read --------------------------------------------------------------------

W8: Spec = ("int8", (8, 8))
U8: Spec = ("uint8", (8, 4))
F: Spec = ("float32", (8,))


@pytest.mark.parametrize(
    ("tensors", "metadata", "config", "name"),
    [
        ({"a.weight": W8, "a.comfy_quant": ("uint8", (9,))}, [], None, "comfyui"),
        ({"a.weight": W8}, ["_quantization_metadata"], None, "comfyui"),
        ({"a.weight_packed": U8, "a.weight_scale": F}, [], None, "compressed-tensors"),
        ({"a.weight": U8, "a.weight.quant_map": F}, [], None, "bitsandbytes-nf4"),
        ({"a.weight": W8, "a.SCB": F}, [], None, "bitsandbytes-int8"),
        ({"a._weight_qdata": W8, "a._weight_scale": F}, [], None, "torchao"),
        ({"a.weight._data": W8, "a.weight._scale": F}, [], None, "quanto"),
        ({"a.weight": W8, "a.weight_scale_inv": F}, [], None, "fp8-block-inverse"),
        ({"a.weight": U8, "a.weight_scale_2": F}, [], None, "nvfp4"),
        ({"a.qweight": W8, "a.qzeros": U8}, [], None, "gptq"),
        ({"a.weight": W8}, [], {"quant_method": "sdnq"}, "sdnq"),
        (
            {"a.weight": U8},
            [],
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes-nf4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_foreign_layouts_are_known_by_sight(
    tensors: dict[str, Spec], metadata: list[str], config: dict[str, Any] | None, name: str
) -> None:
    found = sight(part(tensors).tensors, metadata, config)
    assert found is not None
    assert found.layout.name == name
    assert found.by_config == (config is not None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_that_are_read_are_not_foreign(layout: Layout) -> None:
    tensors = stored(layout, tree(weight=WEIGHTS[layout.name][0]))
    assert sight(part(tensors).tensors, ["format"], None) is None
    assert sight(part(tensors).tensors, [], {"quant_method": "never heard of"}) is None


@pytest.mark.parametrize(
    ("tensors", "kinds"),
    [
        ({"a.weight": W8, "a.comfy_quant": U8}, []),
        ({"a.comfy_quant": U8}, ["missing-companion"]),
        ({"a.weight": W8, "b.weight": W8, "a.comfy_quant": U8}, ["missing-marker"]),
        ({"a.weight_packed": U8}, ["missing-companion"]),
        ({"a._weight_qdata": W8}, ["missing-companion"]),
    ],
    ids=["fine", "marker alone", "unmarked", "packed alone", "torchao alone"],
)
def test_of_foreign_layouts_what_is_missing_is_named(
    tensors: dict[str, Spec], kinds: list[str]
) -> None:
    found = part(tensors).tensors
    sighting = sight(found, [], None)
    assert sighting is not None
    assert [p.kind for p in foreign_problems(sighting.layout, found, {})] == kinds


# -- config.json ----------------------------------------------------------------------------------

CT_INT8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
}
CT_FP8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
}


@pytest.mark.parametrize(
    ("config", "weight", "wrong"),
    [
        (CT_INT8, INT8, False),
        (CT_INT8, FP8, True),
        (CT_INT8, BF16, True),
        (CT_FP8, FP8, False),
        (CT_FP8, INT8, True),
        ({"quant_method": "fp8"}, INT8, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, INT8, True),
        ({"quant_method": "something new"}, INT8, False),
        ({"quant_method": "something new"}, BF16, True),
        ({"quant_method": "int8", "ignored_layers": ["layers.0.o"]}, INT8, True),
        ({"quant_method": "int8", "ignored_layers": ["proj_out", 7]}, INT8, False),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": None}}, INT8, False),
    ],
)
def test_a_config_is_held_against_the_tensors(
    config: dict[str, Any], weight: AnyWeight, wrong: bool
) -> None:
    layout = named_layout("fp8-scaled" if weight == FP8 else "int8-scaled")
    tensors = part(stored(layout, tree(weight=weight))).tensors
    quantized = [] if weight == BF16 else ["layers.0.o", "layers.0.qkv"]
    found = list(config_problems(config, tensors, quantized, "config.json"))
    assert [problem.kind for problem in found] == ["config-contradicts"] * wrong


def test_claims_and_model_types() -> None:
    assert claimed_kind({"quant_method": "gptq", "bits": 4}) == "4 bits"
    assert claimed_kind({}) is None
    assert model_type({"architectures": ["BertModel"], "model_type": "bert"}) == "BertModel"
    assert model_type({"_class_name": "FluxTransformer2DModel"}) == "FluxTransformer2DModel"
    assert model_type({"architectures": []}) is None


# -- drafts ---------------------------------------------------------------------------------------


def draft(pieces: Mapping[str, tuple[SourcePart, ...]]) -> tuple[Recipe, tuple[SourcePart, ...]]:
    readings = recognise_together(list(pieces.values()), LAYOUTS)
    sources = [DraftSource(where, reading) for where, reading in zip(pieces, readings, strict=True)]
    recipe, text = draft_recipe(sources, "My Model (v2)!")
    assert Recipe.model_validate_json(text) == recipe
    return recipe, tuple(p for reading in readings for p in reading.parts)


def two_branches() -> dict[str, tuple[SourcePart, ...]]:
    return {where: (part(FP8_TENSORS, where),) for where in ("transformer", "unconditional")}


SHARED = {
    name: spec
    for branch in ("conditional", "unconditional")
    for name, spec in stored(named_layout("transformerlab"), tree(weight=INT8), branch).items()
}


@pytest.mark.parametrize(
    ("pieces", "layout", "target"),
    [
        ({".": (part(stored(named_layout("plain"), tree())),)}, "plain", "int8-scaled"),
        ({".": (part(FP8_TENSORS),)}, "fp8-scaled", "int8-scaled"),
        ({".": (part(stored(named_layout("plain"), tree()), files=3),)}, "plain", "int8-scaled"),
        (two_branches(), "fp8-scaled", "int8-scaled"),
        ({".": (part(SHARED),)}, "transformerlab", "transformerlab"),
        ({".": (part(INT8_TENSORS),)}, "int8-scaled", "int8-scaled"),
    ],
    ids=["plain", "fp8", "sharded", "two parts", "two parts in a file", "int8"],
)
def test_drafts_plan_cleanly(
    pieces: dict[str, tuple[SourcePart, ...]], layout: str, target: str
) -> None:
    recipe, parts = draft(pieces)
    planned = make_plan(recipe, parts)
    assert (recipe.source.layout, recipe.target.layout) == (layout, target)
    assert recipe.name == "my-model-v2-int8-w8a8"
    assert not planned.warnings
    per_part = {"quantized": 6, "protected": 2}
    for disposition, count in per_part.items():
        found = [m for m in planned.modules if m.disposition == disposition]
        assert len(found) == count * len(parts)
    assert recipe.rules[0].modules == ("layers.{0..2}.o", "layers.{0..2}.qkv")
    assert recipe.rules[0].count == 6 * len(parts)
    shared = len(parts) > 1 and len(pieces) == 1
    assert (recipe.target.parts is None) == (len(parts) == 1 or shared)
    sharded = any(len(p.files) > 1 for p in parts)
    assert recipe.target.max_shard_size == ("5GB" if sharded else None)


MODULE_NAMES = st.lists(
    st.sampled_from(["layers", "0", "1", "07", "embed_tokens", "adaln", "gate", "lm_head", "q+k"]),
    min_size=1,
    max_size=3,
).map(".".join)


@given(
    st.lists(
        st.dictionaries(
            MODULE_NAMES, st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=8
        ),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from([BF16, FP8]),
)
def test_a_draft_plans_and_leaves_no_module_to_chance(
    trees: list[dict[str, tuple[int, int]]], weight: AnyWeight
) -> None:
    layout = named_layout("plain" if weight == BF16 else "fp8-scaled")
    pieces = {}
    for number, shapes in enumerate(trees):
        modules = {name: (weight, shape) for name, shape in shapes.items()}
        modules["first.proj"] = (weight, (64, 64))
        pieces[f"p{number}"] = (part(stored(layout, modules), f"p{number}"),)
    recipe, parts = draft(pieces)
    planned = make_plan(recipe, parts)
    assert all(module.disposition != "passthrough" for module in planned.modules)
    assert ("p0", "first.proj") in {
        (m.part, m.name) for m in planned.modules if m.disposition == "quantized"
    }


def refused(pieces: Iterable[tuple[str, SourcePart]]) -> set[str]:
    sources = [DraftSource(where, recognise([each], LAYOUTS).best) for where, each in pieces]
    with pytest.raises(InvalidInput) as caught:
        draft_recipe(sources, "x")
    return {problem.kind for problem in caught.value.problems}


def test_what_cannot_be_a_source_is_refused() -> None:
    plain = named_layout("plain")
    table = part(stored(plain, {"tok_embedding": (BF16, (100, 64))}))
    assert refused([(".", table)]) == {"nothing-to-quantize"}
    whole = part(stored(plain, tree()))
    assert refused([("a", whole), ("b", whole)]) == {"part-named-twice"}


@given(st.text(max_size=40))
def test_every_text_gives_a_name(text: str) -> None:
    TypeAdapter(Name).validate_python(f"{slug(text)}-int8-w8a8")


# -- provenance -----------------------------------------------------------------------------------


def test_the_recipe_in_the_metadata_is_read_back() -> None:
    recipe, parts = draft(two_branches())
    planned = make_plan(recipe, parts)
    metadata = recipe_metadata(recipe, planned.recipe_sha256)
    assert embedded_recipe(metadata, "f") == recipe
    assert embedded_recipe({"format": "pt"}, "f") is None
    assert target_files(recipe) == {
        "transformer": "transformer/transformer-int8-w8a8.safetensors",
        "unconditional": "unconditional/unconditional-int8-w8a8.safetensors",
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"recipe": {}, "recipe_sha256": 1}', "[" * 100_000]
)
def test_other_metadata_under_the_key_is_a_problem(text: str) -> None:
    with pytest.raises(InvalidInput):
        embedded_recipe({"quantrecipe": text}, "f")


def test_an_edited_recipe_in_the_metadata_is_a_problem() -> None:
    recipe, _ = draft(two_branches())
    metadata = recipe_metadata(recipe, "0" * 64)
    with pytest.raises(InvalidInput, match="digest"):
        embedded_recipe(metadata, "f")
