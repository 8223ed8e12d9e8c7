"""Recognising layouts, summing up parts, and drafting recipes, all from headers in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from quantrecipe.schema.base import Name
from quantrecipe.schema.config_claims import claimed_formats, config_problems, model_type
from quantrecipe.schema.drafting import DraftSource, draft_recipe, slug
from quantrecipe.schema.dtypes import byte_size
from quantrecipe.schema.factors import factors
from quantrecipe.schema.foreign_layouts import foreign_problems, sight
from quantrecipe.schema.inspection import formats_used, report_reading
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.layout_writing import module_tensors, other_name
from quantrecipe.schema.planning import make_plan, recipe_metadata
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.provenance import embedded_recipe, target_files
from quantrecipe.schema.quantization_config import ConfiguredModule, quantization_config
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.recognition import (
    Verdict,
    part_names,
    recognise,
    recognise_together,
)
from quantrecipe.schema.registry import layout_names, named_layout
from quantrecipe.schema.schemes import (
    AnyWeight,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    GgmlRecords,
    Int4Group,
    Int8Channel,
    Int8Group,
    Int8Tensor,
    Nf4,
    NvFp4,
    PlainWeight,
)
from quantrecipe.schema.suspicions import idle_markers, stray_scales, torchao_problems
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo, SourcePart, TensorInfo

LAYOUTS = [named_layout(n) for n in ("fp8-scaled", "int8-scaled", "plain", "transformerlab")]
Spec = tuple[str, tuple[int, ...]]

BF16 = PlainWeight(format="bfloat16")
INT8 = Int8Channel(format="int8", granularity="channel")
FP8 = Float8Channel(format="float8_e4m3fn", granularity="channel")
INT4 = Int4Group(format="int4", granularity="group", group_size=32)
NF4 = Nf4(format="nf4", granularity="block", block_size=64)
NVFP4 = NvFp4(format="nvfp4", granularity="group")
Q8 = GgmlRecords(format="q8_0", granularity="block")


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


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        (None, "int8-scaled"),
        ("int8", "vllm-omni"),
        ("compressed-tensors", "compressed-tensors"),
        ("torchao", "int8-scaled"),
    ],
)
def test_where_layouts_explain_the_same_the_config_decides(method: str | None, layout: str) -> None:
    every = [named_layout(name) for name in layout_names()]
    modules = {name: each for name, each in tree(weight=INT8).items() if name.startswith("layers")}
    tensors = stored(named_layout("vllm-omni"), modules)
    verdict = recognise([part(tensors)], every, method=method)
    alike = {"int8-scaled", "vllm-omni", "compressed-tensors", "quantrecipe"} - {layout}
    assert (verdict.best.layout.name, set(verdict.alike)) == (layout, alike)
    assert (verdict.fits, verdict.rivals) == (True, ())
    (reading,) = recognise_together([[part(tensors)]], every, methods=[method])
    assert reading.layout.name == layout


@pytest.mark.parametrize("prefixes", [("cond.", "uncond."), ("",)])
def test_parts_of_a_gguf_file_are_branches_of_one_network(prefixes: tuple[str, ...]) -> None:
    every = [named_layout(name) for name in layout_names()]
    modules = {name: each for name, each in tree(weight=Q8).items() if name.startswith("layers")}
    tensors = {
        f"{prefix}{name}": spec
        for prefix in prefixes
        for name, spec in stored(named_layout("gguf-one-part"), modules).items()
    }
    verdict = only(tensors, every)
    assert verdict.fits
    assert verdict.best.layout.name == ("gguf" if len(prefixes) > 1 else "gguf-one-part")
    assert len(verdict.best.parts) == len(prefixes)


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


def test_factors_are_the_scales() -> None:
    assert {name for _, name in factors(only(FP8_TENSORS).best.modules())} == {
        name for name in FP8_TENSORS if name.endswith("weight_scale")
    }


def test_a_norm_may_have_a_scale() -> None:
    """What SDNQ calls its scales is what others call those of a norm."""
    tensors = stored(named_layout("plain"), tree()) | {"norm_q.scale": ("bfloat16", (64,))}
    every = [named_layout(name) for name in layout_names()]
    assert not list(stray_scales(only(tensors).best, every))
    sdnq = stored(named_layout("sdnq"), tree(weight=INT8)) | {"norm_q.scale": ("bfloat16", (64,))}
    verdict = only(sdnq, every)
    assert (verdict.fits, verdict.best.layout.name) == (True, "sdnq")
    left: dict[str, Spec] = {"layers.0.o.scale": ("float32", (64, 1))}
    found = stray_scales(only(tensors | left).best, every)
    assert [problem.tensor for problem in found] == ["layers.0.o.scale"]


TORCHAO = stored(named_layout("torchao"), tree(1, INT8))
NAMES = {name.replace("._weight_qdata", ".weight") for name in TORCHAO if "_scale" not in name}
INT8_TENSOR = {"_type": "Int8Tensor", "_tensor_data_names": ["qdata", "scale", "zero_point"]}


def torchao(*, leave_out: str = "", say: Mapping[str, object] | None = None) -> list[str]:
    """What is wrong with torchao's metadata."""
    said: dict[str, object] = {
        name: INT8_TENSOR if name.startswith("layers") and name.endswith("weight") else {}
        for name in NAMES
        if "zero_point" not in name
    }
    said |= say or {}
    entries = {name: json.dumps(value) for name, value in said.items()}
    entries["tensor_names"] = json.dumps(sorted(said))
    tensors = {name: spec for name, spec in TORCHAO.items() if name != leave_out}
    whole = part(tensors)
    file = replace(whole.files[0], metadata=entries)
    verdict = recognise([replace(whole, files=(file,))], [named_layout("torchao")])
    return [problem.tensor or "" for problem in torchao_problems(verdict.best)]


