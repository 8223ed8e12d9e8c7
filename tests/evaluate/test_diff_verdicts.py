"""``diff``: what each verdict is given for, how parts find each other, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, tensor

from quantrecipe.converter import convert
from quantrecipe.evaluate import FAILURES, Compared, Diff, diff
from quantrecipe.evaluate.comparison.settings import json_differences
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import everything, parsed, recipe, save, save_statistics, small

INF, NAN = float("inf"), float("nan")
CODES = torch.arange(-20, 20, dtype=torch.int8).reshape(4, 10)
SCALES = tensor([0.5, 1.0, 2.0, 0.25])
INT8 = {"a.weight": CODES, "a.weight_scale": SCALES}
VALUES = CODES.float() * SCALES[:, None]
FINE = VALUES + 2.0**-20
"""Numbers that bfloat16 rounds to ``VALUES``."""

Case = tuple[Mapping[str, Tensor], Mapping[str, Tensor], str, tuple[str, ...]]


def with_one(base: Tensor, value: float, at: tuple[int, ...] = (2, 3)) -> Tensor:
    changed = base.clone()
    changed[at] = value
    return changed


CASES: dict[str, Case] = {
    "the same": (INT8, INT8, "same", ()),
    "not a number, the same": (
        {"a.weight": tensor([[NAN, -INF]])},
        {"a.weight": tensor([[NAN, -INF]])},
        "same",
        (),
    ),
    "scales of another shape": (
        INT8,
        {**INT8, "a.weight_scale": SCALES[:, None]},
        "moved",
        ("scale shape",),
    ),
    "scales in another dtype": (
        INT8,
        {**INT8, "a.weight_scale": SCALES.bfloat16()},
        "moved",
        ("scales float32 -> bfloat16",),
    ),
    "one scale, or the same for each row": (
        {**INT8, "a.weight_scale": tensor(0.5)},
        {**INT8, "a.weight_scale": torch.full((4,), 0.5)},
        "moved",
        ("scales by tensor -> channel",),
    ),
    "other names": (
        INT8,
        {"model.a.wq": CODES, "model.a.ws": SCALES},
        "moved",
        ("names",),
    ),
    "widened": ({"a.weight": VALUES.bfloat16()}, {"a.weight": VALUES}, "dtype", ()),
    "narrowed, with nothing lost": (
        {"a.weight": VALUES},
        {"a.weight": VALUES.half()},
        "dtype",
        (),
    ),
    "rounded": ({"a.weight": FINE}, {"a.weight": FINE.bfloat16()}, "dtype", ()),
    "rounded from": ({"a.weight": FINE.bfloat16()}, {"a.weight": FINE}, "dtype", ()),
    "rounded twice": (
        {"a.weight": FINE.double()},
        {"a.weight": FINE.half()},
        "dtype",
        (),
    ),
    "minus infinity stays what it is": (
        {"a.weight": tensor([[-INF, 1.0]])},
        {"a.weight": tensor([[-INF, 1.0]]).half()},
        "dtype",
        (),
    ),
    "another dtype, and not rounded": (
        {"a.weight": VALUES},
        {"a.weight": with_one(VALUES, 99.0).half()},
        "changed",
        (),
    ),
    "too large to be rounded": (
        {"a.weight": tensor([[1e30, 1.0]])},
        {"a.weight": tensor([[INF, 1.0]]).half()},
        "changed",
        (),
    ),
    "another number": ({"a.weight": VALUES}, {"a.weight": with_one(VALUES, 9.0)}, "changed", ()),
    "another zero": (
        {"a.weight": tensor([[0.0, 1.0]])},
        {"a.weight": tensor([[-0.0, 1.0]])},
        "changed",
        ("only signs of zeros or bits of NaNs",),
    ),
    "another code": (INT8, {**INT8, "a.weight": with_one(CODES, 4)}, "requantized", ()),
    "another scale": (
        INT8,
        {**INT8, "a.weight_scale": with_one(SCALES, 3.0, (2,))},
        "requantized",
        (),
    ),
    "the same numbers, quantized": (
        {"a.weight": VALUES},
        INT8,
        "requantized",
        (),
    ),
    "another format": (
        INT8,
        {"a.weight": CODES.float().to(torch.float8_e4m3fn), "a.weight_scale": SCALES},
        "requantized",
        (),
    ),
    "another shape": (
        {"a.weight": VALUES},
        {"a.weight": VALUES[:3].contiguous()},
        "changed",
        ("shape [4, 10] -> [3, 10]",),
    ),
    "another bias": (
        {**INT8, "a.bias": torch.ones(4)},
        {**INT8, "a.bias": tensor([1.0, 1.0, 1.5, 1.0])},
        "changed",
        ("bias: off by 0.5 at [2]",),
    ),
    "bias in another dtype": (
        {**INT8, "a.bias": torch.ones(4)},
        {**INT8, "a.bias": torch.ones(4).half()},
        "dtype",
        ("bias: float32 -> float16",),
    ),
    "a code and the dtype of the bias": (
        {**INT8, "a.bias": torch.ones(4)},
        {"a.weight": with_one(CODES, 4), "a.weight_scale": SCALES, "a.bias": torch.ones(4).half()},
        "requantized",
        ("bias: float32 -> float16",),
    ),
    "bias gone": ({**INT8, "a.bias": torch.ones(4)}, INT8, "changed", ("bias only in A",)),
    "bias new": (INT8, {**INT8, "a.bias": torch.ones(4)}, "changed", ("bias only in B",)),
}

OTHERS: dict[str, tuple[Tensor, Tensor, str, tuple[str, ...]]] = {
    "whole numbers": (tensor([1, 2]), tensor([1, 3]), "changed", ("differs first at [1]",)),
    "wider whole numbers": (tensor([1, 2]), tensor([1, 2]).int(), "changed", ()),
    "a scalar": (tensor(1), tensor(2), "changed", ("differs first at []",)),
    "another shape": (torch.ones(2, 2, 1), torch.ones(4), "changed", ("shape [2, 2, 1] -> [4]",)),
    "rounded": (torch.full((3,), 1 / 3), torch.full((3,), 1 / 3).half(), "dtype", ()),
    "empty": (torch.ones(0), torch.ones(0).half(), "dtype", ()),
    "empty, the same": (torch.ones(0, 3, 2), torch.ones(0, 3, 2), "same", ()),
}


def compared(tmp_path: Path, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Diff:
    return diff(save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b))


def only(found: Diff) -> Compared:
    (entry,) = found.entries
    return entry


@pytest.mark.parametrize("name", CASES)
def test_modules(tmp_path: Path, name: str) -> None:
    a, b, verdict, details = CASES[name]
    entry = only(compared(tmp_path, a, b))
    assert (entry.verdict, entry.details) == (verdict, details)
    assert entry.kind == "module"


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors(tmp_path: Path, name: str) -> None:
    a, b, verdict, details = OTHERS[name]
    entry = only(compared(tmp_path, {"buffer": a}, {"buffer": b}))
    assert (entry.verdict, entry.details) == (verdict, details)
    assert entry.kind == "tensor"


@pytest.mark.parametrize(
    ("name", "rounding", "measured"),
    [
        ("widened", "lossless", False),
        ("narrowed, with nothing lost", "lossless", False),
        ("rounded", "b-rounded", True),
        ("rounded from", "a-rounded", True),
        ("minus infinity stays what it is", "lossless", False),
        ("another dtype, and not rounded", None, True),
    ],
)
def test_what_rounding_lost(
    tmp_path: Path, name: str, rounding: str | None, measured: bool
) -> None:
    entry = only(compared(tmp_path, *CASES[name][:2]))
    assert (entry.rounding, entry.distance is not None) == (rounding, measured)


@pytest.mark.parametrize(
    ("name", "worst", "at", "in_scales"),
    [
        ("another code", 2.0, (2, 3), 1.0),  # from 3 to 4, and the scale is 2
        ("another scale", 9.0, (2, 9), 3.0),  # 9 * (3 - 2), in units of B's
        ("another number", 3.0, (2, 3), None),
        ("the same numbers, quantized", 0.0, None, None),
        ("another zero", 0.0, None, None),
        ("too large to be rounded", None, (0, 0), None),
    ],
)
def test_distances(
    tmp_path: Path,
    name: str,
    worst: float | None,
    at: tuple[int, int] | None,
    in_scales: float | None,
) -> None:
    distance = only(compared(tmp_path, *CASES[name][:2])).distance
    assert distance is not None
    assert (distance.worst_error, distance.at, distance.in_scales) == (worst, at, in_scales)
    assert distance.exact == (worst == 0.0)
    assert distance.finite == (worst is not None)


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    entry = only(compared(tmp_path, INT8, {**INT8, "a.weight_scale": with_one(SCALES, NAN, (1,))}))
    assert entry.verdict == "requantized"
    assert entry.distance is not None
    assert not entry.distance.finite
    assert entry.distance.at == (1, 0)
    assert entry.distance.decibels == -INF


def test_numbers_further_apart_than_float32_reaches(tmp_path: Path) -> None:
    a = {"a.weight": tensor([[3e38, 1.0]])}
    distance = only(compared(tmp_path, a, {"a.weight": tensor([[-3e38, 1.0]])})).distance
    assert distance is not None
    assert distance.worst_error == pytest.approx(6e38)
    assert distance.sqnr_db == pytest.approx(-6.0206, abs=1e-3)


def test_of_float64_every_digit_counts(tmp_path: Path) -> None:
    wide = VALUES.double() + 1
    found = only(compared(tmp_path, {"a.weight": wide}, {"a.weight": wide * (1 + 2.0**-45)}))
    assert found.verdict == "changed"
    assert found.distance is not None
    assert found.distance.decibels == pytest.approx(20 * 45 * 0.30103, abs=0.1)


def test_only_one_has_it(tmp_path: Path) -> None:
    found = compared(tmp_path, INT8 | {"x": torch.ones(2)}, {"b.weight": VALUES, **INT8})
    assert {entry.name: entry.verdict for entry in found.entries} == {
        "a": "same",
        "b": "only-in-b",
        "x": "only-in-a",
    }
    assert found.counts("module")["only-in-b"] == 1
    assert found.counts("tensor")["only-in-a"] == 1
    assert [entry.a is None for entry in found.entries] == [False, True, False]


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [((2.0, 1.0), "same"), ((4.0, 1.0), "requantized"), (None, "requantized")],
)
def test_smoothing_factors_count(
    tmp_path: Path, factors: tuple[float, ...] | None, verdict: str
) -> None:
    layout = "transformerlab"
    a = {
        "model.a.wq": CODES[:, :2].contiguous(),
        "model.a.ws": SCALES,
        "model.a.smooth": tensor([2.0, 1.0]),
    }
    b = dict(a)
    del b["model.a.smooth"]
    if factors is not None:
        b["model.a.smooth"] = tensor(factors)
    paths = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    entry = only(diff(*paths, layout_a=layout, layout_b=layout))
    assert entry.verdict == verdict
    if factors == (4.0, 1.0):
        # Codes -20, -10, 0 and 10 in the first column, divided by 4 and not by 2.
        assert entry.distance is not None
        assert (entry.distance.worst_error, entry.distance.at) == (2.5, (0, 0))
        assert entry.distance.in_scales == 2.5 / (0.5 / 4)


def test_smoothed_weights_are_measured_as_a_reader_gets_them(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"a.weight": VALUES + 0.3})
    save_statistics(tmp_path / "s.safetensors", "model", {"a": torch.rand(1, 10) * 9 + 0.1})
    document = recipe(target=everything())
    document["schemes"]["all"]["smoothing"] = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "s.safetensors",
    }
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    convert(tmp_path / "recipe.json", source, tmp_path / "out")
    distance = only(diff(source, tmp_path / "out")).distance
    assert distance is not None
    assert distance.decibels > 35
    assert distance.in_scales is not None
    assert distance.in_scales < 0.51


# Parts


def two_parts(folder: Path, names: tuple[str, str], seed: int = 0) -> Path:
    for index, name in enumerate(names):
        small(folder / name / "model.safetensors", seed + index)
    return folder


def test_parts_of_the_same_name_belong_together(tmp_path: Path) -> None:
    a = two_parts(tmp_path / "a", ("vae", "transformer"))
    b = two_parts(tmp_path / "b", ("vae", "text_encoder"))
    found = diff(a, b)
    assert [(pair.a, pair.b) for pair in found.parts] == [
        ("transformer", None),
        ("vae", "vae"),
        (None, "text_encoder"),
    ]
    assert {entry.verdict for entry in found.entries if entry.part == "vae"} == {"same"}
    assert found.verdict == "different"


def test_parts_that_are_said_to_belong_together(tmp_path: Path) -> None:
    a = two_parts(tmp_path / "a", ("one", "two"))
    b = two_parts(tmp_path / "b", ("two", "one"))
    assert diff(a, b).verdict == "different"
    found = diff(a, b, parts={"one": "two", "two": "one"})
    assert found.verdict == "same"
    assert {entry.part for entry in found.entries} == {"one", "two"}


def test_a_part_that_is_taken_is_no_part_by_name(tmp_path: Path) -> None:
    a = two_parts(tmp_path / "a", ("one", "two"))
    b = two_parts(tmp_path / "b", ("two", "other"))
    found = diff(a, b, parts={"one": "two"})
    assert [(pair.a, pair.b) for pair in found.parts] == [
        ("one", "two"),
        ("two", None),
        (None, "other"),
    ]


def test_the_only_parts_belong_together(tmp_path: Path) -> None:
    small(tmp_path / "a" / "unet" / "m.safetensors")
    small(tmp_path / "b" / "m.safetensors")
    assert diff(tmp_path / "a", tmp_path / "b").verdict == "same"


def test_a_recipe_says_which_folders_its_parts_came_from(tmp_path: Path) -> None:
    source = two_parts(tmp_path / "source", ("net", "other_net"))
    parts = {"first": "net", "second": "other_net/model.safetensors"}
    target = {"parts": {"first": "x/m.safetensors", "second": "y/m.safetensors"}}
    document = recipe(target_fields=target) | {"source": {"layout": "plain", "parts": parts}}
    convert(parsed(document), source, tmp_path / "out")
    for found, way in (
        (diff(source, tmp_path / "out"), 1),
        (diff(tmp_path / "out", source), -1),
    ):
        pairs = {(pair.a, pair.b)[::way] for pair in found.parts}
        assert pairs == {("net", "first"), ("other_net", "second")}
    # By folder, what is no recipe's.
    again = two_parts(tmp_path / "again", ("x", "y"))
    assert {(pair.a, pair.b) for pair in diff(tmp_path / "out", again).parts} == {
        ("first", "x"),
        ("second", "y"),
    }


@pytest.mark.parametrize(
    "parts", [{"nothing": "one"}, {"one": "nothing"}, {"one": "one", "two": "one"}]
)
def test_parts_that_there_are_not(tmp_path: Path, parts: dict[str, str]) -> None:
    a = two_parts(tmp_path / "a", ("one", "two"))
    with pytest.raises(InvalidInput) as refused:
        diff(a, a, parts=parts)
    assert {problem.kind for problem in refused.value.problems} == {"unknown-part"}


def test_no_part_in_common_is_noted(tmp_path: Path) -> None:
    a = two_parts(tmp_path / "a", ("one", "two"))
    b = two_parts(tmp_path / "b", ("three", "four"))
    assert any("--part" in note for note in diff(a, b).notes)


# Names and files


def test_a_module_that_cannot_be_cut_keeps_its_name(tmp_path: Path) -> None:
    names = [{"from": "*.qkv", "into": ["*.q", "*.k"]}, {"from": "*.o", "into": "*.out"}]
    made_by = recipe(target=everything(), target_fields={"names": names})
    tensors = {"a.qkv.weight": torch.ones(5, 8), "a.o.weight": torch.ones(4, 8)}
    source = save(tmp_path / "in.safetensors", tensors)
    cut = {
        "a.q.weight": torch.ones(3, 8),
        "a.k.weight": torch.ones(3, 8),
        "a.out.weight": torch.ones(4, 8),
    }
    convert(parsed(made_by), save(tmp_path / "cut.safetensors", cut), tmp_path / "out")
    found = diff(source, tmp_path / "out")
    assert {entry.name: entry.verdict for entry in found.entries} == {
        "a.qkv": "only-in-a",
        "a.out": "requantized",
        "a.k": "only-in-b",
        "a.q": "only-in-b",
    }
    assert any("5 rows cannot be cut into 2" in note for note in found.notes)


def test_shards_are_files_and_offsets_are_not(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.ones(2, 2) for name in "abc"}
    save(tmp_path / "a" / "model.safetensors", tensors)
    shards = {"1": ["c.weight"], "2": ["a.weight", "b.weight"]}
    for shard, names in shards.items():
        save(
            tmp_path / "b" / f"model-0000{shard}-of-00002.safetensors",
            {name: tensors[name] for name in names},
        )
    index = {
        n: f"model-0000{shard}-of-00002.safetensors"
        for shard, names in shards.items()
        for n in names
    }
    file = tmp_path / "b" / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert {entry.details for entry in found.entries} == {("files",)}
    assert found.verdict == "moved"
    assert not found.failed()
    assert found.failed({"moved"}) == found.entries
    # Of a file that is named itself, the name says nothing.
    assert diff(tmp_path / "a" / "model.safetensors", tmp_path / "b").verdict == "same"
    assert diff(tmp_path / "a", file).verdict == "same"


# What is said beside the numbers


def test_metadata_and_config(tmp_path: Path) -> None:
    for name, seen in (("a", "pt"), ("b", "np")):
        save(tmp_path / name / "m.safetensors", INT8, {"format": seen, "same": "1"})
        config = {"hidden": 8, "layers": [1, 2], name: True, "who": {"a/b": name}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.verdict == "same"
    assert [(s.where, s.key, s.a, s.b) for s in found.metadata] == [
        ("metadata", "format", "pt", "np")
    ]
    assert [(s.where, s.key, s.a, s.b) for s in found.config] == [
        ("config.json", "/a", "true", None),
        ("config.json", "/who/a~1b", '"a"', '"b"'),
        ("config.json", "/b", None, "true"),
    ]
    assert not found.failed_settings()
    assert len(found.failed_settings(FAILURES)) == 4
    (tmp_path / "b" / "config.json").unlink()
    (gone,) = diff(tmp_path / "a", tmp_path / "b").config
    assert (gone.key, gone.a, gone.b) == ("", "is there", None)
    # Around a single file there may be anything.
    assert diff(tmp_path / "a" / "m.safetensors", tmp_path / "b").config == ()


def test_recipes_are_named_by_their_digest(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    small(source)
    for name in ("one", "other"):
        convert(parsed(recipe(name=name)), source, tmp_path / name)
    found = diff(tmp_path / "one", tmp_path / "other")
    (setting,) = found.metadata
    assert setting.a is not None
    assert setting.a.startswith("the recipe one (")
    assert (found.a.recipe, found.b.recipe) == ("one", "other")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({}, {}, []),
        ({"x": 1}, {"x": True}, [("/x", "1", "true")]),
        ({"x": [1, {"y": 2}]}, {"x": [1, {"y": 3}]}, [("/x/1/y", "2", "3")]),
        ({"x": [1]}, {"x": [1, 2]}, [("/x", "[1]", "[1, 2]")]),
        ({"x": None}, {}, [("/x", "null", None)]),
        ({"x": {"b": 1, "a": 2}}, {"x": {"a": 2, "b": 1}}, []),
        ({"~": 1}, {"~": 2}, [("/~0", "1", "2")]),
    ],
)
def test_json_differences(
    a: Any, b: Any, expected: list[tuple[str, str | None, str | None]]
) -> None:
    assert list(json_differences(a, b)) == expected


# What is refused, and what is noted


def unscaled(path: Path) -> None:
    save(path, {"a.weight": CODES})


def truncated(path: Path) -> None:
    save(path, INT8)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (unscaled, "unknown-layout"),
        (truncated, "truncated-file"),
        (lambda path: None, "missing-source"),
    ],
)
def test_what_has_no_meaning_is_refused(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    good = save(tmp_path / "good.safetensors", INT8)
    bad = tmp_path / "bad.safetensors"
    make(bad)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InvalidInput) as refused:
            diff(*pair)
        assert kind in {problem.kind for problem in refused.value.problems}
        assert all(problem.file == str(bad) for problem in refused.value.problems)


def test_a_layout_that_it_says_and_is_not_in(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    small(source)
    convert(parsed(recipe()), source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    renamed = {
        f"model.{name}".replace("a.weight_scale", "a.ws")
        .replace("a.weight", "a.wq")
        .replace("b.weight_scale", "b.ws")
        .replace("b.weight", "b.wq"): each
        for name, each in load_file(path).items()
    }
    other = save(tmp_path / "renamed.safetensors", renamed, metadata)
    found = diff(tmp_path / "out", other)
    assert found.verdict == "moved"
    assert any("it says" in note and "transformerlab" in note for note in found.notes)
    with pytest.raises(InvalidInput):
        diff(tmp_path / "out", other, layout_b="int8-scaled")


def test_a_layout_that_is_not_read_is_compared_as_stored(tmp_path: Path) -> None:
    packed = {
        "a.qweight": torch.ones(4, 4, dtype=torch.int32),
        "a.qzeros": torch.ones(1, 4, dtype=torch.int32),
        "a.scales": torch.ones(1, 4).half(),
        "a.g_idx": torch.zeros(4, dtype=torch.int32),
    }
    other = {**packed, "a.qweight": with_one(packed["a.qweight"], 7, (3, 3))}
    found = compared(tmp_path, packed, other)
    assert [entry.name for entry in found.failed()] == ["a.qweight"]
    assert any("compared as they are stored" in note for note in found.notes)


def test_the_lock_beside_a_copy_is_no_obstacle(tmp_path: Path) -> None:
    """Damage that verify would tell of is what this is for."""
    source = tmp_path / "m.safetensors"
    small(source)
    convert(parsed(recipe()), source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert len(diff(tmp_path / "out", tmp_path / "copy").failed()) == 1


def test_a_config_that_is_nested_without_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "m.safetensors", INT8)
        text = '{"x":' * 100_000 + f'"{name}"' + "}" * 100_000
        (tmp_path / name / "config.json").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        diff(tmp_path / "a", tmp_path / "b")
    assert {problem.kind for problem in refused.value.problems} == {"bad-sidecar"}
