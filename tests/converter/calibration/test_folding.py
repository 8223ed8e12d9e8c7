"""Edges of folds, proven on real models: the true ones are, and every false one shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantrecipe.converter.calibration import Measurements, check_folds
from quantrecipe.schema.folds import fold_digest
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.statistics import ProvenFold
from tests.converter.folding_models import (
    DIFFUSERS_EDGES,
    EDGES,
    HIDDEN,
    WIDTH,
    Tiny,
    folds,
    ideogram4,
    runner,
    tiny_input,
)

Edge = dict[str, Any]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within it, whatever happens, no tensor of the model becomes another or changes by a bit."""
    before = {
        name: (id(one), one.clone()) for name, one in model.state_dict(keep_vars=True).items()
    }
    hooks = [len(one._forward_pre_hooks) for one in model.modules()]
    try:
        yield
    finally:
        after = model.state_dict(keep_vars=True)
        assert {name: id(one) for name, one in after.items()} == {
            name: identity for name, (identity, _) in before.items()
        }
        assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
        assert [len(one._forward_pre_hooks) for one in model.modules()] == hooks


def refused(model: nn.Module, edges: list[Edge], run: Callable[[], object]) -> tuple[Problem, ...]:
    with untouched(model), pytest.raises(InvalidInput) as caught:
        check_folds(model, folds(edges), run)
    return caught.value.problems


@given(seed=st.integers(0, 2**16))
@settings(max_examples=3)
def test_true_edges_are_proven_whatever_the_weights_and_factors(seed: int) -> None:
    model, edges = Tiny(layers=1, seed=seed), folds(EDGES)
    with untouched(model):
        proven = check_folds(model, edges, runner(model, tiny_input(seed)), seed=seed)
    assert [one.fold for one in proven] == edges
    assert [one.fold_sha256 for one in proven] == [fold_digest(edge) for edge in edges]
    assert {one.sites for one in proven} == {1}
    assert all(one.relative_error < 1e-6 for one in proven)


@pytest.mark.xdist_group("diffusers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_edges_of_ideogram_4_as_diffusers_has_it(dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers")
    model, inputs = ideogram4(dtype)
    with untouched(model):
        proven = check_folds(
            model, folds(DIFFUSERS_EDGES), runner(model, **inputs), part="conditional"
        )
    assert [(one.part, one.sites) for one in proven] == [("conditional", 2)] * 4
    assert all(one.relative_error < 1e-9 for one in proven)


def edge(*modules: str, into: str, rows: list[int] | None = None) -> Edge:
    made: Edge = {"modules": [f"layers.*.{name}" for name in modules], "into": f"layers.*.{into}"}
    return made if rows is None else made | {"rows": rows}