def test_metadata_of_torchao_are_held_against_the_tensors() -> None:
    assert torchao() == []
    assert torchao(leave_out="norm.weight") == ["norm.weight"]
    assert torchao(say={"layers.0.o.weight": {"_type": "Tensor"}}) == ["layers.0.o.weight"]
    assert torchao(say={"layers.0.o.weight": []}) == [
        "layers.0.o.weight",
        "layers.0.o._weight_qdata",
    ]


# -- layouts that are not read --------------------------------------------------------------------

W8: Spec = ("int8", (8, 8))
U8: Spec = ("uint8", (8, 4))
F: Spec = ("float32", (8,))
S: Spec = ("float32", ())
NVFP4_METHOD = {"quant_method": "modelopt"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "config", "name"),
    [
        ({"a.weight": U8, "a.w.quant_state.bitsandbytes__fp4": U8}, {}, {}, "bitsandbytes-fp4"),
        (
            {"a._weight_qdata": W8, "a._weight_scale": F},
            {"a.weight": '{"_type": "AffineQuantizedTensor"}'},
            {},
            "torchao-other",
        ),
        ({"a.weight._data": W8, "a.weight._scale": F}, {}, {}, "quanto"),
        ({"a.weight": W8, "a.weight_scale_inv": F}, {}, {}, "fp8-block-inverse"),
        ({"a.weight": U8, "a.weight_scale_2": S}, {}, {}, "nvfp4"),
        ({"a.weight_scale_2": S, "a.pre_quant_scale": F}, {}, {}, "pre-quant-scale"),
        ({"a.qweight": W8, "a.qzeros": U8}, {}, {}, "gptq"),
        ({"a.qweight": W8, "a.wscales": F}, {}, {}, "nunchaku"),
        ({"a.weight_packed": U8, "a.weight_g_idx": F}, {}, {}, "compressed-tensors-actorder"),
        ({"a.compressed": U8, "a.bitmask": U8}, {}, {}, "compressed-tensors-sparse"),
        (
            {"a.weight": W8, "a.weight_scale": F},
            {},
            {"quant_method": "compressed-tensors", "transform_config": {"R1": {}}},
            "compressed-tensors-transforms",
        ),
        ({"a.weight": W8, "a.weight_zero_point": W8}, {}, {}, "compressed-tensors-asymmetric"),
        ({"a.weight": W8, "a.scale": F, "a.svd_up": F}, {}, {}, "sdnq-other"),
        ({"a.weight": W8, "a.scale": ("float32", (1, 8))}, {}, {}, "sdnq-other"),
        ({"a.weight": U8, "a.scale": F, "a.zero_point": F}, {}, {}, "sdnq-other"),
        ({"a.weight": W8}, {}, {"quant_method": "sdnq", "use_hadamard": True}, "sdnq-other"),
    ],
)  # fmt: skip
def test_foreign_layouts_are_known_by_sight(
    tensors: dict[str, Spec], metadata: dict[str, str], config: dict[str, Any], name: str
) -> None:
    found = sight(part(tensors).tensors, metadata, config)
    assert found is not None
    assert (found.layout.name, found.by_config) == (name, False)


