"""``convert --dry-run``: the plan as people read it, and as JSON; nothing is written."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quantrecipe.cli.plan_view import plan_json, plan_text
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.statistics import STATISTICS_KEY

# By import_module: the package offers a command under the name of its module.
convert_module = importlib.import_module("quantrecipe.cli.convert")
TESTS = Path(__file__).parents[1]
LONG = (
    "its activations get spiky across the denoising steps: the largest is 40 times the median in "
    "the last quarter, and one scale for a token cannot follow"
)
CUSTOM = {"modules": ["layers.0.mlp"], "dtype": "float32", "reason": "first"}
SPIKY = {"modules": ["layers.2.attn"], "dtype": "bfloat16", "reason": LONG}


@pytest.fixture(scope="session")
def headers() -> ModuleType:
    return importlib.import_module("tests.support.headers")


@pytest.fixture(scope="session")
def ideogram4() -> ModuleType:
    return importlib.import_module("tests.recipes.ideogram4_tensors")


def convert(*arguments: str | Path) -> Result:
    return CliRunner().invoke(convert_module.convert, [str(each) for each in arguments])


def layers(headers: ModuleType, count: int = 4) -> list[Any]:
    found = []
    for index in range(count):
        found.append(headers.linear(f"layers.{index}.attn", 64, 64))
        found.append(headers.linear(f"layers.{index}.mlp", 256, 64))
        found.append(headers.tensor(f"layers.{index}.norm.weight", "bfloat16", 64))
    return found


def text_of(headers: ModuleType, parts: Iterable[Any], **changes: Any) -> str:
    return plan_text(make_plan(headers.recipe(**changes), list(parts)))


ONE_PART = """\
small: plain -> int8-scaled
  a: int8 channel

Quantized: 6 modules, bfloat16 -> int8 channel, scheme a
  modules              n  shape           in      out
  layers.{0,1,3}.attn  3  [64, 64]   24.6 KB  13.1 KB
  layers.{1..3}.mlp    3  [256, 64]  98.3 KB  52.2 KB

Protected: 2 modules
  modules        n  shape      weight                    in      out  reason
  layers.0.mlp   1  [256, 64]  bfloat16 -> float32  32.8 KB  65.5 KB  first
  layers.2.attn  1  [64, 64]   bfloat16             8.19 KB  8.19 KB  [1]
  [1] its activations get spiky across the denoising steps: the largest is 40 times the median in
      the last quarter, and one scale for a token cannot follow

Passed through: 2 modules
  modules  n  shape     weight         in      out
  head     1  [10, 64]  bfloat16  1.28 KB  1.28 KB
  tail     1  [7, 64]   float32   1.79 KB  1.79 KB

Copied as they are: 4 other tensors, 512 B

file               tensors    bytes
model.safetensors       20  BYTES

10 modules, 167 KB in, 145 KB out (87%)
numbers: 3 lossless, 1 cast, 6 quantized
"""

TWO_PARTS = """\
small: fp8-scaled -> transformerlab
  a: int8 channel

Quantized: 15 modules, bfloat16 -> int8 channel, scheme a
  part      modules             n  shape           in      out
  one, two  layers.{0..3}.attn  8  [64, 64]   65.5 KB  34.8 KB
  one       layers.{1..3}.mlp   3  [256, 64]  98.3 KB  52.2 KB
  two       layers.{0..3}.mlp   4  [256, 64]   131 KB  69.6 KB

Protected: 1 module of one, bfloat16 -> float32, reason: first
  modules       n  shape           in      out
  layers.0.mlp  1  [256, 64]  32.8 KB  65.5 KB

Passed through: 2 modules of one and two, float8_e4m3fn channel -> bfloat16, dequantized
  modules  n  shape          in      out
  head     2  [10, 64]  1.36 KB  2.56 KB

Copied as they are: 8 other tensors, 1.02 KB

file               tensors    bytes
model.safetensors       41  BYTES

