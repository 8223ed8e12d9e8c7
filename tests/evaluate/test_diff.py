"""``diff``: what holds of any two checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantrecipe.checkpoint import read_header
from quantrecipe.converter import convert
from quantrecipe.evaluate import Compared, Diff, diff
from quantrecipe.evaluate.comparison.running import open_comparison
from quantrecipe.schema.recipe import Recipe
from quantrecipe.testing.strategies import conversions
from tests.converter.making import (
    KINDS,
    PLAIN_DTYPES,
    WEIGHTS,
    Json,
    Tensors,
    everything,
    numbers,
    parsed,
    read_lock,
    recipe,
    save,
    small,
)

NAMES = [
    {"from": "*.qkv", "into": ["*.to_q", "*.to_k", "*.to_v"]},
    {"from": "*.o", "into": "*.to_out.0"},
    {"from": "*.norm", "into": "*.n"},
]
BY_ROW = sorted(name for name in WEIGHTS if "-channel-" in name or "-group-" in name)
SWAPPED = {"only-in-a": "only-in-b", "only-in-b": "only-in-a"}
# Layouts recognise these by themselves.
KNOWN = {
    "int8": ("int8-[out]", "int8-[out,1]", "int8-[]"),
    "fp8": ("float8_e4m3fn-[out]", "float8_e4m3fn-[]", "float8_e5m2-[out,1]"),
    "plain": PLAIN_DTYPES,
}


def entry(found: Diff, name: str) -> Compared:
    (one,) = [each for each in found.entries if each.name == name]
    return one


def verdicts(found: Diff) -> dict[str, str]:
    return {each.name: each.verdict for each in found.entries}


def built(kind: str, rows: int, columns: int, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    made = {f"a.{role}": tensor for role, tensor in KINDS[kind].build(rng, rows, columns).items()}
    made |= {f"b.{role}": tensor for role, tensor in KINDS[kind].build(rng, rows, columns).items()}
    made["a.bias"] = torch.from_numpy(rng.standard_normal(rows)).bfloat16()
    made["norm.weight"] = torch.from_numpy(rng.standard_normal(columns)).float()
    return made


@settings(max_examples=15)
@given(conversions())
def test_a_checkpoint_is_the_same_as_itself(drawn: tuple[Recipe, Tensors]) -> None:
    made_by, tensors = drawn
    with tempfile.TemporaryDirectory() as folder:
        source = save(Path(folder, "in.safetensors"), tensors)
        convert(made_by, source, Path(folder, "out"))
        for path in (source, Path(folder, "out")):
            found = diff(path, path)
            assert found.verdict == "same"
            assert set(verdicts(found).values()) == {"same"}
            assert not found.metadata
            assert not found.failed()


@settings(max_examples=10)
@given(
    name=st.sampled_from(BY_ROW),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 1 << 20),
)
def test_split_renamed_and_resharded_is_moved(
    name: str, rows: int, columns: int, seed: int
) -> None:
    """Every number of a fused projection is found in what another layout makes of it."""
    columns *= 4
    rng = np.random.default_rng(seed)
    tensors = {
        "a.qkv.weight": numbers(rng, 3 * rows, columns).bfloat16(),
        "a.qkv.bias": torch.from_numpy(rng.standard_normal(3 * rows)).bfloat16(),
        "a.o.weight": numbers(rng, rows, columns).bfloat16(),
        "a.norm.weight": torch.ones(columns),
    }
    with tempfile.TemporaryDirectory() as folder:
        source = save(Path(folder, "in.safetensors"), tensors)
        outs = Path(folder, "fused"), Path(folder, "split")
        for out in outs:
            fields: Json = {"file": f"{out.name}.safetensors"}
            if out.name == "split":
                fields["names"] = NAMES
            made_by = recipe(WEIGHTS[name], target=everything(), target_fields=fields)
            convert(parsed(made_by), source, out)
        for a, b in (outs, outs[::-1]):
            found = diff(a, b)
            assert verdicts(found) == dict.fromkeys(
                ["a.to_q", "a.to_k", "a.to_v", "a.to_out.0", "a.n.weight"], "moved"
            )
            assert [pair.names_of for pair in found.parts] == ["of recipe small"]
            assert found.verdict == "moved"
            assert not found.failed()
            assert "files" in entry(found, "a.to_q").details
        assert diff(source, outs[0]).verdict == "different"


@settings(max_examples=40)
@given(
    kind=st.sampled_from([kind for kinds in KNOWN.values() for kind in kinds]),
    data=st.data(),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_is_found_and_named(kind: str, data: st.DataObject, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save(a, built(kind, 5, 8, seed=1))
        header = read_header(a).tensors
        name = data.draw(st.sampled_from(sorted(header)))
        info = header[name]
        at = data.draw(st.integers(0, info.nbytes - 1))
        content = bytearray(a.read_bytes())
        content[info.offset + at] ^= 1 << bit
        b.write_bytes(content)
        # By hand: what no scale can be is refused elsewhere, and compared here all the same.
        found = diff(a, b)
        owner = name if name == "norm.weight" else name.partition(".")[0]
        quantized = name.endswith(("a.weight", "b.weight", "scale")) and kind not in PLAIN_DTYPES
        assert verdicts(found) == {
            each: ("requantized" if quantized else "changed") if each == owner else "same"
            for each in ("a", "b", "norm.weight")
        }
        if name.endswith("weight") and name != "norm.weight":
            distance = entry(found, owner).distance
            assert distance is not None
            element = at // (info.nbytes // 40)
            assert distance.exact or distance.at == divmod(element, 8)
        assert found.verdict == "different"
        assert len(found.failed()) == 1


@settings(max_examples=30)
@given(
    kinds=st.tuples(st.sampled_from(KNOWN["int8"] + KNOWN["plain"]), st.sampled_from(KNOWN["fp8"])),
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    seed=st.integers(0, 1 << 20),
)
def test_distances_are_those_computed_directly(
    kinds: tuple[str, str], rows: int, columns: int, seed: int
) -> None:
    made = [built(kind, rows, columns, seed + place) for place, kind in enumerate(kinds)]
    made[1]["a.bias"] = made[0]["a.bias"]
    values = [
        KINDS[kind]
        .meaning({r: tensors[f"a.{r}"] for r in ("weight", "weight_scale") if f"a.{r}" in tensors})
        .float()
        for kind, tensors in zip(kinds, made, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            save(Path(folder, f"{place}.safetensors"), tensors)
            for place, tensors in enumerate(made)
        ]
        found = diff(*paths)
        for sizes in (1, 64):
            with open_comparison(*paths) as opened:
                assert opened.compare(block_bytes=sizes) == found
    one = entry(found, "a")
    assert one.verdict == "requantized"
    assert one.distance is not None
    error = (values[1] - values[0]).double()
    assume(bool((values[0] != 0).any()) and bool((error != 0).any()))
    wanted = 10 * torch.log10(values[0].double().square().sum() / error.square().sum())
    assert one.distance.sqnr_db == pytest.approx(float(wanted), rel=1e-9, abs=1e-9)
    worst = float(error.abs().max())
    assert one.distance.worst_error == worst
    assert one.distance.at is not None
    row, column = one.distance.at
    assert float(error[row, column].abs()) == worst
    scale = made[1]["a.weight_scale"].flatten().float()
    step = float(scale[row if len(scale) > 1 else 0])
    assert one.distance.in_scales == pytest.approx(worst / step)


@settings(max_examples=25)
@given(
    kinds=st.tuples(*[st.sampled_from([k for kinds in KNOWN.values() for k in kinds])] * 2),
    same=st.booleans(),
    lacking=st.sampled_from(["", "b.", "norm"]),
    seed=st.integers(0, 100),
)
def test_both_ways_say_the_same(
    kinds: tuple[str, str], same: bool, lacking: str, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for place, kind in enumerate(kinds):
            tensors = built(kind, 4, 8, seed if same else seed + place)
            if place and lacking:
                tensors = {n: t for n, t in tensors.items() if not n.startswith(lacking)}
            paths.append(save(Path(folder, f"{place}.safetensors"), tensors))
        there, back = diff(*paths), diff(*paths[::-1])
    assert {n: SWAPPED.get(v, v) for n, v in verdicts(there).items()} == verdicts(back)
    for one, other in zip(there.entries, back.entries, strict=True):
        assert (one.distance is None) == (other.distance is None)
        if one.distance is not None and other.distance is not None:
            assert one.distance.worst_error == other.distance.worst_error


@pytest.mark.parametrize("name", sorted(name for name in WEIGHTS if name.endswith("float32")))
def test_errors_are_those_of_the_lock(tmp_path: Path, name: str) -> None:
    """A converter measured the same, while it wrote."""
    small(tmp_path / "in.safetensors")
    target = everything()
    spec = WEIGHTS[name]
    convert(parsed(recipe(spec, target=target)), tmp_path / "in.safetensors", tmp_path / "out")
    found = diff(tmp_path / "in.safetensors", tmp_path / "out")
    for module in read_lock(tmp_path / "out")["modules"]:
        distance = entry(found, module["name"]).distance
        assert distance is not None
        assert distance.sqnr_db is not None
        assert round(distance.sqnr_db, 2) == module["error"]["sqnr_db"]
        assert distance.in_scales is not None
        assert distance.in_scales <= module["error"]["max_error_in_scales"] * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("size", [4, 16])
def test_rotated_weights_are_rotated_back(tmp_path: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    source = save(tmp_path / "in.safetensors", {"a.weight": numbers(rng, 6, 32).float()})
    for name, rotation in (("rotated", {"kind": "hadamard", "size": size}), ("straight", None)):
        document: Json = recipe(target="quantrecipe")
        if rotation is not None:
            document["schemes"]["all"]["rotation"] = rotation
        convert(parsed(document), source, tmp_path / name)
    for name in ("rotated", "straight"):
        distance = entry(diff(source, tmp_path / name), "a").distance
        assert distance is not None
        assert 30 < distance.decibels < 60
        assert (distance.in_scales is None) == (name == "rotated")
    # Without metadata and lock, the config.json says it.
    (tmp_path / "rotated" / "recipe.lock.json").unlink()
    path = tmp_path / "rotated" / "model.safetensors"
    save_file(load_file(path), path)
    again = entry(diff(source, tmp_path / "rotated"), "a").distance
    assert again is not None
    assert again.decibels > 30
    (tmp_path / "rotated" / "config.json").unlink()
    lost = entry(diff(source, tmp_path / "rotated"), "a").distance
    assert lost is not None
    assert lost.decibels < 10