@pytest.mark.parametrize(
    ("method", "name"),
    [("quanto", "quanto"), ("fp8", "fp8-block-inverse"), ("awq", "gptq"), ("modelopt", "nvfp4")],
)
def test_what_a_config_says_alone_is_no_proof(method: str, name: str) -> None:
    found = sight(part({"a.weight": W8}).tensors, {}, {"quant_method": method})
    assert found is not None
    assert (found.layout.name, found.by_config) == (name, True)


def test_a_format_of_comfyui_that_is_not_read_is_named() -> None:
    marked = part({"a.weight": W8, "a.comfy_quant": ("uint8", (26,))}).tensors
    marker = replace(marked["a.comfy_quant"], content=b'{"format": "convrot_w4a4"}')
    found = sight(dict(marked) | {"a.comfy_quant": marker}, {}, None)
    assert found is not None
    assert (found.layout.name, "convrot_w4a4" in found.evidence) == ("comfyui-other", True)


@pytest.mark.parametrize("name", layout_names())
def test_layouts_that_are_read_are_not_foreign(name: str) -> None:
    layout = named_layout(name)
    weight = next(
        weight
        for weight in (INT8, FP8, NF4, BF16, Q8)
        if weight.format in layout.holds or weight == BF16
    )
    marks = {"_quantization_metadata": "{}"} if name == "comfyui" else {}
    tensors = stored(layout, tree(weight=weight))
    assert sight(part(tensors).tensors, {"format": "pt", **marks}, None) is None
    assert sight(part(tensors).tensors, marks, {"quant_method": "never heard of"}) is None


@pytest.mark.parametrize(
    ("tensors", "config", "kinds"),
    [
        ({"a.weight._data": W8, "a.weight._scale": F}, None, []),
        ({"a.weight._data": W8}, None, ["missing-companion"]),
        ({"a.qweight": W8, "a.qzeros": U8}, None, ["missing-companion"]),
        ({"a.weight_scale_2": S}, NVFP4_METHOD, ["missing-companion"]),
        ({"a.weight": U8, "a.weight_scale": F, "a.weight_scale_2": S}, NVFP4_METHOD, []),
        ({"a.weight": U8, "a.weight_scale": F, "a.weight_scale_2": S}, None, ["missing-marker"]),
    ],
    ids=["fine", "quanto alone", "gptq alone", "a scale alone", "modelopt", "nvfp4 unmarked"],
)
def test_of_foreign_layouts_what_is_missing_is_named(
    tensors: dict[str, Spec], config: dict[str, Any] | None, kinds: list[str]
) -> None:
    found = part(tensors).tensors
    sighting = sight(found, {}, config)
    assert sighting is not None
    assert [p.kind for p in foreign_problems(sighting, found, config)] == kinds


# -- config.json ----------------------------------------------------------------------------------

NF4_METHOD = {"quant_method": "bitsandbytes", "load_in_4bit": True}
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
    files = part(stored(layout, tree(weight=weight)))
    modules = {each.name: each for each in recognise([files], [layout]).best.modules()}
    found = list(config_problems(config, files.tensors, modules, "config.json"))
    assert [problem.kind for problem in found] == ["config-contradicts"] * wrong
    unread = list(config_problems(config, files.tensors, {}, "config.json"))
    if "ignored_layers" not in config:
        assert len(unread) == len(found)


