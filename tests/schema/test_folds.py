"""Where smoothing is folded into: edges found in headers, and everything that is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.folds import FoldSite, find_sites
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recipe import Fold, Recipe

SMOOTHING = {"kind": "smoothquant", "alpha": 0.5, "apply": "fold", "statistics": "s.safetensors"}
INT8 = {"format": "int8", "granularity": "channel"}
SCHEMES = {"f": {"weight": INT8, "smoothing": SMOOTHING}}
WIDTH, HIDDEN = 4, 6


def fold(*modules: str, into: str, rows: list[int] | None = None) -> dict[str, Any]:
    edge: dict[str, Any] = {"modules": list(modules), "into": into}
    return edge if rows is None else edge | {"rows": rows}


EDGES = [
    fold("layers.*.qkv", into="layers.*.norm1.weight"),
    fold("layers.*.o", into="layers.*.qkv", rows=[2 * WIDTH, 3 * WIDTH]),
    fold("layers.*.w1", "layers.*.w3", into="layers.*.norm2"),
    fold("layers.*.w2", into="layers.*.w3"),
]
"""The edges of a block of a transformer."""


def block(headers: ModuleType, layer: int = 0, dtype: str = "bfloat16") -> list[Any]:
    """A block whose second norm has a bias."""
    at = f"layers.{layer}"
    shapes = {"qkv": (3 * WIDTH, WIDTH), "o": (WIDTH, WIDTH), "w2": (WIDTH, HIDDEN)}
    shapes |= {"w1": (HIDDEN, WIDTH), "w3": (HIDDEN, WIDTH)}
    tensors = [headers.linear(f"{at}.{name}", *shape, dtype) for name, shape in shapes.items()]
    vectors = ("norm1.weight", "norm2.weight", "norm2.bias")
    return tensors + [headers.tensor(f"{at}.{name}", dtype, WIDTH) for name in vectors]


def recipe(headers: ModuleType, edges: list[Any] = EDGES, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "schemes": SCHEMES,
        "rules": [{"modules": ["**"], "scheme": "f"}],
        "folds": edges,
    }
    made: Recipe = headers.recipe(**(fields | changes))
    return made


def brief(problems: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.pointer) for problem in problems]


def plain(site: FoldSite) -> tuple[tuple[str, ...], str, int, int]:
    return site.modules, site.into, site.start, site.stop


def test_every_edge_is_found_in_every_layer(headers: ModuleType) -> None:
    source = headers.source(*block(headers, 0), *block(headers, 11))
    plan = make_plan(recipe(headers), [source])
    expected = []
    for at in ("layers.0", "layers.11"):
        expected += [
            ((f"{at}.qkv",), f"{at}.norm1.weight", 0, WIDTH),
            ((f"{at}.w1", f"{at}.w3"), f"{at}.norm2", 0, WIDTH),
            ((f"{at}.o",), f"{at}.qkv", 2 * WIDTH, 3 * WIDTH),
            ((f"{at}.w2",), f"{at}.w3", 0, HIDDEN),
        ]
    assert [plain(site) for site in plan.folds] == expected
    assert {module.name for module in plan.modules if module.divided} == {
        f"layers.{layer}.{name}" for layer in (0, 11) for name in ("qkv", "w3")
    }
    assert all(module.multiplied for module in plan.modules)
    assert all(other.divided for other in plan.others)
    norms = {site.into: site.vectors for site in plan.folds if site.module is None}
    assert norms["layers.0.norm2"] == ("layers.0.norm2.weight", "layers.0.norm2.bias")


def test_edges_speak_of_the_names_of_the_target(headers: ModuleType) -> None:
    names = [{"from": "layers.*.qkv", "into": [f"layers.*.to_{which}" for which in "qkv"]}]
    target = {"layout": headers.layout(), "names": names}
    edges = [fold("layers.*.o", into="layers.*.to_v")]
    rules = [{"modules": ["layers.*.o"], "scheme": "f"}]
    wanted = recipe(headers, edges, target=target, rules=rules)
    plan = make_plan(wanted, [headers.source(*block(headers))])
    (site,) = plan.folds
    assert plain(site) == (("layers.0.o",), "layers.0.to_v", 0, WIDTH)


def test_an_edge_of_which_nothing_is_folded_changes_nothing(headers: ModuleType) -> None:
    online = {"a": {"weight": INT8, "smoothing": SMOOTHING | {"apply": "online"}}}
    rules = [{"modules": ["**"], "scheme": "a"}]
    plan = make_plan(
        recipe(headers, schemes=online, rules=rules), [headers.source(*block(headers))]
    )
    assert not plan.folds
    assert not any(module.multiplied or module.divided for module in plan.modules)
    assert not any(other.divided for other in plan.others)


def test_what_is_not_smoothed_is_multiplied_where_a_sibling_is(headers: ModuleType) -> None:
    protected = [{"modules": ["**.w1"], "dtype": "bfloat16", "reason": "on purpose"}]
    plan = make_plan(recipe(headers, protected=protected), [headers.source(*block(headers))])
    (w1,) = [module for module in plan.modules if module.name == "layers.0.w1"]
    assert w1.multiplied
    assert not w1.carried
    assert w1.weight == w1.source.weight


KEEP = {"layout": "int8-scaled", "passthrough_dtype": "keep"}
PROTECT = {"dtype": "bfloat16", "reason": "on purpose"}

REFUSED: dict[str, tuple[Mapping[str, Any], list[tuple[str, str]]]] = {
    "no edge": ({"folds": EDGES[1:]}, [("fold-without-edge", "/schemes/f/smoothing/apply")]),
    "an edge that fits nothing": (
        {"folds": [*EDGES, fold("layer.*.qkv", into="layer.*.norm")]},
        [("takes-nothing", "/folds/4/modules/0")],
    ),
    "nothing to fold into": (
        {"folds": [fold("layers.*.qkv", into="layers.*.norm0.weight"), *EDGES[1:]]},
        [("fold-refused", "/folds/0/into")],
    ),
    "a module by the name of its weight": (
        {"folds": [*EDGES[:3], fold("layers.*.w2", into="layers.*.w3.weight")]},
        [("fold-refused", "/folds/3/into")],
    ),
    "rows of another number": (
        {"folds": [EDGES[0], fold("layers.*.o", into="layers.*.qkv"), *EDGES[2:]]},
        [("fold-refused", "/folds/1/into")],
    ),
    "rows that are not there": (
        {"folds": [EDGES[0], fold("layers.*.o", into="layers.*.qkv", rows=[9, 13]), *EDGES[2:]]},
        [("fold-refused", "/folds/1/rows")],
    ),
    "rows that are divided twice": (
        {
            "folds": [
                *(edge for edge in EDGES if edge is not EDGES[2]),
                fold("layers.*.w1", into="layers.*.norm2"),
                fold("layers.*.w3", into="layers.*.norm2"),
            ]
        },
        [("fold-refused", "/folds/4/into")],
    ),
    "a module that two edges take": (
        {"folds": [*EDGES, fold("layers.*.qkv", into="layers.*.norm2.weight")]},
        [("fold-refused", "/folds/4/modules"), ("fold-refused", "/folds/4/into")],
    ),
    "a sibling that divides its input itself": (
        {
            "schemes": SCHEMES
            | {"a": {"weight": INT8, "smoothing": SMOOTHING | {"apply": "online"}}},
            "rules": [
                {"modules": ["**.w1"], "scheme": "a"},
                {"modules": ["**"], "scheme": "f"},
            ],
        },
        [("fold-refused", "/folds/2/modules")],
    ),
    "siblings that are smoothed differently": (
        {
            "schemes": SCHEMES | {"a": {"weight": INT8, "smoothing": SMOOTHING | {"alpha": 0.25}}},
            "rules": [
                {"modules": ["**.w1"], "scheme": "a"},
                {"modules": ["**"], "scheme": "f"},
            ],
        },
        [("fold-refused", "/folds/2/modules")],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_refused(headers: ModuleType, case: str) -> None:
    changes, expected = REFUSED[case]
    problems = headers.problems(recipe(headers, **changes), headers.source(*block(headers)))
    assert brief(problems) == expected
    assert all(problem.hint for problem in problems)


def test_what_is_kept_as_it_is_stored_is_neither_multiplied_nor_divided(
    headers: ModuleType,
) -> None:
    tensors = [
        *headers.fp8("a", WIDTH, WIDTH),
        *headers.fp8("b", WIDTH, WIDTH),
        *headers.fp8("c", WIDTH, WIDTH),
    ]
    wanted = recipe(
        headers,
        [fold("b", "c", into="a")],
        source={"layout": "fp8-scaled"},
        target={"layout": headers.layout("quantrecipe", config=None), "passthrough_dtype": "keep"},
        rules=[{"modules": ["b"], "scheme": "f"}],
    )
    problems = headers.problems(wanted, headers.source(*tensors))
    assert brief(problems) == [
        ("fold-refused", "/folds/0/modules"),
        ("fold-refused", "/folds/0/into"),
    ]
    assert [problem.tensor for problem in problems] == ["c", "a"]


def test_a_reason_is_told_once_for_all_layers(headers: ModuleType) -> None:
    source = headers.source(*(each for layer in range(20) for each in block(headers, layer)))
    edges = [fold("layers.*.qkv", into="layers.*.norm.weight"), *EDGES[1:]]
    (problem,) = headers.problems(recipe(headers, edges), source)
    assert problem.tensor == "layers.0.norm.weight"
    assert "(20 modules, the first named)" in problem.message


NAME = st.lists(st.sampled_from("abc"), min_size=2, max_size=4).map(".".join)


@given(names=st.sets(NAME, max_size=20), data=st.data())
def test_stars_line_up_whatever_the_names(names: set[str], data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(["*.a", "a.*.*", "*.b.*", "b.c"]))
    into = ".".join(["up", *(["*"] * pattern.count("*"))])
    edge = Fold.model_validate({"modules": (pattern,), "into": into})
    modules = dict.fromkeys(names, (3, 3))
    ups = {}
    for name in names:
        wanted = pattern.split(".")
        if len(name.split(".")) == len(wanted):
            stars = [
                one for one, two in zip(name.split("."), wanted, strict=True) if two in ("*", one)
            ]
            if len(stars) == len(wanted):
                kept = [o for o, two in zip(name.split("."), wanted, strict=True) if two == "*"]
                ups[".".join(["up", *kept])] = name
    found = find_sites([edge], "model", modules, dict.fromkeys(ups, (3,)))
    assert not list(found.reasons)
    assert {site.into: site.modules for site in found.sites} == {
        into: (name,) for into, name in ups.items()
    }
    assert found.covered == set(ups.values())
