"""``inspect``: what it says, what it finds wrong, and the recipes that it drafts."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from quantrecipe.checkpoint import open_parts
from quantrecipe.cli.inspect import inspect
from quantrecipe.formats import nf4
from quantrecipe.schema.dtypes import byte_size
from quantrecipe.schema.gguf import plan_gguf_file
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.planning import make_plan, recipe_metadata
from quantrecipe.schema.problems import InvalidInput, OutputError
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.tensors import OutputTensor
from quantrecipe.schema.validation import load_recipe

ROOT = Path(__file__).resolve().parents[2]
Spec = tuple[str, tuple[int, ...]]
Tensors = Mapping[str, Spec]


def payload(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Numbers that are fine as scales, whatever they are."""
    size = byte_size(dtype, shape)
    return struct.pack("<f", 0.5) * (size // 4) if dtype == "float32" else b"\x3c" * size


def write(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    values: Mapping[str, bytes] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = file_order(OutputTensor(name, *spec) for name, spec in tensors.items())
    body = [(values or {}).get(t.name, payload(t.dtype, t.shape)) for t in ordered]
    path.write_bytes(encode_header(ordered, metadata or {}) + b"".join(body))


def dit(layers: int = 3, *, fp8: bool = True) -> dict[str, Spec]:
    """A small diffusion transformer in the layout of an fp8 base, or in bfloat16."""
    found: dict[str, Spec] = {}

    def linear(name: str, out: int, features: int) -> None:
        found[f"{name}.weight"] = ("float8_e4m3fn" if fp8 else "bfloat16", (out, features))
        if fp8:
            found[f"{name}.weight_scale"] = ("float32", (out,))

    for layer in range(layers):
        linear(f"layers.{layer}.attention.qkv", 192, 64)
        linear(f"layers.{layer}.attention.o", 64, 64)
        linear(f"layers.{layer}.adaln_modulation", 256, 64)
        found[f"layers.{layer}.norm.weight"] = ("bfloat16", (64,))
    found["token_embedding.weight"] = ("bfloat16", (40, 64))
    return found


def shard(folder: Path, tensors: Tensors) -> list[str]:
    names = list(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        write(folder / file, {name: tensors[name] for name in half})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def call(*arguments: object) -> Result:
    """The command, with its errors as the group would see them."""
    return CliRunner().invoke(inspect, [str(a) for a in arguments], catch_exceptions=False)


def facts(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(inspect, [*(str(a) for a in arguments), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if found["problems"] else 0)
    return found


def kinds(found: Mapping[str, Any]) -> set[str]:
    return {problem["kind"] for problem in found["problems"]}


# -- what it is -----------------------------------------------------------------------------------


def test_an_fp8_checkpoint_in_words(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", dit(), {"format": "pt", "long": "z" * 500})
    result = call(tmp_path / "x.safetensors")
    assert result.exit_code == 0
    out = result.stdout
    assert re.search(r"layout +fp8-scaled: explains its 9 quantized modules", out)
    assert re.search(
        r"layers\.\{0\.\.2\}\.attention\.qkv +\[192, 64\] +float8_e4m3fn channel +- +x3 +39\.2 KB",
        out,
    )
    assert re.search(r"layers\.\{0\.\.2\}\.norm\.weight +\[64\] +bfloat16 +x3 +384 B", out)
    assert re.search(r"float8_e4m3fn +channel +float32 +9 +98\.3 K +104 KB", out)
    assert "metadata    format: pt" in out
    assert "(500 characters)" in out
    assert "z" * 100 not in out
    assert out.endswith("Nothing looks wrong.\n")


def test_the_same_facts_as_json(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", dit(), {"format": "pt"})
    (tmp_path / "config.json").write_text('{"_class_name": "SomeDiT"}')
    found = facts(tmp_path)
    (part,) = found["parts"]
    assert (part["name"], part["location"], part["layout"]) == ("model", ".", "fp8-scaled")
    assert found["totals"]["modules"] == 10
    assert found["totals"]["quantized"] == 9
    assert found["totals"]["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    assert found["files"][0]["metadata"] == {"format": "pt"}
    assert found["sidecars"] == {"config.json": "SomeDiT"}
    qkv = next(g for g in part["modules"] if g["pattern"] == "layers.{0..2}.attention.qkv")
    assert qkv["count"] == 3
    assert qkv["nbytes"] == 3 * (192 * 64 + 4 * 192)
    assert part["tensors"] == len(dit())


def test_every_key_of_the_json_is_documented(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", BROKEN["missing-scale"], {"format": "pt"})
    page = (ROOT / "docs" / "cli.md").read_text()
    told = page[page.index("`--json` prints one object") : page.index("## verify")]

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if not isinstance(value, dict):
            return set()
        inner = (keys(v) for k, v in value.items() if k not in ("metadata", "sidecars"))
        return set(value).union(*inner)

    assert {key for key in keys(facts(tmp_path)) if f"`{key}`" not in told} == set()


def test_a_pipeline_has_a_part_for_each_folder(tmp_path: Path) -> None:
    for name in ("transformer", "unconditional_transformer"):
        write(tmp_path / name / "diffusion_pytorch_model.safetensors", dit())
    write(tmp_path / "vae" / "model.safetensors", {"conv.weight": ("bfloat16", (4, 4, 3, 3))})
    found = facts(tmp_path)
    assert {p["name"]: p["layout"] for p in found["parts"]} == {
        "transformer": "fp8-scaled",
        "unconditional_transformer": "fp8-scaled",
        "vae": "plain",
    }
    assert "parts transformer, unconditional_transformer: " in call(tmp_path).stdout


def test_parts_in_one_file_are_found_in_the_names(tmp_path: Path) -> None:
    tensors: dict[str, Spec] = {}
    for branch in ("conditional", "unconditional"):
        tensors[f"{branch}.a.0.wq"] = ("int8", (32, 16))
        tensors[f"{branch}.a.0.ws"] = ("float32", (32,))
        tensors[f"{branch}.a.0.smooth"] = ("float32", (16,))
        tensors[f"{branch}.w2.weight"] = ("bfloat16", (32, 16))
    write(tmp_path / "x.safetensors", tensors)
    found = facts(tmp_path)
    assert [p["name"] for p in found["parts"]] == ["conditional", "unconditional"]
    assert {p["layout"] for p in found["parts"]} == {"transformerlab"}
    assert found["parts"][0]["modules"][0]["roles"] == ["weight", "weight_scale", "smoothing"]


def test_a_layout_and_parts_may_be_given(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", dit())
    write(tmp_path / "b.safetensors", dit())
    parts = ("--part", "one=a.safetensors", "--part", "two=b.safetensors")
    found = facts(tmp_path, "--layout", "fp8-scaled", *parts)
    assert [(p["name"], p["location"]) for p in found["parts"]] == [
        ("one", "a.safetensors"),
        ("two", "b.safetensors"),
    ]
    assert "as --layout says" in found["parts"][0]["reason"]
    assert kinds(facts(tmp_path, "--layout", "plain", *parts)) == {"unscaled"}
    assert kinds(facts(tmp_path, "--part", "x=*.safetensors")) == {"duplicate-tensor"}


# -- what looks wrong -----------------------------------------------------------------------------

QKV, SCALE = "layers.1.attention.qkv.weight", "layers.1.attention.qkv.weight_scale"
BROKEN: dict[str, dict[str, Spec]] = {
    "missing-scale": {k: v for k, v in dit().items() if k != SCALE},
    "orphan-scale": dit(fp8=False) | {SCALE: ("float32", (192,))},
    "misshaped-scale": dit() | {SCALE: ("float32", (193,))},
    "mistyped-scale": dit() | {SCALE: ("int8", (192,))},
    "idle-marker": dit(fp8=False) | {"scaled_fp8": ("float8_e4m3fn", (2,))},
    "unexplained-weight": {"a.weight": ("uint8", (8, 8))},
}


def q(
    weight: Spec,
    scale: Spec | None,
    *,
    ending: str = "weight_scale",
    name: str = "a",
    **more: Spec,
) -> dict[str, Spec]:
    """The tensors of one module."""
    found: dict[str, Spec] = {f"{name}.weight": weight}
    if scale is not None:
        found[f"{name}.{ending}"] = scale
    return found | {f"{name}.{key}": spec for key, spec in more.items()}


I8: Spec = ("int8", (64, 64))
COLUMN: Spec = ("float32", (64, 1))
INT8_MARKER = b'{"format": "int8_tensorwise"}'
ONE = q(I8, COLUMN, comfy_quant=("uint8", (29,)))
TWO = ONE | q(I8, COLUMN, name="b", comfy_quant=("uint8", (29,)))
LISTED = {"_quantization_metadata": json.dumps({"layers": {"b": {"format": "int8_tensorwise"}}})}
BIN = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}'
NF4: dict[str, Spec] = {
    "a.weight": ("uint8", (2048, 1)),
    "a.weight.absmax": ("float32", (64,)),
    "a.weight.quant_map": ("float32", (16,)),
    "a.weight.quant_state.bitsandbytes__nf4": ("uint8", (len(BIN),)),
}
STATE = "a.weight.quant_state.bitsandbytes__nf4"
LEVELS = struct.pack("<16f", *nf4.LEVELS)
NF4_VALUES = {STATE: BIN, "a.weight.quant_map": LEVELS}


def without(tensors: Tensors, *names: str) -> dict[str, Spec]:
    return {name: spec for name, spec in tensors.items() if name not in names}


Case = tuple[Tensors, dict[str, bytes], dict[str, str], str, str, str]
FOREIGN_FAULTS: dict[str, Case] = {
    "a scale of one dimension": (
        ONE | {"a.weight_scale": ("float32", (64,))},
        {"a.comfy_quant": INT8_MARKER},
        {},
        "misshaped-scale",
        "a.weight_scale",
        "on a square weight",
    ),
    "a marker alone": (
        {"a.comfy_quant": ("uint8", (29,))},
        {"a.comfy_quant": INT8_MARKER},
        {},
        "idle-marker",
        "a.comfy_quant",
        "has no weight here",
    ),
    "a marker on plain numbers": (
        {"a.weight": ("bfloat16", (64, 64)), "a.comfy_quant": ("uint8", (29,))},
        {"a.comfy_quant": INT8_MARKER},
        {},
        "idle-marker",
        "a.comfy_quant",
        "is stored as plain numbers",
    ),
    "one of two without a marker": (
        without(TWO, "b.comfy_quant"),
        {"a.comfy_quant": INT8_MARKER},
        {},
        "missing-marker",
        "b.weight",
        "takes it for plain and drops its scales",
    ),
    "metadata of what is not there": (
        ONE,
        {"a.comfy_quant": INT8_MARKER},
        LISTED,
        "metadata-differs",
        "b",
        "is not there",
    ),
    "metadata that differ from the marker": (
        TWO,
        {"a.comfy_quant": INT8_MARKER, "b.comfy_quant": b'{"format": "float8_e4m3fn"}  '},
        LISTED,
        "wrong-marker",
        "b.comfy_quant",
        "the metadata of the file",
    ),
    "a marker for another format": (
        ONE | {"a.comfy_quant": ("uint8", (27,))},
        {"a.comfy_quant": b'{"format": "float8_e4m3fn"}'},
        {},
        "wrong-marker",
        "a.comfy_quant",
        "'format' is not 'int8_tensorwise'",
    ),
    "a quant_state of another shape": (
        NF4 | {STATE: ("uint8", (len(BIN),))},
        NF4_VALUES | {STATE: BIN.replace(b"[64, 64]", b"[64, 32]")},
        {},
        "misshaped-weight",
        "a.weight",
        "its shape is [64, 32]",
    ),
    "a quant_map of another format": (
        NF4,
        NF4_VALUES | {"a.weight.quant_map": struct.pack("<16f", *range(16))},
        {},
        "wrong-map",
        "a.weight.quant_map",
        "where -1.0 is expected",
    ),
    "no quant_map": (
        without(NF4, "a.weight.quant_map"),
        {STATE: BIN},
        {},
        "missing-code-map",
        "a.weight",
        "asks for",
    ),
    "nested scales without an offset": (
        NF4
        | {
            "a.weight.absmax": ("uint8", (64,)),
            "a.weight.nested_absmax": ("float32", (1,)),
        },
        NF4_VALUES,
        {},
        "missing-scale-offset",
        "a.weight.absmax",
        "nothing says the mean",
    ),
    "LLM.int8() of tiles": (
        q(I8, ("float32", (64,)), ending="SCB", weight_format=("uint8", ())),
        {"a.weight_format": b"\x01"},
        {},
        "wrong-constant",
        "a.weight_format",
        "has 1 at [0]",
    ),
    "eight bits packed as four": (
        {
            "a.weight_packed": ("int32", (64, 16)),
            "a.weight_scale": ("bfloat16", (64, 1)),
            "a.weight_shape": ("int64", (2,)),
        },
        {"a.weight_shape": struct.pack("<2q", 64, 64)},
        {},
        "wrong-shape",
        "a.weight_shape",
        "a weight [64, 128]",
    ),
    "torchao without metadata": (
        {
            "a._weight_qdata": I8,
            "a._weight_scale": COLUMN,
            "a._weight_zero_point": ("int8", (64, 1)),
        },
        {"a._weight_zero_point": bytes(64)},
        {},
        "metadata-differs",
        "a._weight_qdata",
        "the metadata say nothing of it",
    ),
    "nvfp4 without marker or metadata": (
        {
            "a.weight": ("uint8", (64, 32)),
            "a.weight_scale": ("float8_e4m3fn", (128, 4)),
            "a.weight_scale_2": ("float32", ()),
        },
        {},
        {},
        "missing-marker",
        "a.weight",
        "neither a marker",
    ),
    "a level of scales left behind": (
        {"a.weight": ("bfloat16", (64, 64)), "a.weight_scale_2": ("float32", ())},
        {},
        {"_quantization_metadata": "{}"},
        "bad-metadata",
        "",
        "has no object 'layers'",
    ),
}


@pytest.mark.parametrize("name", FOREIGN_FAULTS)
def test_what_is_wrong_in_layouts_of_others(tmp_path: Path, name: str) -> None:
    tensors, values, metadata, kind, tensor, message = FOREIGN_FAULTS[name]
    write(tmp_path / "x.safetensors", tensors, metadata, values)
    found = facts(tmp_path)
    assert kind in kinds(found), found["problems"]
    problem = next(each for each in found["problems"] if each["kind"] == kind)
    assert problem.get("tensor", "") == tensor
    assert message in problem["message"] or message in problem["hint"]


SCALES: dict[str, tuple[Tensors, dict[str, bytes], dict[str, bytes], str]] = {
    "e4m3": (
        q(
            ("uint8", (64, 32)),
            ("float8_e4m3fn", (128, 4)),
            weight_scale_2=("float32", ()),
            comfy_quant=("uint8", (19,)),
        ),
        {"a.comfy_quant": b'{"format": "nvfp4"}'},
        {
            "nan-scale": bytes([0x38] * 511 + [0x7F]),
            "negative-scale": bytes([0x38] * 511 + [0xB8]),
            "": bytes([0x38] * 510 + [0x00, 0x01]),
        },
        "a.weight_scale",
    ),
    "second level": (
        q(
            ("uint8", (64, 32)),
            ("float8_e4m3fn", (128, 4)),
            weight_scale_2=("float32", ()),
            comfy_quant=("uint8", (19,)),
        ),
        {"a.comfy_quant": b'{"format": "nvfp4"}'},
        {
            "nan-scale": struct.pack("<f", float("nan")),
            "zero-scale": struct.pack("<f", 0),
            "negative-scale": struct.pack("<f", -1),
            "denormal-scale": struct.pack("<f", 1e-40),
        },
        "a.weight_scale_2",
    ),
    "exponents": (
        q(("float8_e4m3fn", (64, 64)), ("uint8", (64, 2))),
        {},
        {
            "nan-scale": bytes([127] * 127 + [255]),
            "zero-scale": bytes([127] * 127 + [0]),
            "": b"\1" * 128,
        },
        "a.weight_scale",
    ),
    "bfloat16": (
        q(I8, ("bfloat16", (64, 1))),
        {},
        {"nan-scale": b"\xc0\x7f" * 64, "infinite-scale": b"\x80\x7f" * 64, "": b"\x80\x3f" * 64},
        "a.weight_scale",
    ),
    "zeros over zeros": (
        q(I8, COLUMN),
        {"a.weight": bytes(64) + b"\x01" * 63 * 64},
        {"": bytes(4) + struct.pack("<63f", *[1] * 63), "zero-scale": bytes(8) + b"\0\0\x80?" * 62},
        "a.weight_scale",
    ),
    "zeros over zeros in groups": (
        q(I8, ("float32", (64, 2))),
        {"a.weight": (bytes(32) + b"\x01" * 32) * 64},
        {"": (bytes(4) + b"\0\0\x80?") * 64, "zero-scale": (b"\0\0\x80?" + bytes(4)) * 64},
        "a.weight_scale",
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_every_dtype_are_looked_at(tmp_path: Path, name: str) -> None:
    tensors, values, faults, tensor = SCALES[name]
    for kind, payload_bytes in faults.items():
        write(tmp_path / "x.safetensors", tensors, values=values | {tensor: payload_bytes})
        found = facts(tmp_path)
        assert kinds(found) == ({kind} if kind else set()), kind
        assert {problem["tensor"] for problem in found["problems"]} <= {tensor}


@pytest.mark.parametrize(
    ("name", "place", "numbers", "size"),
    [("q8_0", 0, 32, 34), ("q4_0", 0, 32, 18), ("q4_k", 2, 256, 144), ("q6_k", 208, 256, 210)],
)
def test_scales_inside_records_are_looked_at(
    tmp_path: Path, name: str, place: int, numbers: int, size: int
) -> None:
    tensor = OutputTensor("a.weight", name, (5, numbers * 2))
    plan = plan_gguf_file("x.gguf", [tensor], {"general.architecture": "x"})
    for bits, kind in ((0x7E00, "nan-scale"), (0xFC00, "infinite-scale"), (0x8000, None)):
        records = bytearray(size * 10)
        struct.pack_into("<H", records, 7 * size + place, bits)
        body = bytes(records).ljust(plan.size - len(plan.header), b"\0")
        (tmp_path / "x.gguf").write_bytes(plan.header + body)
        found = facts(tmp_path / "x.gguf")
        assert kinds(found) == ({kind} if kind else set())
        if kind:
            assert f"row 3, columns from {numbers} on" in found["problems"][0]["message"]


def test_a_weight_that_had_fewer_levels_before_is_noted(tmp_path: Path) -> None:
    """16 levels a run of 64, scaled anew by rows: as nf4 or int4 made int8 is."""
    random = np.random.default_rng(0)
    levels = np.array(nf4.LEVELS, np.float32)
    coarse = levels[random.integers(0, 16, (64, 4, 64))] * random.uniform(0.5, 1, (64, 4, 1))
    rows = coarse.reshape(64, 256).astype(np.float32)
    codes = np.rint(rows / abs(rows).max(1, keepdims=True) * 127).astype(np.int8)
    fine = np.rint(random.normal(0, 40, (64, 256))).clip(-127, 127).astype(np.int8)
    scaled = q(("int8", (64, 256)), COLUMN)
    plain: Tensors = {"a.weight": ("float32", (64, 256))}
    for tensors, numbers, noted in (
        (scaled, codes, True),
        (scaled, fine, False),
        (plain, rows, True),
        (plain, random.normal(0, 1, (64, 256)).astype(np.float32), False),
        (plain, np.zeros((64, 256), np.float32), False),
    ):
        write(tmp_path / "x.safetensors", tensors, values={"a.weight": numbers.tobytes()})
        found = facts(tmp_path)
        assert any("quantized to 4 bits before" in note for note in found["notes"]) == noted
        assert found["problems"] == []


@pytest.mark.parametrize("kind", BROKEN)
def test_what_headers_show_to_be_wrong(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.safetensors", BROKEN[kind])
    assert kinds(facts(tmp_path)) == {kind}
    result = call(tmp_path)
    assert result.exit_code == 1
    assert re.search(rf"WHAT LOOKS WRONG \(1\)\n{kind}: .*x\.safetensors \[", result.stdout)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (float("nan"), "nan-scale"),
        (float("inf"), "infinite-scale"),
        (0.0, "zero-scale"),
        (-2.0, "negative-scale"),
        (1e-42, "denormal-scale"),
    ],
)
def test_what_the_values_of_scales_show_to_be_wrong(
    tmp_path: Path, value: float, kind: str
) -> None:
    scales = struct.pack("<192f", *[1.0] * 100, value, *[1.0] * 91)
    write(tmp_path / "x.safetensors", dit(), values={SCALE: scales})
    found = facts(tmp_path)
    assert [(p["kind"], p["tensor"]) for p in found["problems"]] == [(kind, SCALE)]
    assert "[100]" in found["problems"][0]["message"]


def test_a_missing_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    files = shard(tmp_path, dit())
    assert facts(tmp_path)["problems"] == []
    (tmp_path / files[1]).unlink()
    found = facts(tmp_path)
    assert "missing-shard" in kinds(found)
    assert found["totals"]["files"] == 1


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ('{"quantization_config": {"quant_method": "int8"}}', "config-contradicts"),
        ('{"quantization_config": {"quant_method": "fp8"}}', None),
        ("{", "bad-sidecar"),
        ("[]", "bad-sidecar"),
        ('{"model_type": "x"}', None),
    ],
    ids=["int8", "fp8", "torn", "list", "plain"],
)
def test_a_config_is_read_and_believed_only_if_it_is_true(
    tmp_path: Path, config: str, kind: str | None
) -> None:
    write(tmp_path / "x.safetensors", dit())
    (tmp_path / "config.json").write_text(config)
    assert kinds(facts(tmp_path)) == ({kind} if kind else set())


def test_long_lists_are_cut_unless_asked_for(tmp_path: Path) -> None:
    tensors = {k: v for k, v in dit(40).items() if not k.endswith("scale")}
    tensors |= {f"t{'abcdefgh'[i % 8]}{'ijklmnop'[i // 8]}": ("uint8", (i,)) for i in range(64)}
    write(tmp_path / "x.safetensors", tensors)
    short, long = call(tmp_path).stdout, call(tmp_path, "--all").stdout
    assert "more (--all shows them)" in short
    assert "--all" not in long
    assert long.count("missing-scale: ") == 120


# -- what is not read yet -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "config", "name"),
    [
        (
            {"a.weight._data": ("int8", (8, 8)), "a.weight._scale": ("float32", (8, 1))},
            None,
            "quanto",
        ),
        (
            {
                "a.weight": ("float8_e4m3fn", (128, 128)),
                "a.weight_scale_inv": ("float32", (1, 1)),
            },
            {"quant_method": "fp8"},
            "fp8-block-inverse",
        ),
        (
            {
                "a.weight": ("uint8", (64, 32)),
                "a.weight_scale": ("float8_e4m3fn", (64, 4)),
                "a.weight_scale_2": ("float32", ()),
            },
            {"quant_method": "modelopt"},
            "nvfp4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_foreign_layouts_are_named_and_not_called_broken(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any] | None, name: str
) -> None:
    write(tmp_path / "x.safetensors", tensors)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = facts(tmp_path)
    assert (found["parts"][0]["foreign"], found["problems"]) == (name, [])
    assert f"{name}, which is not read" in call(tmp_path).stdout
    with pytest.raises(InvalidInput, match="cannot read layout"):
        call(tmp_path, "--emit-recipe")


def test_int8_of_compressed_tensors_is_read_for_what_it_is(tmp_path: Path) -> None:
    tensors: Tensors = {"a.weight": ("int8", (8, 8)), "a.weight_scale": ("float32", (8, 1))}
    write(tmp_path / "x.safetensors", tensors)
    alone = facts(tmp_path)
    assert alone["parts"][0]["layout"] == "int8-scaled"
    assert "vllm-omni, compressed-tensors, quantrecipe would take it" in alone["notes"][0]
    assert "ComfyUI takes its codes for plain numbers" in alone["notes"][1]
    weights = {"num_bits": 8, "type": "int"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = facts(tmp_path)
    assert (found["parts"][0]["layout"], found["problems"]) == ("compressed-tensors", [])
    assert "config.json says so" in found["parts"][0]["reason"]
    assert found["notes"] == []


def test_a_config_whose_reader_wants_another_shape_contradicts(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", q(I8, ("float32", (64,))))
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "int8"}}')
    (problem,) = facts(tmp_path)["problems"]
    assert (problem["kind"], problem["pointer"]) == (
        "config-contradicts",
        "/quantization_config/quant_method",
    )
    assert "a.weight_scale" in problem["message"]
    assert "on a square weight" in problem["hint"]


@pytest.mark.parametrize(
    ("fused", "known"), [(True, "ideogram4-diffusers"), (False, "ideogram4-original")]
)
def test_known_names_of_modules_are_noted(tmp_path: Path, fused: bool, known: str) -> None:
    tensors = dit()
    if not fused:
        for layer in range(3):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                tensors[f"layers.{layer}.attention.{name}.weight"] = ("bfloat16", (64, 64))
        tensors = {name: spec for name, spec in tensors.items() if ".qkv." not in name}
        tensors = {name: spec for name, spec in tensors.items() if ".attention.o." not in name}
    write(tmp_path / "x.safetensors", tensors)
    found = facts(tmp_path)
    assert [known in note for note in found["notes"] if "target.names" in note] == [True]
    assert found["problems"] == []


def test_rotation_is_shown_whoever_says_it(tmp_path: Path) -> None:
    marker = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 64}'
    tensors = q(I8, COLUMN, comfy_quant=("uint8", (len(marker),)))
    write(tmp_path / "x.safetensors", tensors, values={"a.comfy_quant": marker})
    assert facts(tmp_path)["parts"][0]["modules"][0]["rotation"] == 64
    assert "int8 channel, rotated by 64" in call(tmp_path).stdout

    write(tmp_path / "y" / "x.safetensors", q(I8, COLUMN))
    scheme = {
        "weight": {"format": "int8", "granularity": "channel"},
        "rotation": {"kind": "hadamard", "size": 16},
    }
    config = {
        "quant_method": "quantrecipe",
        "version": 1,
        "schemes": {"w8": scheme},
        "modules": {"w8": {"names": ["a"], "smoothing": []}},
    }
    (tmp_path / "y" / "config.json").write_text(json.dumps({"quantization_config": config}))
    (part,) = facts(tmp_path / "y")["parts"]
    assert (part["layout"], part["modules"][0]["rotation"]) == ("quantrecipe", 16)


# -- drafting a recipe ----------------------------------------------------------------------------


def plain(root: Path) -> Path:
    write(root / "my model.safetensors", dit(fp8=False))
    return root / "my model.safetensors"


def fp8(root: Path) -> Path:
    write(root / "x" / "x.safetensors", dit())
    return root / "x"


def in_shards(root: Path) -> Path:
    shard(root / "s", dit(fp8=False))
    return root / "s"


def two_parts(root: Path) -> Path:
    for name in ("transformer", "unconditional_transformer"):
        write(root / "p" / name / "diffusion_pytorch_model.safetensors", dit())
    write(root / "p" / "vae" / "v.safetensors", {"conv.weight": ("bfloat16", (4, 4, 3, 3))})
    return root / "p"


SOURCES = [plain, fp8, in_shards, two_parts]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_drafted_recipe_plans_against_its_source(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)
    result = call(path, "--emit-recipe")
    assert result.exit_code == 0
    recipe = Recipe.model_validate_json(result.stdout)
    planned = make_plan(recipe, open_parts(path, recipe.source.parts))
    parts = len(recipe.source.parts)
    assert {m.disposition for m in planned.modules} == {"quantized", "protected"}
    assert recipe.rules[0].modules == ("layers.{0..2}.attention.o", "layers.{0..2}.attention.qkv")
    assert recipe.rules[0].count == 6 * parts
    reasons = {entry.modules: entry.reason for entry in recipe.protected}
    assert "embedding" in reasons["token_embedding",]
    assert "conditioning" in reasons["layers.{0..2}.adaln_modulation",]
    assert parts == (2 if make is two_parts else 1)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_recipe_in_a_file_knows_where_its_source_is(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)
    file = tmp_path / "r.json"
    result = call(path, "--emit-recipe", file)
    assert (result.exit_code, "Nothing looks wrong" in result.stdout) == (0, True)
    recipe = load_recipe(file)
    assert recipe.source.path is not None
    make_plan(recipe, open_parts(tmp_path / recipe.source.path, recipe.source.parts))
    before = file.read_bytes()
    with pytest.raises(OutputError, match="already"):
        call(path, "--emit-recipe", file)
    assert file.read_bytes() == before


def test_a_broken_checkpoint_is_no_source(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", BROKEN["missing-scale"])
    with pytest.raises(InvalidInput) as caught:
        call(tmp_path, "--emit-recipe")
    assert [problem.kind for problem in caught.value.problems] == ["missing-scale"]


# -- what quantrecipe wrote itself ----------------------------------------------------------------


def own(folder: Path) -> tuple[Path, Recipe]:
    """What a conversion writes, as far as headers go, with the recipe in the metadata."""
    source = two_parts(folder)
    recipe = Recipe.model_validate_json(call(source, "--emit-recipe").stdout)
    planned = make_plan(recipe, open_parts(source, recipe.source.parts))
    out = folder / "out"
    for file in planned.files:
        specs = {name: (t.dtype, t.shape) for name, t in file.tensors.items()}
        write(out / file.path, specs, recipe_metadata(recipe, planned.recipe_sha256))
    return out, recipe


def test_an_output_says_what_it_was_made_by(tmp_path: Path) -> None:
    out, recipe = own(tmp_path)
    found = facts(out)
    assert found["problems"] == []
    assert found["made_by"]["recipe"] == recipe.name
    assert {p["name"]: p["layout"] for p in found["parts"]} == {
        "transformer": "int8-scaled",
        "unconditional_transformer": "int8-scaled",
    }
    assert "its metadata holds the recipe" in found["parts"][0]["reason"]
    for path in (out / "transformer", out / "transformer" / "diffusion_pytorch_model.safetensors"):
        (alone,) = facts(path)["parts"]
        assert (alone["name"], alone["layout"]) == ("transformer", "int8-scaled")


def test_a_lock_is_held_against_the_files(tmp_path: Path) -> None:
    convert = pytest.importorskip("quantrecipe.converter").convert
    file, out = tmp_path / "r.json", tmp_path / "out"
    call(fp8(tmp_path), "--emit-recipe", file)
    convert(file, None, out)
    found = facts(out)
    assert found["problems"] == []
    assert f"{LOCK_NAME} holds the recipe" in found["parts"][0]["reason"]
    (weights,) = out.glob("*.safetensors")
    write(weights, {"a.weight": ("bfloat16", (8, 8))})
    assert "lock-mismatch" in kinds(facts(out))
    weights.rename(out / "renamed.safetensors")
    assert "missing-output" in kinds(facts(out))


def test_a_part_of_an_output_that_is_gone_is_missed(tmp_path: Path) -> None:
    out, _ = own(tmp_path)
    (out / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    found = facts(out)
    assert kinds(found) == {"missing-part"}
    assert [p["name"] for p in found["parts"]] == ["unconditional_transformer"]


def test_edited_metadata_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", dit(), {"quantrecipe": '{"recipe": {}}'})
    found = facts(tmp_path)
    assert kinds(found) == {"bad-recipe-metadata"}
    assert (found["made_by"], found["parts"][0]["layout"]) == (None, "fp8-scaled")


def test_a_lock_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", dit())
    (tmp_path / LOCK_NAME).write_text("{}")
    assert kinds(facts(tmp_path))


# -- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--part", "nothing"],
        ["x", "--part", "=y"],
        ["x", "--part", "a=b", "--part", "a=c"],
        ["x", "--json", "--emit-recipe"],
    ],
    ids=["no path", "no location", "no name", "twice", "two documents"],
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        call(tmp_path / "missing")
    assert kinds(facts(tmp_path / "missing")) == {"missing-source"}
    write(tmp_path / "x.safetensors", dit())
    with pytest.raises(InvalidInput, match="Did you mean 'plain'"):
        call(tmp_path, "--layout", "plains")


def test_torch_is_never_imported(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", dit())
    code = (
        "import sys\nfrom quantrecipe.cli.inspect import inspect\n"
        f"inspect([{str(tmp_path)!r}, '--emit-recipe', {str(tmp_path / 'r.json')!r}],"
        " standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "r.json").is_file()