def groups(size: int, *, targets: Sequence[str] = ("Linear",)) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": size}
    group = {"targets": list(targets), "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("weight", "config", "wrong"),
    [
        (INT4, groups(32), None),
        (INT4, groups(64), "groups of 64"),
        (INT4, groups(32, targets=["layers.0.o", "layers.0.qkv", "re:.*"]), None),
        (INT4, groups(32, targets=["layers.7.o"]), "layers.7.o is quantized"),
        (INT4, {**groups(32), "ignore": ["layers.0"]}, "layers.0.o, layers.0.qkv stayed"),
        (INT4, {"quant_method": "int8"}, "says int8"),
        (NF4, {**NF4_METHOD, "bnb_4bit_use_double_quant": False}, None),
        (NF4, {**NF4_METHOD, "bnb_4bit_use_double_quant": True}, "one level"),
        (NF4, {**NF4_METHOD, "bnb_4bit_quant_type": "fp4"}, "says fp4"),
        (NF4, {**NF4_METHOD, "llm_int8_skip_modules": ["proj_out"]}, None),
        (NF4, {**NF4_METHOD, "llm_int8_skip_modules": ["layers.0.o"]}, "layers.0.o stayed"),
        (NF4, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "says llm_int8"),
    ],
)
def test_a_config_is_held_against_what_was_read(
    weight: AnyWeight, config: dict[str, Any], wrong: str | None
) -> None:
    layout = named_layout("bitsandbytes" if weight == NF4 else "compressed-tensors")
    specs = stored(layout, tree(1, weight))
    modules = {
        name: StoredModule(name, *shape, each, {})
        for name, (each, shape) in tree(1, weight).items()
    }
    found = list(config_problems(config, part(specs).tensors, modules, "config.json"))
    assert ([wrong] if wrong else []) == [
        wrong for each in found if wrong and wrong in each.message
    ]
    assert len(found) == (wrong is not None)


def test_its_own_config_is_held_against_what_was_read() -> None:
    modules = {
        name: StoredModule(name, *shape, each, {}) for name, (each, shape) in tree(1, INT8).items()
    }
    said = quantization_config(
        [ConfiguredModule(m.name, "w8", m.weight, None, False) for m in modules.values()]
    )
    assert said is not None
    tensors = part(INT8_TENSORS).tensors
    assert not list(config_problems(said, tensors, modules, "config.json"))
    plain = {**modules, "layers.0.o": replace(modules["layers.0.o"], weight=BF16)}
    (problem,) = config_problems(said, tensors, plain, "config.json")
    assert "layers.0.o is quantized, and there are no codes" in problem.message
    more = {**modules, "x": replace(modules["layers.0.o"], name="x")}
    (problem,) = config_problems(said, tensors, more, "config.json")
    assert "x stayed unquantized" in problem.message
    other = {**modules, "layers.0.o": replace(modules["layers.0.o"], weight=FP8)}
    (problem,) = config_problems(said, tensors, other, "config.json")
    assert "layers.0.o is in another format" in problem.message
    (problem,) = config_problems({**said, "version": 7}, tensors, modules, "config.json")
    assert (problem.kind, problem.file) == ("newer-version", "config.json")


def test_claims_and_model_types() -> None:
    assert "int4" in (claimed_formats({"quant_method": "gptq", "bits": 4}) or ())
    assert claimed_formats({}) is None
    assert claimed_formats({"quant_method": "torchao", "quant_type": {"default": {}}}) is None
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


@pytest.mark.parametrize(
    ("name", "weight", "method", "kept"),
    [
        ("plain", BF16, None, False),
        ("int8-scaled", INT8, None, False),
        ("fp8-scaled", FP8, None, False),
        ("vllm-omni", INT8, "int8", False),
        ("sdnq", INT8, "sdnq", False),
        ("torchao", INT8, "torchao", False),
        ("compressed-tensors", INT8, "compressed-tensors", False),
        ("compressed-tensors", INT4, None, True),
        ("quantrecipe", INT8, "quantrecipe", False),
        ("quantrecipe", INT4, None, True),
        ("quantrecipe", NF4, None, True),
        ("quantrecipe", NVFP4, None, True),
        ("gguf-one-part", Q8, None, False),
        ("gguf", Q8, None, False),
        ("transformerlab", INT8, None, False),
    ],
)
def test_a_draft_has_the_layout_that_was_found(
    name: str, weight: AnyWeight, method: str | None, kept: bool
) -> None:
    layout = named_layout(name)
    branches = ["a", "b"] if "{part}" in layout.others.name else ["model"]
    tensors: dict[str, Spec] = {}
    for branch in branches:
        tensors |= stored(layout, tree(weight=weight), branch)
    every = [named_layout(each) for each in layout_names()]
    (reading,) = recognise_together([[part(tensors)]], every, methods=[method])
    recipe, _ = draft_recipe([DraftSource(".", reading)], "x")
    assert (recipe.source.layout, [*recipe.source.parts]) == (name, branches)
    planned = make_plan(recipe, reading.parts)
    fates = [module.disposition for module in planned.modules]
    assert fates.count("quantized") == 6 * len(branches)
    assert (recipe.target.layout == "quantrecipe") == kept
    assert all(m.carried for m in planned.modules if kept and m.disposition == "quantized")


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