WRONG: Mapping[str, Edge] = {
    "w1, of which SiLU makes something else": edge("feed_forward.w2", into="feed_forward.w1"),
    "the rows of the keys": edge("attention.o", into="attention.qkv", rows=[WIDTH, 2 * WIDTH]),
    "rows beside those of the values": edge(
        "attention.o", into="attention.qkv", rows=[2 * WIDTH - 1, 3 * WIDTH - 1]
    ),
    "a reader is left out": edge("feed_forward.w1", into="ffn_norm1"),
    "the weight of a norm without its bias": edge(
        "feed_forward.w1", "feed_forward.w3", into="ffn_norm1.weight"
    ),
    "the other norm": edge("attention.qkv", into="ffn_norm1"),
    "one too many": edge("attention.qkv", "attention.o", into="attention_norm1.weight"),
    "what comes after it": edge("attention.qkv", into="attention.o"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_edge_is_refused_with_what_it_did(case: str) -> None:
    model = Tiny(layers=2)
    (problem,) = refused(model, [WRONG[case]], runner(model, tiny_input()))
    assert (problem.kind, problem.pointer) == ("fold-unproven", "/folds/0")
    assert "1e-09 is allowed" in problem.message
    assert "(2 of 2 places)" in problem.message
    assert problem.hint


def test_every_wrong_edge_is_told_at_once() -> None:
    model = Tiny(layers=1)
    problems = refused(model, list(WRONG.values())[:3], runner(model, tiny_input()))
    assert len(problems) >= 2
    assert {problem.kind for problem in problems} <= {"fold-unproven", "fold-refused"}


def test_names_and_sizes_that_the_model_has_not() -> None:
    model = Tiny(layers=1)
    edges = [
        edge("attention.nothing", into="attention_norm1.weight"),
        edge("attention.qkv", into="norm.weight"),
        edge("attention.o", into="attention.qkv"),
    ]
    problems = refused(model, edges, runner(model, tiny_input()))
    assert [(problem.kind, problem.pointer) for problem in problems] == [
        ("takes-nothing", "/folds/0/modules/0"),
        ("fold-refused", "/folds/1/into"),
        ("fold-refused", "/folds/2/into"),
    ]


def test_outputs_that_show_nothing_prove_nothing() -> None:
    model = Tiny(layers=1)
    nn.init.zeros_(model.block().feed_forward.w2.weight)
    wrong = WRONG["w1, of which SiLU makes something else"]
    for candidate in (wrong, EDGES[3]):
        (problem,) = refused(model, [candidate], runner(model, tiny_input()))
        assert "nothing is proven" in problem.message


def test_a_model_that_is_not_called_proves_nothing() -> None:
    model = Tiny(layers=1)
    (problem,) = refused(model, [EDGES[0]], lambda: None)
    assert "was called" in problem.message


def test_weights_stay_as_they_are_when_the_model_fails() -> None:
    model = Tiny(layers=1)

    def run() -> None:
        model(tiny_input())
        raise RuntimeError("out of memory")

    with untouched(model), pytest.raises(RuntimeError, match="out of memory"):
        check_folds(model, folds(EDGES), run)


class Reading(nn.Module):
    """Reads what another module's norm gives, beside that module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Tiny(layers=1).block()
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x) + self.more(self.block.attention_norm1(x))
        return out


def test_a_reader_elsewhere_in_the_model_is_found() -> None:
    model = Reading()
    run = runner(model, tiny_input())
    missing = {"modules": ["block.attention.qkv"], "into": "block.attention_norm1.weight"}
    (problem,) = refused(model, [missing], run)
    assert "outputs of the model change" in problem.message
    whole = missing | {"modules": ["block.attention.qkv", "more"]}
    assert check_folds(model, folds([whole]), run)


class Tied(nn.Module):
    """A module whose weight another one has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Tiny(layers=1).block().feed_forward
        self.other = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.other.weight = self.block.w1.weight
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(self.norm(x)) + self.block(x).sum()
        return out


def test_a_weight_that_is_used_elsewhere_as_well_is_no_reader() -> None:
    model = Tied()
    (problem,) = refused(
        model, [{"modules": ["other"], "into": "norm.weight"}], runner(model, tiny_input())
    )
    assert "outputs of the model change" in problem.message


class Uncalled(nn.Module):
    """Holds modules that its owner calls one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleDict(
            {"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH)}
        )

    def forward(self, inputs: dict[str, list[Tensor]], steps: Tensor) -> dict[str, Tensor]:
        hidden = self.held["up"](inputs["x"][0]).relu()
        return {"out": self.held["down"](hidden) * steps[0]}


def test_a_larger_module_is_taken_where_the_smallest_is_never_called() -> None:
    model = Uncalled()
    # ReLU of a positive multiple is that multiple of ReLU: this edge is true.
    true = [{"modules": ["held.down"], "into": "held.up"}]
    (proven,) = check_folds(model, folds(true), runner(model, {"x": [tiny_input()]}, torch.ones(1)))
    assert proven.relative_error < 1e-9


class Float32Only(nn.Module):
    """Takes no other dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        out: Tensor = self.down(self.up(x))
        return out


def test_a_module_that_takes_one_dtype_is_called_in_it() -> None:
    model = Float32Only()
    run = runner(model, tiny_input())
    (proven,) = check_folds(model, folds([{"modules": ["down"], "into": "up"}]), run)
    assert proven.relative_error == 0
    assert refused(model, [{"modules": ["down"], "into": "up", "rows": [0, HIDDEN - 1]}], run)


def test_a_quantized_model_is_refused() -> None:
    model = Tiny(layers=1)
    qkv = model.block().attention.qkv
    codes = torch.ones(3 * WIDTH, WIDTH, dtype=torch.int8)
    del qkv.weight
    qkv.register_buffer("weight", codes)
    problems = refused(model, [EDGES[0]], lambda: None)
    assert "int8" in problems[0].message


@given(
    runs=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2), st.floats(0, 1)))),
    seed=st.randoms(),
)
@settings(max_examples=30)
def test_proofs_are_merged_in_any_order(
    runs: list[list[tuple[int, int, float]]], seed: Any
) -> None:
    """Each edge is stated once, as it was proven in most places."""

    def merged() -> tuple[ProvenFold, ...]:
        total = Measurements("m", ((0.0, 1.0),))
        for found in runs:
            one = Measurements("m", ((0.0, 1.0),))
            one.folds = tuple(
                ProvenFold(
                    part="model",
                    fold=edges[edge],
                    fold_sha256=fold_digest(edges[edge]),
                    sites=sites,
                    relative_error=error,
                )
                for edge, sites, error in found
            )
            total.merge(one)
        return total.folds

    edges = folds(EDGES)
    first = merged()
    seed.shuffle(runs)
    assert merged() == first
    most = {
        edge: max(
            (sites, error) for found in runs for known, sites, error in found if known == edge
        )
        for edge in {edge for found in runs for edge, _, _ in found}
    }
    assert {one.fold_sha256: (one.sites, one.relative_error) for one in first} == {
        fold_digest(edges[edge]): best for edge, best in most.items()
    }
    assert len(first) == len(most)
