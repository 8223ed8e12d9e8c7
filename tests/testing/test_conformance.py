"""Our converters and loader hold to the cases, and what is broken does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantrecipe.converter import ErrorSums, Job, plan
from quantrecipe.converter.loader_contents import Contents
from quantrecipe.converter.standalone import LOADER_NAME, loader_source
from quantrecipe.converter.streaming import StreamingConverter
from quantrecipe.loaders import Checkpoint, Names, load_model
from quantrecipe.loaders.reference import ReferenceLoader
from quantrecipe.schema.capabilities import Capabilities
from quantrecipe.schema.lock import Role
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.testing import conformance
from quantrecipe.testing.conformance import CaseTensor, cases
from quantrecipe.testing.conformance.modules import rounding
from tests.converter.using_loader import loader_of
from tests.testing import generate

ROOT = Path(__file__).parents[2]
BY_ID = {case.id: case for case in cases()}


def documented() -> str:
    """The loader that the documentation shows."""
    page = (ROOT / "docs" / "conformance.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(import json\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return str(block)


def from_source(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "docs/conformance.md", "exec"), names)
    return names


# The cases


def test_the_cases_are_those_of_exact_arithmetic() -> None:
    written = {path.name: path.read_text("utf-8") for path in generate.CASES.glob("*.json")}
    assert written == generate.documents()


def test_nothing_of_the_package_makes_them() -> None:
    code = (
        "import sys; from tests.testing import generate; generate.documents()\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'quantrecipe']"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_values_and_bytes_agree(case: conformance.Case) -> None:
    for tensors in case.target.values():
        for name, tensor in tensors.items():
            if tensor.values is None:
                continue
            assert tensor.hex is not None, name
            of_values = replace(tensor, hex=None).tensor()
            # The cast must not have rounded: the number was exact.
            assert raw(of_values) == bytes.fromhex(tensor.hex) == raw(tensor.tensor()), name
            if of_values.numel() and of_values.is_floating_point():
                assert np.array_equal(of_values.double().numpy(), np.array(tensor.values)), name


def raw(tensor: Tensor) -> bytes:
    content: bytes = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def test_ids_and_titles_are_unique_and_say_something() -> None:
    assert len(BY_ID) == len(cases())
    for case in cases():
        assert re.fullmatch(r"[a-z0-9-]+", case.id)
        assert case.title
        assert case.shows.endswith(".")


def test_every_format_and_granularity_of_version_1_has_a_case() -> None:
    found = {
        (weight["format"], weight["granularity"])
        for case in cases()
        for weight in (scheme["weight"] for scheme in case.recipe["schemes"].values())
        if not case.refused
    }
    assert found == {
        ("int8", "tensor"),
        ("int8", "channel"),
        ("int8", "group"),
        *(
            (name, granularity)
            for name in ("float8_e4m3fn", "float8_e5m2")
            for granularity in ("tensor", "channel", "block")
        ),
    }


def test_the_expected_outputs_are_within_the_bound_of_quantizing() -> None:
    for case in cases():
        for output in case.outputs:
            if output.unquantized is not None and output.bound is not None:
                error = (output.output.tensor() - output.unquantized.tensor()).abs()
                assert bool((error <= output.bound.tensor() * (1 + 4e-5)).all()), case.id
            assert bool((rounding(output) >= 0).all())


# Ours


@pytest.mark.parametrize("check", conformance.pytest_cases(converter="reference"))
def test_the_reference_converter(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("check", conformance.pytest_cases(converter="streaming"))
def test_the_streaming_converter(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("check", conformance.pytest_cases(loader="reference"))
def test_the_reference_loader(check: Callable[[], None]) -> None:
    check()


def by_kernel(kernel: str) -> conformance.LoadModel:
    """Our own loading of models, with one kernel."""

    def load(model: nn.Module, path: Path, part: str) -> nn.Module:
        load_model(model, path, part=part, kernel=kernel)
        return model

    return load


@pytest.mark.parametrize("check", conformance.pytest_cases(load_model=by_kernel("reference")))
def test_load_model_with_the_reference_kernel(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("check", conformance.pytest_cases(load_model=by_kernel("auto")))
def test_load_model(check: Callable[[], None]) -> None:
    check()


# The documented loader, and what is wrong with it when it is broken


DOCUMENTED = from_source(documented())


@pytest.mark.parametrize("check", DOCUMENTED["CASES"])
def test_the_documented_loader(check: Callable[[], None]) -> None:
    DOCUMENTED["test_conformance"](check)


def emitted(model: nn.Module, path: Path, part: str) -> nn.Module:
    """By the loader that a conversion writes beside its weights if it is told to."""
    planned = plan(path.parent / "recipe.json", path.parent / "source")
    (path / LOADER_NAME).write_bytes(loader_source(Contents.of_plan(planned)))
    loaded: nn.Module = loader_of(path).load(model, path, part=part, dtype=None)
    return loaded


@pytest.mark.parametrize("check", conformance.pytest_cases(load_model=emitted))
def test_the_loader_beside_the_weights(check: Callable[[], None]) -> None:
    check()


BROKEN = {
    "smoothing dropped": (
        "x.float() if self.smoothing is None else x.float() / self.smoothing",
        "x.float()",
        {"smoothing-online", "smoothing-weight-only", "parts-one-file"},
    ),
    "smoothing multiplied": (
        "x.float() / self.smoothing",
        "x.float() * self.smoothing",
        {"smoothing-online", "smoothing-weight-only", "parts-one-file"},
    ),
    "scale transposed": (
        "float() * step * self.scale.T",
        "float() * step * self.scale.flip(0).T",
        {"int8-channel-w8a8", "smoothing-online", "parts-two-files"},
    ),
    "blocks transposed": (
        'weight.get("block_size", [1, weight.get("group_size")])',
        'reversed(weight.get("block_size", [weight.get("group_size"), 1]))',
        {"float8-e4m3fn-block", "float8-e5m2-block"},
    ),
    "bias dropped": (
        "(y if self.bias is None else y + self.bias)",
        "y",
        {"int8-channel", "int8-channel-w8a8", "float8-e4m3fn-channel", "parts-shards"},
    ),
    "codes shifted": (
        'self.weight, self.bias = stored["weight"], stored.get("bias")',
        'self.weight, self.bias = stored["weight"].roll(1, -1), stored.get("bias")',
        {"int8-channel", "int8-channel-w8a8", "int8-group", "float8-e4m3fn-tensor"},
    ),
    "wrong part": (
        'if module["part"] == part:',
        "if True:",
        {"parts-one-file", "parts-two-files"},
    ),
    "activations not quantized": (
        "if self.int8_inputs:",
        "if False:",
        {"int8-channel-w8a8", "int8-channel-w8a8-ties", "int8-tensor", "smoothing-online"},
    ),
    "ties away from zero": (
        "(rows / step).round()",
        "((rows / step).abs() + 0.5).floor().copysign(rows)",
        {"int8-channel-w8a8-ties"},
    ),
    "one scale for all tokens": (
        "rows.abs().amax(-1, keepdim=True)",
        "rows.abs().amax()",
        {"int8-channel-w8a8", "int8-tensor"},
    ),
    "zero tokens": (
        "step = torch.where(step == 0, 1.0, step)",
        "pass",
        {"int8-channel-w8a8"},
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_loader_is_caught(how: str) -> None:
    old, new, caught = BROKEN[how]
    source = documented()
    assert source.count(old) == 1
    load = from_source(source.replace(old, new))["load"]
    report = conformance.run(load_model=load, include=sorted(caught))
    assert {result.case for result in report.of("failed")} == caught
    assert not report.ok


def test_a_model_loader_has_to_refuse_and_to_name_the_tensor() -> None:
    def careless(model: nn.Module, path: Path, part: str) -> nn.Module:
        return model

    def silent(model: nn.Module, path: Path, part: str) -> nn.Module:
        raise ValueError("no")

    include = ["refused-checkpoint-missing-scale"]
    (result,) = conformance.run(load_model=careless, include=include).results
    assert result.detail == (
        "a checkpoint was loaded that has to be refused: missing-scale at a.weight"
    )
    (result,) = conformance.run(load_model=silent, include=include).results
    assert result.detail == "refused without naming a.weight or a.weight_scale: no"


def test_numbers_that_nobody_loaded_are_seen() -> None:
    report = conformance.run(load_model=lambda model, path, part: model, include=["int8-channel"])
    (result,) = report.of("failed")
    assert "part model: block.a (weight-only, float32) at index [0, 0]: nan" in result.detail


# Broken loaders of state dicts


class Mutant(ReferenceLoader):
    """The reference loader, and then something goes wrong."""

    name = "mutant"

    def __init__(self, change: Callable[[str, Tensor, Checkpoint], Tensor | None]) -> None:
        self.change = change

    def load_state_dict(
        self,
        checkpoint: Checkpoint,
        *,
        part: str | None = None,
        names: Names = "source",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        if self.change is wrong_part:
            part = next(iter(checkpoint.parts))
        found = super().load_state_dict(checkpoint, part=part, names=names, dtype=dtype)
        changed = {key: self.change(key, tensor, checkpoint) for key, tensor in found.items()}
        return {key: tensor for key, tensor in changed.items() if tensor is not None}


def wrong_part(name: str, tensor: Tensor, checkpoint: Checkpoint) -> Tensor | None:
    return tensor


def without_smoothing(name: str, tensor: Tensor, checkpoint: Checkpoint) -> Tensor | None:
    module = checkpoint.part(None).modules.get(name.removesuffix(".weight"))
    if module is None or "smoothing" not in module.tensors:
        return tensor
    return tensor * checkpoint.tensor(module.tensors["smoothing"])


MUTANTS: dict[str, tuple[Callable[[str, Tensor, Checkpoint], Tensor | None], set[str]]] = {
    "smoothing dropped": (without_smoothing, {"smoothing-online", "smoothing-weight-only"}),
    "rows in another order": (
        lambda name, tensor, _: tensor.flip(0) if name.endswith(".weight") else tensor,
        {"int8-channel", "float8-e4m3fn-block", "plain-passed-through"},
    ),
    "bias dropped": (
        lambda name, tensor, _: None if name.endswith(".bias") else tensor,
        {"int8-channel", "source-float8-tensor", "parts-shards"},
    ),
    "codes shifted": (
        lambda name, tensor, _: tensor.roll(1, -1) if name.endswith(".weight") else tensor,
        {"int8-channel", "int8-group", "float8-e5m2-tensor"},
    ),
    "wrong part": (wrong_part, {"parts-one-file", "parts-two-files"}),
    "a bit in the last place": (
        lambda name, tensor, _: tensor * (1 + 2**-23) if name == "a.weight" else tensor,
        {"int8-tensor", "float8-e4m3fn-block"},
    ),
    "signs of zeros": (
        lambda name, tensor, _: tensor + 0.0 if tensor.is_floating_point() else tensor,
        {"float8-e4m3fn-zero-rows", "float8-e5m2-ties"},
    ),
    "another dtype": (
        lambda name, tensor, _: tensor.float() if tensor.is_floating_point() else tensor,
        {"int8-channel", "plain-bfloat16", "smoothing-online"},
    ),
}


@pytest.mark.parametrize("how", MUTANTS)
def test_a_broken_loader_is_caught(how: str) -> None:
    change, caught = MUTANTS[how]
    report = conformance.run(loader=Mutant(change), include=sorted(caught))
    assert {result.case for result in report.of("failed")} == caught


# Broken converters


class HalfAway(StreamingConverter):
    """Writes a code too high by one wherever it writes the last row."""

    name = "half-away"

    def convert(self, job: Job) -> ErrorSums | None:
        def write(role: Role, data: memoryview) -> None:
            content = bytearray(data)
            if role == "weight" and content:
                content[-1] = (content[-1] + 1) % 256
            job.write(role, memoryview(content))

        return super().convert(replace(job, write=write))


class WholeOnly(StreamingConverter):
    """Thinks that a unit is always the whole module."""

    name = "whole-only"

    def convert(self, job: Job) -> ErrorSums | None:
        unit = job.unit
        if unit.start:
            job = replace(job, unit=replace(unit, start=0, stop=unit.stop - unit.start))
        return super().convert(job)


def test_a_broken_converter_is_caught() -> None:
    report = conformance.run(converter=HalfAway(), include=["int8-*", "refused-not-a-number"])
    assert {result.case for result in report.of("passed")} == {"refused-not-a-number"}
    (line, *_) = report.of("failed")[0].detail.splitlines()
    assert line == (
        "model.safetensors: [block.a.weight] at index [2, 4]: -126.0, expected -127.0 "
        "(1 of 15 differ)"
    )


def test_a_converter_that_takes_units_for_modules_is_caught() -> None:
    report = conformance.run(converter=WholeOnly(), include=["int8-channel", "int8-tensor"])
    (failed,) = report.of("failed")
    assert failed.case == "int8-channel"
    assert failed.detail.startswith("cut into units: ")


# What is run, and what is said of it


class Narrow(ReferenceLoader):
    name = "narrow"
    capabilities = Capabilities(
        schema_versions=frozenset({1}),
        formats={"bfloat16": frozenset(), "int8": frozenset({"channel"})},
        layouts=frozenset({"int8-scaled"}),
    )


def test_what_a_candidate_does_not_claim_is_skipped() -> None:
    ids = ["int8-channel", "int8-group", "float8-e4m3fn-tensor", "smoothing-online"]
    report = conformance.run(loader=Narrow(), include=ids)
    assert {result.case: (result.outcome, result.detail) for result in report.results} == {
        "int8-channel": ("passed", ""),
        "int8-group": ("skipped", "no format int8 by group"),
        "float8-e4m3fn-tensor": (
            "skipped",
            "no layout fp8-scaled, no format float8_e4m3fn by tensor",
        ),
        "smoothing-online": ("skipped", "no activation int8, no smoothing online"),
    }
    assert report.ok


def test_a_model_loader_says_what_it_reads() -> None:
    report = conformance.run(
        load_model=DOCUMENTED["load"],
        capabilities=Narrow.capabilities,
        include=["int8-channel", "int8-group"],
    )
    assert [result.outcome for result in report.results] == ["passed", "skipped"]


def test_exclusions_and_expected_failures_have_reasons() -> None:
    report = conformance.run(
        loader=Mutant(MUTANTS["bias dropped"][0]),
        include=["int8-channel*", "int8-group"],
        exclude={"int8-channel-*": "later"},
        expected_failures={"int8-channel": "no biases yet", "int8-group": "not grouped"},
    )
    outcomes = {result.case: (result.outcome, result.detail) for result in report.results}
    assert outcomes.pop("int8-channel") == ("failed as expected", "no biases yet")
    assert outcomes.pop("int8-group") == (
        "passed unexpectedly",
        "expected to fail: not grouped",
    )
    assert set(outcomes.values()) == {("excluded", "later")}
    assert not report.ok
    assert str(report).endswith(
        "loader mutant: 1 failed as expected, 8 excluded, 1 passed unexpectedly"
    )


def test_ids_that_no_case_has_are_all_named() -> None:
    with pytest.raises(InvalidInput) as error:
        conformance.run(
            loader="reference",
            include=["int8-chanel", "int8-*"],
            exclude={"nonsense*": "why"},
            expected_failures={"refused-unknown-field": "a recipe, not a checkpoint"},
        )
    assert [problem.kind for problem in error.value.problems] == ["unknown-case"] * 3
    assert error.value.problems[0].hint == "Did you mean 'int8-channel'?"
    assert "'refused-unknown-field'" in error.value.problems[2].message


def test_one_candidate_at_a_time() -> None:
    with pytest.raises(TypeError, match="name one candidate"):
        conformance.run()
    with pytest.raises(TypeError, match="name one candidate"):
        conformance.run(converter="streaming", loader="reference")
    with pytest.raises(TypeError, match="declares its own"):
        conformance.run(loader="reference", capabilities=Narrow.capabilities)
    with pytest.raises(InvalidInput, match="Did you mean 'reference'"):
        conformance.run(loader="referense")


def test_a_candidate_that_breaks_has_failed_and_the_others_go_on() -> None:
    def explode(name: str, tensor: Tensor, checkpoint: Checkpoint) -> Tensor | None:
        raise RuntimeError(f"cannot do {name}")

    report = conformance.run(loader=Mutant(explode), include=["int8-group", "int8-tensor"])
    assert [result.outcome for result in report.results] == ["failed", "failed"]
    assert "RuntimeError: cannot do a.weight" in report.results[0].detail


def test_entries_for_pytest_carry_what_is_said_of_them() -> None:
    entries = conformance.pytest_cases(
        loader=Narrow(),
        include=["int8-channel", "int8-channel-ties", "int8-group", "int8-channel-zero-rows"],
        exclude={"int8-channel-ties": "later"},
        expected_failures={"int8-channel-zero-rows": "zeros"},
    )
    marks = {entry.id: [(mark.name, mark.kwargs) for mark in entry.marks] for entry in entries}
    assert marks == {
        "int8-channel": [],
        "int8-channel-ties": [("skip", {"reason": "later"})],
        "int8-group": [("skip", {"reason": "no format int8 by group"})],
        "int8-channel-zero-rows": [("xfail", {"reason": "zeros", "strict": True})],
    }


def test_running_needs_neither_pytest_nor_hypothesis() -> None:
    code = (
        "import sys; from quantrecipe.testing import conformance\n"
        "assert conformance.run(loader='reference', include=['int8-tensor']).ok\n"
        "assert not {'pytest', 'hypothesis', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_case_tensor_of_nothing() -> None:
    assert CaseTensor("float32", (0, 3), []).tensor().shape == (0, 3)
    assert json.loads((generate.CASES / "int8.json").read_text("utf-8"))[0]["id"] == "int8-channel"
