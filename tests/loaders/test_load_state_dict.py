"""``load_state_dict``: names, parts, dtypes, and who reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict, loader_names
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import Json, parsed, recipe, save, small, weight_spec

THIRD_PARTY = Path(__file__).parents[1] / "converter" / "third_party"
PARTS = {"one": "first", "two": "second"}
NAMES = {"a.weight", "a.bias", "b.weight", "norm.weight"}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    small(tmp_path / "in.safetensors")
    keep = [{"modules": ["b"], "dtype": "float16", "reason": "small"}]
    return convert(
        parsed(recipe(protected=keep)), tmp_path / "in.safetensors", tmp_path / "out"
    ).out


def convert_parts(folder: Path, target: Json) -> Path:
    for index, place in enumerate(PARTS.values()):
        small(folder / "in" / place / "m.safetensors", seed=index)
    document = recipe() | {"source": {"layout": "plain", "parts": PARTS}, "target": target}
    return convert(parsed(document), folder / "in", folder / "out").out


def test_quantized_weights_have_the_dtype_asked_for_and_others_their_own(made: Path) -> None:
    source = load_file(made.parent / "in.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = load_state_dict(made, dtype=dtype)
        assert found.keys() == source.keys()
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            "a.weight": dtype,
            "a.bias": torch.bfloat16,
            "b.weight": torch.float16,
            "norm.weight": torch.bfloat16,
        }
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in source.items()
        }
        assert torch.equal(found["a.bias"], source["a.bias"])
        assert torch.equal(found["norm.weight"], source["norm.weight"])
        assert torch.equal(found["b.weight"], source["b.weight"].half())
        assert torch.equal(found["a.weight"], load_state_dict(made)["a.weight"].to(dtype))


def test_the_weights_are_codes_times_scales(made: Path) -> None:
    stored = load_file(made / "model.safetensors")
    expected = stored["a.weight"].float() * stored["a.weight_scale"]
    assert torch.equal(load_state_dict(made)["a.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_without_plain_numbers_is_a_mistake_of_the_caller(
    made: Path, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match="does not hold plain numbers"):
        load_state_dict(made, dtype=dtype)


def test_a_weight_beyond_the_dtype_asked_for_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(2, 4)
    weight[1, 3] = 1e6
    source = save(tmp_path / "in.safetensors", {"a.weight": weight})
    out = convert(parsed(recipe()), source, tmp_path / "out").out
    with pytest.raises(InvalidInput, match=r"too large for float16 at index \[1, 3\]") as error:
        load_state_dict(out, dtype=torch.float16)
    (problem,) = error.value.problems
    assert (problem.file, problem.tensor) == (str(out / "model.safetensors"), "a.weight")


def test_what_is_returned_is_the_callers_own(made: Path) -> None:
    first = load_state_dict(made)
    for tensor in first.values():
        tensor.zero_()
    assert float(load_state_dict(made)["a.weight"].abs().max()) > 0


# Names and parts


def test_names_of_a_target_that_tells_parts_apart(tmp_path: Path) -> None:
    out = convert_parts(tmp_path, {"layout": "transformerlab"})
    found = load_state_dict(out, names="target")
    assert set(found) == {f"{part}.{name}" for part in PARTS for name in NAMES}
    with pytest.raises(InvalidInput, match=r'part=.*names="target"') as error:
        load_state_dict(out)
    assert "'plain' do not tell its parts apart: one, two" in str(error.value)


@pytest.mark.parametrize(
    "target",
    [
        {"layout": "transformerlab"},
        {"layout": "transformerlab", "max_shard_size": "80B"},
        {"layout": "int8-scaled", "parts": {"one": "x/m.safetensors", "two": "y/m.safetensors"}},
    ],
    ids=["one file", "shards", "folders"],
)
def test_a_part_under_the_names_of_its_source(tmp_path: Path, target: Json) -> None:
    out = convert_parts(tmp_path, target)
    for part, place in PARTS.items():
        source = load_file(tmp_path / "in" / place / "m.safetensors")
        found = load_state_dict(out, part=part)
        assert set(found) == NAMES
        assert torch.equal(found["norm.weight"], source["norm.weight"])
        error = (found["a.weight"] - source["a.weight"].float()).abs().amax(1)
        assert bool((error <= source["a.weight"].float().abs().amax(1) / 127 * 0.51).all())


def test_a_part_that_is_not_there(made: Path) -> None:
    with pytest.raises(InvalidInput, match="no part 'transformer'"):
        load_state_dict(made, part="transformer")


def test_without_a_recipe_the_names_are_those_on_disk(made: Path) -> None:
    for names in ("source", "target"):
        found = load_state_dict(made / "model.safetensors", layout="int8-scaled", names=names)
        assert set(found) == NAMES
    found = load_state_dict(made, layout="int8-scaled", parts={"x": "model.safetensors"}, part="x")
    assert set(found) == NAMES


def test_an_fp8_source_can_be_read_by_its_layout(tmp_path: Path) -> None:
    codes = torch.randn(4, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([1.0, 2.0, 0.5, 0.25])
    path = save(tmp_path / "m.safetensors", {"a.weight": codes, "a.weight_scale": scale})
    found = load_state_dict(path, layout="fp8-scaled")
    assert torch.equal(found["a.weight"], codes.float() * scale[:, None])


# Other people's loaders


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY))


@pytest.mark.usefixtures("installed")
def test_a_loader_of_another_project(made: Path) -> None:
    assert {"reference", "halves", "narrow"} <= set(loader_names())
    found = load_state_dict(made, loader="halves")
    ours = load_state_dict(made, dtype=torch.float16)
    assert set(found) == {"a.weight", "b.weight"}
    assert all(torch.equal(found[name], ours[name]) for name in found)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("loader", "kind", "says"),
    [
        (
            "narrow",
            "loader-lacks",
            "no format int8 by channel\n  Could read it: halves, reference.",
        ),
        ("gone", "broken-entry-point", "No module named 'someones_tools.nowhere'"),
        ("shapeless", "not-a-loader", "lacks a name, capabilities"),
        ("referense", "unknown-loader", "Did you mean 'reference'?"),
    ],
)
def test_a_loader_that_will_not_do(made: Path, loader: str, kind: str, says: str) -> None:
    with pytest.raises(InvalidInput) as error:
        load_state_dict(made, loader=loader)
    assert error.value.problems[0].kind == kind
    assert says in str(error.value)


@pytest.mark.usefixtures("installed")
def test_a_loader_that_lacks_what_nobody_else_has(tmp_path: Path) -> None:
    small(tmp_path / "in.safetensors")
    spec: dict[str, Any] = weight_spec("float8_e5m2", "tensor")
    out = convert(
        parsed(recipe(spec, target="fp8-scaled")), tmp_path / "in.safetensors", tmp_path / "out"
    ).out
    with pytest.raises(InvalidInput, match="Could read it: reference"):
        load_state_dict(out, loader="halves")
