"""The factor stage: what it finds, that nothing but the numbers counts, and that it is kept."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import Means, convert, find_converter, plan
from quantrecipe.converter.factor_stage import FACTORS_NAME, FactorWorker, find_factors
from quantrecipe.converter.factors import Factors
from quantrecipe.converter.products import _Whole
from quantrecipe.converter.smoothing import smoothquant_factors
from quantrecipe.converter.units import cut
from quantrecipe.converter.working import Setup
from quantrecipe.evaluate import verify
from quantrecipe.loaders import load_state_dict
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.testing.strategies import GROUP_SIZE
from tests.converter.making import (
    KINDS,
    Json,
    everything,
    numbers,
    raw,
    read_lock,
    recipe,
    result_of,
    save,
    save_statistics,
    weight_spec,
)
from tests.converter.smoothed_model import CHANNELS, Model
from tests.evaluate.tampering import edit_lock, edit_tensor

W8A8 = {"activation": {"format": "int8", "granularity": "token", "dynamic": True}}
BEFORE = (("a", 9), ("b", 6))
SEARCH = {"search": [0.9, 0.5, 0.1]}


def factors_of(planned: Plan, means: Means, unit_bytes: int = 1 << 20, **options: Any) -> Factors:
    setup = Setup.of(planned, find_converter("streaming"), Path("none"), means.numbers_at_a_time)
    return find_factors(planned, cut(planned, unit_bytes), setup, means, **options)


THREE = {"0.w1": ("bfloat16", 9), "0.w3": ("float8_e4m3fn-[out]", 14), "o": ("float32", 6)}


# What it was before there were siblings


@pytest.mark.parametrize(
    ("spec", "alpha", "expected"),
    [
        (("int8",), 0.5, "6996575b1700bb592a6e0e1d3d7f980e9c5fa1a67124b78d5fcf29573f5e0a9d"),
        (("int8",), 0.3, "cc5ee835697d7b075217da6465862fed50b8f53612aaac11a32637b0a4e89563"),
        (
            ("int8", "tensor"),
            0.5,
            "558550401322661d3e2b2c46343e134463dc0ec597b9a34a46c52263ec36efbb",
        ),
        (
            ("int8", "tensor"),
            0.3,
            "8fc23f9870182e6aadf7212747a714a188aa89c8e51f5711a65f6e43ad3c3722",
        ),
        (
            ("float8_e4m3fn", "channel", "bfloat16"),
            0.5,
            "03239423cb120a0f88aa73608eeef265b1deb807b495036676e30dbdd55be064",
        ),
        (
            ("float8_e4m3fn", "channel", "bfloat16"),
            0.3,
            "7556abc69b08674081233b53f7b2724ee50cebae79915326390ff5bbee3f583b",
        ),
        (
            ("int8", "group"),
            0.5,
            "395ccab872928b9fcd3ea0e4607e541197abd527457baefff1e075669faf7259",
        ),
        (
            ("int8", "group"),
            0.3,
            "8d5472ff2a2131648b7d10a078756f5097a406528aa7a2480bdf644522cf1792",
        ),
        (
            ("float8_e5m2", "block"),
            0.5,
            "73a47e2829d3214e84f4ef868a4a0550f892fe3842b8b192cf02acadacc59460",
        ),
        (
            ("float8_e5m2", "block"),
            0.3,
            "1c02bda833a74fd9a6013b8a7e89896423de3344fdc67fc909527b40f7b3c3e5",
        ),
    ],
)
def test_without_siblings_the_bytes_are_what_they_always_were(
    tmp_path: Path, spec: tuple[str, ...], alpha: float, expected: str
) -> None:
    rng, size = np.random.default_rng(7), GROUP_SIZE * 4
    weights = {f"{name}.weight": numbers(rng, rows, size).bfloat16() for name, rows in BEFORE}
    source = save(tmp_path / "m.safetensors", weights)
    maxima = rng.lognormal(0, 2, (2, 2, size))
    maxima[..., ::5] = 0
    measured = {
        name: torch.from_numpy(m).float() for (name, _), m in zip(BEFORE, maxima, strict=True)
    }
    save_statistics(tmp_path / "s.safetensors", "model", measured)
    smoothing = {"kind": "smoothquant", "alpha": alpha, "apply": "online"}
    scheme = {
        "weight": weight_spec(*spec),
        "smoothing": smoothing | {"statistics": "s.safetensors"},
    }
    document = recipe(schemes={"all": scheme}, target=everything())
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    out = convert(tmp_path / "recipe.json", source, tmp_path / "out").out
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(out / "model.safetensors").items()):
        found.update(name.encode() + raw(tensor))
    assert found.hexdigest() == expected


# What the factors are


@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=3, max_size=3),
    alpha=st.sampled_from([0.0, 0.35, 0.5, 1.0]),
    power_of_two=st.booleans(),
    unit_bytes=st.integers(1, 3000),
    block_bytes=st.integers(1, 3000),
    jobs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15)
def test_they_are_of_the_largest_of_all_siblings(
    kinds: list[str],
    alpha: float,
    power_of_two: bool,
    unit_bytes: int,
    block_bytes: int,
    jobs: int,
    seed: int,
) -> None:
    names = ("0.w1", "0.w3", "o")
    with tempfile.TemporaryDirectory() as folder:
        rows = zip(kinds, (9, 14, 6), strict=True)
        model = Model(Path(folder), seed, dict(zip(names, rows, strict=True)))
        path = model.recipe(
            weight_spec("int8"), alpha, power_of_two=power_of_two, siblings=[["*.w1", "*.w3"]]
        )
        planned = plan(path, model.source)
        found = factors_of(planned, Means(block_bytes, jobs), unit_bytes)
    for members in (names[:2], names[2:]):
        inputs = torch.cat([model.inputs[name] for name in members]).amax(0)
        weights = torch.cat([model.weights[name] for name in members]).abs().amax(0)
        expected = smoothquant_factors(inputs, weights, alpha, power_of_two=power_of_two)
        for name in members:
            values = found.of("model", name)
            assert values is not None
            assert torch.equal(values, expected)
            assert found.group_of("model", name) in found.groups
    assert [group.modules for group in found.groups] == [names[:2], names[2:]]
    assert found.of("model", "else") is None


@given(seed=st.integers(0, 2**32 - 1), power_of_two=st.booleans())
@settings(max_examples=10)
def test_smoothing_changes_no_product(seed: int, power_of_two: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder), seed, THREE)
        path = model.recipe(
            weight_spec("int8"), power_of_two=power_of_two, siblings=[["*.w1", "*.w3"]]
        )
        found = factors_of(plan(path, model.source), Means(jobs=1))
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((7, CHANNELS)))
    for name, weight in model.weights.items():
        factors = found.of("model", name)
        assert factors is not None
        assert bool((factors > 0).all())
        assert bool(factors.isfinite().all())
        wide = factors.double()
        exact, smoothed = x @ weight.double().T, (x / wide) @ (weight.double() * wide).T
        scale = x.abs() @ weight.double().abs().T
        assert bool(((exact - smoothed).abs() <= 1e-13 * scale).all())
        if power_of_two:  # also in the arithmetic of a loader
            assert torch.equal(x.float() / factors * factors, x.float())


def test_a_group_of_one_is_no_group(tmp_path: Path) -> None:
    model = Model(tmp_path, 3, THREE)
    keep = [{"modules": ["0.w3"], "dtype": "bfloat16", "reason": "spikes"}]
    results: list[dict[str, Tensor]] = []
    for siblings in ({}, {"siblings": [["0.w1", "0.w3"]]}):
        path = model.recipe(weight_spec("int8"), protected=keep, **siblings)
        out = convert(path, model.source, tmp_path / f"out{len(results)}").out
        results.append(load_file(out / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert "0.w3.smoothing" not in results[0]


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        (None, [("0.w1", "0.w3"), ("o",)]),
        ([], [("0.w1",), ("0.w3",), ("o",)]),
        ([["0.w1", "o"]], [("0.w1", "o"), ("0.w3",)]),
    ],
    ids=["found", "none", "declared"],
)
def test_siblings_that_calibration_found_hold_where_a_recipe_names_none(
    tmp_path: Path, siblings: Any, expected: list[tuple[str, ...]]
) -> None:
    model = Model(tmp_path, 3, THREE)
    model.find_siblings(["0.w1", "0.w3"])
    fields = {} if siblings is None else {"siblings": siblings}
    path = model.recipe(weight_spec("int8"), **fields)
    out = convert(path, model.source, tmp_path / "out").out
    locked = read_lock(out)["smoothing_groups"]
    assert [tuple(group["modules"]) for group in locked] == expected
    assert {group["alpha"] for group in locked} == {0.5}
    assert verify(out, against=model.source).problems == ()


def test_found_siblings_share_with_whom_they_are_smoothed_alike(tmp_path: Path) -> None:
    model = Model(tmp_path, 3, THREE)
    model.find_siblings(list(THREE))
    path = model.recipe(weight_spec("int8"))
    document = json.loads(path.read_text())
    schemes = document["schemes"]
    schemes["other"] = json.loads(json.dumps(schemes["all"]))
    schemes["other"]["smoothing"]["alpha"] = 0.25
    document["rules"].insert(0, {"modules": ["0.w3"], "scheme": "other"})
    path.write_text(json.dumps(document))
    groups = plan(path, model.source).smoothing_groups
    assert [group.modules for group in groups] == [("0.w1", "o"), ("0.w3",)]
    out = convert(path, model.source, tmp_path / "out").out
    assert verify(out, against=model.source).problems == ()


def test_pieces_of_a_split_module_are_siblings_of_its_siblings(tmp_path: Path) -> None:
    model = Model(tmp_path, 3, {"qkv": ("bfloat16", 12), "gate": ("bfloat16", 5)})
    model.find_siblings(["gate", "qkv"])
    path = model.recipe(weight_spec("int8"))
    document = json.loads(path.read_text())
    document["target"]["names"] = [{"from": "qkv", "into": ["q", "k", "v"]}]
    path.write_text(json.dumps(document))
    (group,) = plan(path, model.source).smoothing_groups
    assert group.modules == ("gate", "k", "q", "v")
    out = convert(path, model.source, tmp_path / "out").out
    assert verify(out, against=model.source).problems == ()


def test_what_pieces_are_merged_into_is_a_sibling_of_their_siblings(tmp_path: Path) -> None:
    weights = {"q": ("bfloat16", 4), "k": ("bfloat16", 4), "gate": ("bfloat16", 5)}
    model = Model(tmp_path, 3, weights)
    model.find_siblings(["gate", "k", "q"])
    path = model.recipe(weight_spec("int8"))
    document = json.loads(path.read_text())
    document["target"]["names"] = [{"from": ["q", "k"], "into": "qk"}]
    path.write_text(json.dumps(document))
    (group,) = plan(path, model.source).smoothing_groups
    assert group.modules == ("gate", "qk")
    out = convert(path, model.source, tmp_path / "out").out
    assert verify(out, against=model.source).problems == ()


# Choosing alpha


def simulated(model: Model, members: Sequence[str], tokens: Tensor, alpha: float) -> float:
    """The error of a W8A8 product in float64, step by step."""
    inputs = torch.cat([model.inputs[name] for name in members]).amax(0)
    weights = torch.cat([model.weights[name] for name in members])
    factors = smoothquant_factors(inputs, weights.abs().amax(0), alpha)
    smoothed = [(tokens / factors), weights * factors]
    for place, side in enumerate(smoothed):
        scale = side.abs().amax(1, keepdim=True) / 127
        scale[scale == 0] = 1
        smoothed[place] = (side / scale).round().clamp(-127, 127).double() * scale.double()
    exact = tokens.double() @ weights.double().T
    return float((exact - smoothed[0] @ smoothed[1].T).square().sum())


@given(seed=st.integers(0, 2**32 - 1), unit=st.integers(400, 3000), jobs=st.integers(1, 2))
@settings(max_examples=8)
def test_the_candidate_with_the_least_error_is_taken(seed: int, unit: int, jobs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder), seed, THREE)
        rng = np.random.default_rng(seed)
        tokens = torch.from_numpy(rng.standard_normal((6, CHANNELS))).float()
        tokens = tokens * model.inputs["0.w3"].amax(0)
        model.keep_tokens({"0.w3": tokens, "o": tokens.bfloat16()})
        path = model.recipe(
            weight_spec("int8"), SEARCH, activation=W8A8["activation"], siblings=[["*.w1", "*.w3"]]
        )
        planned = plan(path, model.source)
        found = factors_of(planned, Means(unit, jobs), unit)
        again = factors_of(planned, Means(1 << 20, 1))
    for group, other in zip(found.groups, again.groups, strict=True):
        assert (group.alpha, raw(group.values)) == (other.alpha, raw(other.values))
        kept = tokens if group.modules != ("o",) else tokens.bfloat16().float()
        errors = {a: simulated(model, group.modules, kept, a) for a in SEARCH["search"]}
        assert errors[group.alpha] <= min(errors.values()) * (1 + 1e-3)


@pytest.mark.parametrize("quantizer", ["absmax", "clip-search"])
@pytest.mark.parametrize(
    "weight",
    [weight_spec("int8"), weight_spec("int4", "group") | {"symmetric": False}],
    ids=["int8", "int4"],
)
def test_the_choice_is_the_best_of_the_conversions_that_it_chose_from(
    tmp_path: Path, weight: Json, quantizer: str
) -> None:
    model = Model(tmp_path, 8, {"a": ("bfloat16", 30), "b": ("float32", 20)})
    rng = np.random.default_rng(3)
    largest = torch.maximum(model.inputs["a"], model.inputs["b"]).amax(0)
    tokens = torch.from_numpy(rng.standard_normal((12, CHANNELS))).float() * largest
    moments = tokens.double().square().mean(0).expand(2, -1).contiguous()
    model.keep_tokens({"a": tokens})
    model.add({f"{name}/input_second_moment": moments.clone() for name in "ab"})
    if quantizer == "clip-search":
        search = {"kind": quantizer, "min_clip_ratio": 0.5, "steps": 5}
        weight = weight | {"quantizer": search | {"statistics": "s.safetensors"}}
    siblings = {"siblings": [["a", "b"]]}
    errors: dict[float, float] = {}
    for alpha in SEARCH["search"]:
        path = model.recipe(weight, alpha, **siblings)
        loaded = load_state_dict(convert(path, model.source, tmp_path / str(alpha)).out)
        errors[alpha] = sum(
            float((tokens.double() @ (exact - loaded[f"{name}.weight"]).double().T).square().sum())
            for name, exact in model.weights.items()
        )
    path = model.recipe(weight, SEARCH, **siblings)
    (group,) = read_lock(convert(path, model.source, tmp_path / "out").out)["smoothing_groups"]
    assert sorted(errors.values())[1] > 1.01 * min(errors.values())
    assert errors[group["alpha"]] == min(errors.values())


def test_of_equals_the_smallest_alpha_is_taken(tmp_path: Path) -> None:
    model = Model(tmp_path, 3, THREE)
    model.keep_tokens({name: torch.zeros(2, CHANNELS) for name in THREE})
    path = model.recipe(weight_spec("int8"), SEARCH)
    out = convert(path, model.source, tmp_path / "out").out
    assert [group["alpha"] for group in read_lock(out)["smoothing_groups"]] == [0.1] * 3
    assert verify(out, against=model.source).problems == ()


@pytest.mark.parametrize("activation", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "spec",
    [
        weight_spec("int8", "tensor"),
        weight_spec("int8", "group"),
        weight_spec("float8_e5m2", "block", "bfloat16"),
        weight_spec("int4", "group"),
        weight_spec("int4", "group", "float16") | {"symmetric": False},
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_a_search_in_every_kind_of_scheme(
    tmp_path: Path, spec: Json, activation: str | None
) -> None:
    model = Model(tmp_path, 5, {"a": ("bfloat16", 13)})
    model.keep_tokens(
        {"a": torch.from_numpy(np.random.default_rng(1).normal(size=(5, CHANNELS))).float()}
    )
    fields: Json = {}
    if activation is not None:
        fields["activation"] = W8A8["activation"] | {"format": activation, "granularity": "tensor"}
    path = model.recipe(spec, SEARCH, **fields)
    planned = plan(path, model.source)
    found = [factors_of(planned, Means(size, 1)).groups[0] for size in (1, 700, 1 << 20)]
    assert len({(group.alpha, raw(group.values)) for group in found}) == 1
    assert found[0].alpha in SEARCH["search"]


@given(
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
    st.integers(-60, 60),
)
def test_products_are_exact_and_near(columns: int, seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (torch.from_numpy(rng.standard_normal((3, columns))).float() for _ in range(2))
    one, other = one * 2.0**power, other * rng.lognormal(0, 3)
    other[1] = 0
    found = _Whole.of(one).times(_Whole.of(other.float()))
    order = torch.from_numpy(rng.permutation(columns))
    assert torch.equal(_Whole.of(one[:, order]).times(_Whole.of(other.float()[:, order])), found)
    exact = one.double() @ other.double().T
    largest = one.abs().amax(1).double()[:, None] * other.abs().amax(1).double()
    assert bool(((exact - found).abs() <= columns * 2.0**-20 * largest).all())


# Where it is worked out, and how often


def test_elsewhere_it_is_the_same(tmp_path: Path) -> None:
    model = Model(tmp_path, 4, THREE)
    rng = np.random.default_rng(2)
    model.keep_tokens(
        {name: torch.from_numpy(rng.normal(size=(4, CHANNELS))).float() for name in THREE}
    )
    path = model.recipe(weight_spec("int8"), SEARCH, siblings=[["*.w1", "*.w3"]])
    expected = result_of(convert(path, model.source, tmp_path / "here").out)
    with ThreadPoolExecutor(2) as pool:
        out = convert(path, model.source, tmp_path / "there", executor=pool).out
    assert result_of(out) == expected
    out = convert(path, model.source, tmp_path / "reference", converter="reference").out
    assert result_of(out) == expected


def test_groups_that_are_done_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path, 4, THREE)
    path = model.recipe(weight_spec("int8"), siblings=[["*.w1", "*.w3"]])
    expected = result_of(convert(path, model.source, tmp_path / "expected").out)
    measure, done = FactorWorker.column_absmax, []

    def noted(worker: FactorWorker, unit: Any) -> Tensor:
        done.append(unit.of.name)
        return measure(worker, unit)

    def interrupt(count: int, name: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FactorWorker, "column_absmax", noted)
    with pytest.raises(KeyboardInterrupt):
        convert(path, model.source, tmp_path / "out", jobs=1, progress=interrupt)
    assert done[0] == "o"  # the first in the file, and alone
    done.clear()
    assert result_of(convert(path, model.source, tmp_path / "out", jobs=1).out) == expected
    assert sorted(done) == ["0.w1", "0.w3"]


def test_a_damaged_line_counts_as_not_done(tmp_path: Path) -> None:
    model = Model(tmp_path, 4, THREE)
    planned = plan(model.recipe(weight_spec("int8")), model.source)
    journal, means = tmp_path / FACTORS_NAME, Means(jobs=1)
    kept: list[None] = []
    expected = factors_of(planned, means, journal=journal, kept=lambda: kept.append(None))
    assert len(kept) == len(expected.groups) == 3
    content = bytearray(journal.read_bytes())
    content[-20] ^= 1
    journal.write_bytes(content)
    found = factors_of(planned, means, journal=journal, kept=lambda: kept.append(None))
    assert len(kept) == 4
    for group, other in zip(found.groups, expected.groups, strict=True):
        assert (group.alpha, raw(group.values)) == (other.alpha, raw(other.values))


# What is refused


def refused(path: Path, model: Model, **options: Any) -> list[tuple[str, str | None]]:
    with pytest.raises(InvalidInput) as error:
        convert(path, model.source, model.folder / "out", **options)
    assert not (model.folder / "out").exists()
    assert not (model.folder / "out.partial").exists()
    return [(problem.kind, problem.pointer or problem.tensor) for problem in error.value.problems]


def test_a_search_without_tokens(tmp_path: Path) -> None:
    model = Model(tmp_path, 4, THREE)
    model.keep_tokens({"0.w1": torch.ones(2, CHANNELS), "o": torch.ones(2, CHANNELS)})
    path = model.recipe(weight_spec("int8"), SEARCH)
    assert refused(path, model) == [("no-tokens", "/schemes/all/smoothing/alpha/search")]
    model.keep_tokens({"0.w1": torch.ones(2, CHANNELS), "o": torch.ones(2, 3)})
    assert refused(path, model) == [("bad-statistics", "model/o/input_tokens")]


def test_a_token_that_is_no_number(tmp_path: Path) -> None:
    model = Model(tmp_path, 4, {"a": ("float32", 3)})
    tokens = torch.ones(2, CHANNELS)
    tokens[1, 7] = math.nan
    model.keep_tokens({"a": tokens})
    path = model.recipe(weight_spec("int8"), SEARCH)
    assert refused(path, model) == [("bad-statistics", "model/a/input_tokens")]


def test_found_siblings_of_other_inputs(tmp_path: Path) -> None:
    model = Model(tmp_path, 4, {"a": ("float32", 3), "b": ("float32", 3)})
    save(tmp_path / "m.safetensors", {"a.weight": torch.ones(3, 8), "b.weight": torch.ones(3, 4)})
    model.inputs = {"a": torch.ones(1, 8), "b": torch.ones(1, 4)}
    save_statistics(tmp_path / "s.safetensors", "model", model.inputs)
    model.find_siblings(["a", "b"])
    assert refused(model.recipe(weight_spec("int8")), model) == [("siblings-differ", None)]


# What a lock says of it


@pytest.fixture
def smoothed(tmp_path: Path) -> tuple[Path, Model]:
    model = Model(tmp_path, 6, THREE)
    path = model.recipe(weight_spec("int8"), power_of_two=True, siblings=[["*.w1", "*.w3"]])
    out = convert(path, model.source, tmp_path / "out").out
    assert verify(out, against=model.source).problems == ()
    return out, model


TAMPERED: dict[str, tuple[Any, str]] = {
    "an alpha that nobody asked for": (
        lambda lock: lock["smoothing_groups"][0].update(alpha=0.25),
        "/smoothing_groups/0/alpha",
    ),
    "a group taken apart": (
        lambda lock: lock["smoothing_groups"][0].update(modules=["0.w1"]),
        "/smoothing_groups",
    ),
    "no groups": (lambda lock: lock.pop("smoothing_groups"), "/smoothing_groups"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_groups_of_a_lock_are_those_of_its_recipe(smoothed: tuple[Path, Model], case: str) -> None:
    change, pointer = TAMPERED[case]
    edit_lock(smoothed[0], change)
    problems = verify(smoothed[0]).problems
    assert [(problem.kind, problem.pointer) for problem in problems] == [("not-the-plan", pointer)]


def test_siblings_store_the_same_factors(smoothed: tuple[Path, Model]) -> None:
    edit_tensor(smoothed[0], "0.w3.smoothing", lambda data: data.__setitem__(3, data[3] ^ 1))
    problems = verify(smoothed[0]).problems
    assert [(problem.kind, problem.pointer) for problem in problems] == [
        ("bad-lock", "/smoothing_groups/0")
    ]


@pytest.mark.parametrize("factor", [0.0, -2.0, 3.0])
def test_factors_as_stored_are_positive_powers_of_two(
    smoothed: tuple[Path, Model], factor: float
) -> None:
    out, model = smoothed
    content = np.float32(factor).tobytes()
    edit_tensor(out, "o.smoothing", lambda data: data.__setitem__(slice(4, 8), content))
    found = [p for p in verify(out, against=model.source).problems if p.kind == "bad-factor"]
    assert [problem.tensor for problem in found] == ["o.smoothing"]
    assert f"{factor!r} at index 1" in found[0].message