18 modules, 330 KB in, 230 KB out (70%)
numbers: 1 cast, 15 quantized, 2 dequantized
"""


def without_bytes(text: str) -> str:
    """The size of a header changes with every word of the recipe in it."""
    lines = text.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("file ")) + 1
    words = lines[place].split()
    assert words[-1].replace(",", "").isdecimal()
    lines[place] = lines[place].replace(words[-1], "BYTES")
    return "\n".join(lines) + "\n"


def test_a_plan_of_one_part(headers: ModuleType) -> None:
    tensors = [*layers(headers), headers.linear("head", 10, 64)]
    tensors.append(headers.linear("tail", 7, 64, "float32"))
    text = text_of(
        headers, [headers.source(*tensors)], rules=["layers.**"], protected=[CUSTOM, SPIKY]
    )
    assert without_bytes(text) == ONE_PART


def test_a_plan_of_two_parts_tells_what_they_share_once(headers: ModuleType) -> None:
    tensors = [*layers(headers), *headers.fp8("head", 10, 64)]
    text = text_of(
        headers,
        [headers.source(*tensors, name=name) for name in ("one", "two")],
        source={"layout": "fp8-scaled", "parts": {"one": "a", "two": "b"}},
        rules=["layers.**"],
        protected=[CUSTOM | {"parts": ["one"]}],
        target={"layout": "transformerlab"},
    )
    assert without_bytes(text) == TWO_PARTS


def test_what_a_terminal_would_act_upon_is_not_printed(headers: ModuleType) -> None:
    entry = CUSTOM | {"reason": "red\x1b[31m\nQuantized: 0 modules"}
    text = text_of(headers, [headers.source(*layers(headers))], protected=[entry])
    assert "\x1b" not in text
    assert "reason: red [31m Quantized: 0 modules" in text


def test_the_middle_of_a_long_list_is_left_out(headers: ModuleType) -> None:
    tensors = layers(headers, 200)
    odd = ",".join(str(index) for index in range(1, 200, 2))
    entry = CUSTOM | {"modules": [f"layers.{{{odd}}}.mlp"]}
    text = text_of(headers, [headers.source(*tensors)], protected=[entry])
    assert "  layers.{1,3,5,...,199}.mlp  100 " in text
    assert max(map(len, text.splitlines())) <= 120


def test_many_shards_are_summed_up(headers: ModuleType) -> None:
    target = {"layout": "int8-scaled", "max_shard_size": "17KB"}
    text = text_of(headers, [headers.source(*layers(headers, 40))], target=target)
    assert "... " in text
    assert "model-00001-of-" in text
    shown = [line for line in text.splitlines() if line.startswith("model-")]
    assert len(shown) == 15
    (summed,) = [line for line in text.splitlines() if line.startswith("... ")]
    plan = make_plan(headers.recipe(target=target), [headers.source(*layers(headers, 40))])
    assert int(summed.split()[1]) == len(plan.files) - 15
    sizes = [int(line.split()[-1].replace(",", "")) for line in [*shown, summed]]
    assert sum(sizes) == plan.output_bytes


def test_warnings_are_told(headers: ModuleType) -> None:
    tensors = [*headers.fp8("x", 64, 64), headers.tensor("x.input_scale", "float32")]
    text = text_of(headers, [headers.source(*tensors)], source={"layout": "fp8-scaled"})
    assert "warning: [x.input_scale]: static activation scales" in text


def test_who_shares_smoothing_factors_is_told(headers: ModuleType) -> None:
    smoothing = {"kind": "smoothquant", "apply": "online", "statistics": "s"}
    scheme = headers.INT8 | {"smoothing": smoothing | {"alpha": {"search": [0.5, 0.25]}}}
    fields: dict[str, Any] = {
        "schemes": {"a": scheme},
        "siblings": [["*.q", "*.k"], ["*.w1", "*.w3"]],
        "protected": [{"modules": ["3.w3"], "dtype": "bfloat16", "reason": "spikes"}],
    }
    names = [f"{index}.{name}" for index in range(3) for name in ("q", "k", "w1", "w3", "o")]
    tensors = [headers.linear(name, 8, 8) for name in [*names, "3.w1", "3.w3", "4.q", "4.k"]]
    text = text_of(headers, [headers.source(*tensors)], **fields)
    said = text[text.index("Shared smoothing factors") :].splitlines()
    assert said[:3] == [
        "Shared smoothing factors: 14 modules in 7 groups",
        "     4 x {0..2,4}.k, {0..2,4}.q",
        "     3 x {0..2}.w1, {0..2}.w3",
    ]
    assert not said[3]
    assert "smoothquant alpha 0.25 or 0.5 applied online" in text
    groups = plan_json(make_plan(headers.recipe(**fields), [headers.source(*tensors)]))
    assert {"part": "model", "modules": ["3.w1"], "unsmoothed": ["3.w3"]} in groups[
        "smoothing_groups"
    ]


# -- JSON -----------------------------------------------------------------------------------------


def test_the_json_is_complete(headers: ModuleType) -> None:
    smoothing = {"kind": "smoothquant", "alpha": 0.5, "apply": "online", "statistics": "s"}
    activation = {"format": "int8", "granularity": "token", "dynamic": True}
    scheme = headers.INT8 | {"smoothing": smoothing, "activation": activation}
    recipe = headers.recipe(
        rules=["layers.**"],
        schemes={"a": scheme},
        protected=[CUSTOM],
        target={"layout": "int8-scaled", "max_shard_size": "40KB"},
    )
    tensors = [*layers(headers), headers.linear("head", 10, 64)]
    plan = make_plan(recipe, [headers.source(*tensors)], {"s": Path("here/s")})
    said = json.loads(json.dumps(plan_json(plan)))
    assert said["recipe_sha256"] == plan.recipe_sha256
    assert (said["source_bytes"], said["output_bytes"]) == (plan.source_bytes, plan.output_bytes)
    assert said["statistics"] == {"s": str(Path("here/s"))}
    placed = [tensor for each in said["modules"] for tensor in each["tensors"].values()]
    placed += [each["tensor"] for each in said["others"]]
    fields = ("name", "dtype", "shape", "file", "offset", "bytes")
    assert {tuple(map(str, (each[field] for field in fields))) for each in placed} == {
        tuple(map(str, (t.name, t.dtype, list(t.shape), t.file, t.offset, t.nbytes)))
        for t in plan.tensors()
    }
    sources = {name for each in said["modules"] for name in each["source_tensors"].values()}
    sources |= {each["source_tensor"] for each in said["others"]}
    assert sources == {tensor.name for tensor in tensors}
    files = {each["path"]: each["bytes"] for each in said["files"]}
    assert files == {file.path: file.size for file in plan.files} | {
        path: len(content) for path, content in plan.extra_files.items()
    }
    by_name = {each["name"]: each for each in said["modules"]}
    mlp = by_name["layers.1.mlp"]
    assert (mlp["scheme"], mlp["taken_by"], mlp["pattern"]) == ("a", "/rules/0", "layers.**")
    assert mlp["smoothing"]["alpha"] == 0.5
    assert mlp["activation"]["granularity"] == "token"
    assert by_name["layers.0.mlp"]["reason"] == "first"
    assert by_name["head"]["disposition"] == "passthrough"
    assert by_name["head"]["smoothing"] is None


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def small(headers: ModuleType, tmp_path: Path) -> Path:
    headers.write_sparse(tmp_path / "source" / "model.safetensors", layers(headers))
    (tmp_path / "recipe.json").write_text(json.dumps(headers.recipe().to_json_value(), indent=2))
    return tmp_path


def test_the_command_prints_the_plan_and_writes_nothing(small: Path) -> None:
    before = sorted(small.rglob("*"))
    result = convert("--recipe", small / "recipe.json", small / "source", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("small: plain -> int8-scaled\n")
    assert "8 modules," in result.stdout
    assert not result.stderr
    assert sorted(small.rglob("*")) == before


def test_an_output_folder_is_not_made_either(small: Path) -> None:
    arguments: list[str | Path] = ["--recipe", small / "recipe.json", small / "source", "--dry-run"]
    assert convert(*arguments, "--out", small / "out").exit_code == 0
    assert not (small / "out").exists()


def test_the_command_prints_json_alone(small: Path) -> None:
    result = convert("--recipe", small / "recipe.json", small / "source", "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["recipe"] == "small"
    assert not result.stderr


def test_problems_say_where_in_the_recipe(small: Path, headers: ModuleType) -> None:
    document = headers.recipe(target={"layout": "plain"}, rules=["**", "typo"]).to_json_value()
    path = small / "recipe.json"
    path.write_text(json.dumps(document, indent=2))
    result = convert("--recipe", path, small / "source", "--dry-run", "--json")
    assert result.exit_code == 1
    problems = {each["kind"]: each for each in json.loads(result.stdout)["problems"]}
    assert problems.keys() == {"takes-nothing", "target-cannot-hold"}
    lines = path.read_text().splitlines()
    assert '"typo"' in lines[problems["takes-nothing"]["line"] - 1]
    assert '"weight"' in lines[problems["target-cannot-hold"]["line"] - 1]
    assert all(each["file"] == str(path) for each in problems.values())


def test_a_folder_may_be_called_as_a_built_in_recipe(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "int8-all-linears").mkdir()
    monkeypatch.chdir(small)
    result = convert("--recipe", "int8-all-linears", "source", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("int8-all-linears: ")


def test_statistics_that_do_not_fit(small: Path, headers: ModuleType) -> None:
    statistics = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "s.safetensors",
    }
    recipe = headers.recipe(schemes={"a": headers.INT8 | {"smoothing": statistics}})
    (small / "recipe.json").write_text(json.dumps(recipe.to_json_value(), indent=2))
    arguments: list[str | Path] = [
        "--recipe",
        small / "recipe.json",
        small / "source",
        "--dry-run",
        "--json",
    ]
    (problem,) = json.loads(convert(*arguments).stdout)["problems"]
    assert (problem["kind"], problem["pointer"]) == (
        "no-statistics",
        "/schemes/a/smoothing/statistics",
    )
    measured = [
        headers.tensor("model/layers.0.attn/input_absmax", "float32", 2, 64),
        headers.tensor("model/layers.1.attn/input_absmax", "float32", 2, 32),
    ]
    said = {
        "kind": "statistics",
        "version": 1,
        "model": "small",
        "samples": 1,
        "timesteps": [{"start": at, "stop": at + 1, "samples": 1} for at in (0, 1)],
        "modules": {"model": ["layers.0.attn", "layers.1.attn"]},
    }

    def problems(metadata: dict[str, str]) -> list[dict[str, str]]:
        header = encode_header(measured, metadata)
        size = sum(tensor.nbytes for tensor in measured)
        (small / "s.safetensors").write_bytes(header + bytes(size))
        found: list[dict[str, str]] = json.loads(convert(*arguments).stdout)["problems"]
        return found

    assert [each["kind"] for each in problems({})] == ["not-statistics"]
    found = problems({STATISTICS_KEY: json.dumps(said)})
    assert [each["kind"] for each in found] == ["statistics-mismatch"] * 7
    about = {each["tensor"]: each["message"] for each in found}
    assert "model/layers.0.attn/input_absmax" not in about
    assert "expected [bins, 64]" in about["model/layers.1.attn/input_absmax"]
    assert "not measured" in about["model/layers.0.mlp/input_absmax"]


def test_ideogram_4_in_full_size(
    headers: ModuleType, ideogram4: ModuleType, tmp_path: Path
) -> None:
    tensors = list(ideogram4.tensors(fp8=True))
    for folder in ("transformer", "unconditional_transformer"):
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        headers.write_sparse(path, tensors, {"format": "pt"})
        assert path.stat().st_size == ideogram4.FP8_FILE_BYTES
        if path.stat().st_blocks * 512 > 1 << 24:
            pytest.skip("the file system has no sparse files")
    result = convert("--recipe", "ideogram-4-int8-w8a8", tmp_path, "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    assert (
        "Quantized: 306 modules of conditional and unconditional, "
        "float8_e4m3fn channel -> int8 channel, requantized, scheme w8a8"
    ) in lines
    (qkv,) = [line for line in lines if "attention.qkv" in line]
    assert qkv.split() == [
        "layers.{0..33}.attention.qkv", "68", "[13824,", "4608]", "4.34", "GB", "4.34", "GB"
    ]  # fmt: skip
    assert "424 modules, 18.6 GB in, 21.7 GB out (117%)" in lines
