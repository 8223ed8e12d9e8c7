"""Observing models: what is measured, what is refused, and that nothing is left behind."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.converter.calibration import (
    Measurements,
    load_measurements,
    merge_statistics,
    observe,
    open_statistics,
)
from quantrecipe.schema.problems import InvalidInput, OutputError
from quantrecipe.testing.conformance.files import read_tensors
from tests.converter.calibration.test_sums import assert_alike
from tests.converter.making import parsed, recipe, save, save_statistics


class Block(nn.Module):
    """Attention's shape: three that share an input, two that share another, one by itself."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.w1, self.w3 = nn.Linear(width, 8), nn.Linear(width, 8)
        self.w2 = nn.Linear(8, width)

    def forward(self, x: Tensor, timestep: float | Tensor = 0.0) -> Tensor:
        y = self.q(x) + self.k(input=x) + self.v(x.view(x.shape))
        out: Tensor = self.w2(self.w1(y) * self.w3(y))
        return out


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block()


def said(error: pytest.ExceptionInfo[InvalidInput], kind: str) -> str:
    assert {problem.kind for problem in error.value.problems} == {kind}
    return str(error.value)


def of(stats: Measurements, name: str, part: str = "model") -> Mapping[str, Tensor]:
    return dict(stats.statistics())[part, name].tensors()


CONTEXTS: dict[str, AbstractContextManager[Any]] = {
    "grad": nullcontext(),
    "no_grad": torch.no_grad(),
    "inference": torch.inference_mode(),
    "autocast": torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_what_is_measured(model: Block, context: AbstractContextManager[Any]) -> None:
    x = torch.randn(2, 5, 6)
    expected = model(x)
    with observe(model, reservoir=3) as stats, context:
        model(x)
        found = model(x.flip(0))
    if context is not CONTEXTS["autocast"]:
        torch.testing.assert_close(found.flip(0), expected)
    q = of(stats, "q")
    rows = x.reshape(-1, 6)
    assert q["input_absmax"].equal(rows.abs().amax(0, keepdim=True))
    torch.testing.assert_close(q["input_second_moment"][0], rows.double().square().mean(0))
    assert q["tokens"].tolist() == [20]
    assert q["weight_absmax"].equal(model.q.weight.detach().abs().amax(0))
    assert len(q["input_tokens"]) == 3
    assert all(bool((rows == token).all(1).any()) for token in q["input_tokens"])
    assert stats.header().siblings == {"model": (("q", "k", "v"), ("w1", "w3"))}
    assert stats.header().timesteps[0].samples == stats.header().samples == 2
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in q.values())


def test_contexts_may_change(model: Block) -> None:
    with observe(model, reservoir=2) as stats:
        with torch.inference_mode():
            model(torch.ones(1, 6))
        model(torch.ones(1, 6))
    assert of(stats, "w2")["tokens"].tolist() == [2]


def test_gradients_flow_and_no_input_is_kept(model: Block) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    with observe(model, reservoir=2):
        model(x).sum().backward()
        assert x.grad is not None
        alive = weakref.ref(x)
        del x
        gc.collect()
        assert alive() is None


@given(
    x=st.lists(st.integers(-3, 3), min_size=24, max_size=24),
    cuts=st.lists(st.integers(1, 3), max_size=2),
)
@settings(max_examples=20)
def test_any_split_of_the_run_is_the_same(x: list[int], cuts: list[int]) -> None:
    torch.manual_seed(0)
    model, rows = Block(), torch.tensor(x).float().reshape(4, 6)
    with observe(model, reservoir=2) as whole:
        model(rows)
    pieces = []
    for few in rows.tensor_split(sorted(cuts)):
        with observe(model, reservoir=2) as piece:
            model(few)
        pieces.append(piece)
    total, *others = pieces
    for other in others:
        total.merge(other)
    # The inputs of all others are computed, and a product of few rows may round in another way.
    assert_alike(dict(total.statistics())["model", "q"], dict(whole.statistics())["model", "q"])
    assert set(total.header().siblings["model"]) >= {("q", "k", "v"), ("w1", "w3")}


LAYOUTS = {
    "one token": torch.randn(6),
    "many axes": torch.randn(2, 3, 1, 6),
    "not contiguous": torch.randn(6, 5).T,
    "every other": torch.randn(5, 12)[:, ::2],
    "expanded": torch.randn(1, 6).expand(4, 6),
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_shape_and_dtype(x: Tensor, dtype: torch.dtype) -> None:
    model, x = Block().to(dtype), x.to(dtype)
    with observe(model, modules=["q"]) as stats:
        model(x)
    found = of(stats, "q")
    rows = x.reshape(-1, 6)
    assert found["tokens"].tolist() == [len(rows)]
    assert found["input_absmax"].equal(rows.abs().amax(0, keepdim=True).float())


class Calls(nn.Module):
    """Two linears that a function calls."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.call = call

    def forward(self, x: Tensor) -> None:
        self.call(self, x)


def in_place(m: Calls, x: Tensor) -> None:
    y = x.clone()
    m.a(y)
    y += 1
    m.b(y)


def freed(m: Calls, x: Tensor) -> None:
    m.a(x.clone())
    m.b(x.clone())  # likely at the very same address


def once(m: Calls, x: Tensor) -> None:
    m.a(x)
    m.b(x)
    if x[0, 0] > 1:
        m.b(x)


SIBLINGS: dict[str, tuple[Any, bool]] = {
    "the same": (lambda m, x: (m.a(x), m.b(x)), True),
    "the same rows": (lambda m, x: (m.a(x), m.b(x.view(2, -1, 4))), True),
    "detached": (lambda m, x: (m.a(x), m.b(x.detach())), True),
    "the same two": (lambda m, x: (m.a(x), m.a(x[:1]), m.b(x), m.b(x[:1])), True),
    "in another order": (lambda m, x: (m.a(x), m.a(x[:1]), m.b(x[:1]), m.b(x)), False),
    "equal": (lambda m, x: (m.a(x), m.b(x.clone())), False),
    "freed in between": (freed, False),
    "written to in between": (in_place, False),
    "rows of it": (lambda m, x: (m.a(x), m.b(x[1:])), False),
    "more often, once": (once, False),
}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
@pytest.mark.parametrize(("call", "are"), SIBLINGS.values(), ids=SIBLINGS)
def test_siblings(call: Any, are: bool, inference: bool) -> None:
    model = Calls(call)
    with observe(model) as stats, torch.inference_mode(inference):
        model(torch.zeros(4, 4) + torch.arange(4)[:, None] / 8)
        model(torch.full((4, 4), 2.0) + torch.arange(4)[:, None])
    assert stats.header().siblings == ({"model": (("a", "b"),)} if are else {})


def test_what_is_called_outside_a_forward(model: Block) -> None:
    with observe(model) as stats:
        x = torch.ones(2, 6)
        model.q(x)
        model.k(x)
        model(x)
    assert of(stats, "q")["tokens"].tolist() == [4]
    assert stats.header().siblings == {"model": (("w1", "w3"),)}


EDGES = (0.0, 0.25, 0.5, 1.0)
TIMES = [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (1.0, 2), (torch.tensor([0.3, 0.4]), 1), (1, 2)]


@pytest.mark.parametrize(("timestep", "at"), TIMES)
@pytest.mark.parametrize("positional", [True, False])
def test_bins(model: Block, timestep: float | Tensor, at: int, positional: bool) -> None:
    x = torch.ones(2, 6)
    with observe(model, timesteps=EDGES) as stats:
        _ = model(x, timestep) if positional else model(x, timestep=timestep)
    assert of(stats, "w1")["tokens"].tolist() == [2 if each == at else 0 for each in range(3)]
    assert [each.samples for each in stats.header().timesteps] == [each == at for each in range(3)]


def test_a_function_finds_the_timestep(model: Block) -> None:
    with observe(model, timesteps=EDGES, timestep=lambda args, _: 1 - args[1]) as stats:
        model(torch.ones(2, 6), 0.9)
    assert of(stats, "q")["tokens"].tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("timestep", "kind"),
    [
        (1.5, "timestep-outside"),
        (-0.1, "timestep-outside"),
        (float("nan"), "timestep-outside"),
        (None, "no-timestep"),
        (torch.tensor([0.1, 0.9]), "no-timestep"),
        (torch.tensor([]), "no-timestep"),
    ],
)
def test_timesteps_that_have_no_bin(model: Block, timestep: Any, kind: str) -> None:
    with observe(model, timesteps=EDGES) as stats:
        with pytest.raises(InvalidInput) as caught:
            model(torch.ones(2, 6), timestep)
        assert "'model'" in said(caught, kind)
        model(torch.ones(2, 6), 0.3)
    assert of(stats, "q")["tokens"].tolist() == [0, 2, 0]


def test_a_forward_without_timesteps(model: Block) -> None:
    with observe(model, timesteps=EDGES):
        with pytest.raises(InvalidInput) as caught:
            model(torch.ones(2, 6))
        said(caught, "no-timestep")
        with pytest.raises(InvalidInput) as caught:
            model.q(torch.ones(2, 6))
        assert "outside a forward" in said(caught, "no-timestep")
    with (
        pytest.raises(InvalidInput) as caught,
        observe(model, timesteps=EDGES, timestep="sigma"),
    ):
        pass
    assert "x, timestep" in said(caught, "no-timestep")


@pytest.mark.parametrize("edges", [[0.0], [0.0, 0.0], [1.0, 0.0], [0.0, float("inf")]])
def test_edges_that_are_none(model: Block, edges: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending"), observe(model, timesteps=edges):
        pass


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def test_hooks_go_away(model: Block) -> None:
    with observe(model):
        assert hooks(model) == 6 + 3
    assert hooks(model) == 0
    with pytest.raises(TypeError), observe(model):
        model()
    assert hooks(model) == 0


def test_an_error_inside_a_forward(model: Block) -> None:
    """The next forward starts anew."""
    x, inputs = torch.ones(2, 6), 8
    with observe(model, timesteps=EDGES) as stats:
        model.w2.weight.data = torch.ones(6, inputs + 1)
        with pytest.raises(RuntimeError):
            model(x, 0.9)
        model.w2.weight.data = torch.ones(6, inputs)
        model(x, 0.1)
    assert of(stats, "w2")["tokens"].tolist() == [2, 0, 2]
    assert stats.header().samples == 1


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_a_nan_names_who_was_handed_it(model: Block, tmp_path: Path, bad: float) -> None:
    with torch.no_grad():
        model.w1.bias[2] = bad
    with observe(model, "conditional", timesteps=EDGES) as stats:
        with pytest.raises(InvalidInput) as caught:
            model(torch.ones(2, 6), 0.3)
        text = said(caught, "non-finite-input")
        assert "'w2' of part 'conditional'" in text
        assert "0.25 to 0.5" in text
        assert "'w1'" not in text
    with pytest.raises(InvalidInput) as caught:
        stats.save(tmp_path / "s.safetensors")
    assert "'w2' of part 'conditional'" in said(caught, "non-finite-input")


def test_nothing_of_an_input_that_is_none(model: Block) -> None:
    for x in (torch.ones(2, 5), torch.ones(2, 6).long(), [1.0] * 6, torch.tensor(1.0)):
        with observe(model, modules=["q"]), pytest.raises(InvalidInput) as caught:
            model.q(x)
        assert "'q' of part 'model' was handed" in said(caught, "not-an-input")


def test_weights_that_are_not_there(model: Block) -> None:
    hollow = Block().to("meta")
    hollow.q = nn.Linear(6, 6)
    hollow.k = nn.LazyLinear(6)
    with pytest.raises(InvalidInput) as caught, observe(hollow):
        pass
    said(caught, "no-weight")
    assert [problem.tensor for problem in caught.value.problems] == ["k", "v", "w1", "w3", "w2"]
    with torch.no_grad():
        model.v.weight[0, 0] = float("nan")
    with pytest.raises(InvalidInput) as caught, observe(model):
        pass
    assert "'v'" in said(caught, "non-finite-weight")


def as_float(module: nn.Module, args: Any) -> None:
    """What a module that knows its codes does, in short."""
    assert isinstance(module, nn.Linear)
    module.weight = nn.Parameter(module.weight.float())


def test_weights_of_codes_have_no_maxima(model: Block, tmp_path: Path) -> None:
    model.q.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    model.q.register_forward_pre_hook(as_float)
    with observe(model) as stats:
        model(torch.ones(1, 6))
    stats.save(tmp_path / "s.safetensors")
    with open_statistics(tmp_path / "s.safetensors") as file:
        assert file.module("model", "q").weight_absmax is None
        assert file.module("model", "k").weight_absmax is not None


def test_compiled_models_are_refused(model: Block) -> None:
    inside = Block()
    inside.q.compile(backend="eager")
    outside: Any = torch.compile(model, backend="eager")
    for each in (outside, inside):
        with pytest.raises(InvalidInput) as caught, observe(each):
            pass
        said(caught, "compiled")
    around = torch.compile(lambda x: model(x), backend="eager")
    with observe(model), pytest.raises(InvalidInput) as caught:
        around(torch.ones(1, 6))
    said(caught, "compiled")


class Mixed(nn.Module):
    """What is a linear, what looks like one, and what has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.turned = nn.Module()  # [in, out], as its bias shows
        self.turned.weight = nn.Parameter(torch.ones(4, 6))
        self.turned.bias = nn.Parameter(torch.ones(6))
        self.other = nn.Module()
        self.other.weight = nn.Parameter(torch.ones(6, 4))


def observed(*args: Any, **kwargs: Any) -> list[str]:
    with observe(*args, **kwargs) as stats:
        (part,) = stats.parts.values()
        return [*part.modules]


def test_linears_are_chosen() -> None:
    assert observed(Mixed()) == ["first", "blocks.0", "blocks.1", "other"]
    assert observed(Mixed(), modules=["blocks.*", "{first,nothing}"]) == [
        *("first", "blocks.0", "blocks.1"),
    ]
    with pytest.raises(InvalidInput) as caught:
        observed(Mixed(), modules=["block.*", "blocks.0"])
    assert "'block.*'" in said(caught, "takes-nothing")
    with pytest.raises(InvalidInput) as caught:
        observed(Mixed(), modules=["{"])
    said(caught, "invalid-pattern")
    with pytest.raises(ValueError, match="not both"):
        observed(Mixed(), modules=["**"], recipe=parsed(recipe()))


def test_a_recipe_chooses() -> None:
    kept = {"dtype": "bfloat16", "reason": "small"}
    document = recipe(
        rules=[
            {"modules": ["first"], "scheme": "plain"},
            {"modules": ["**"], "scheme": "all", "parts": ["model"]},
        ],
        protected=[{"modules": ["blocks.1"], **kept}],
    )
    document["source"]["parts"] = {"model": ".", "other": "o"}
    document["schemes"]["plain"] = {"weight": {"format": "bfloat16"}}
    found = parsed(document)
    assert observed(Mixed(), recipe=found) == ["blocks.0", "blocks.1", "other"]
    assert observed(Mixed(), "other", recipe=found) == ["blocks.1"]
    for model, part, kind in (
        (Mixed(), "third", "unknown-part"),
        (nn.Sequential(nn.ReLU()), "model", "takes-nothing"),
    ):
        with pytest.raises(InvalidInput) as caught:
            observed(model, part, recipe=found)
        said(caught, kind)


def test_a_recipe_with_other_names() -> None:
    """The model is called as the source is, and rules speak of the target's names."""
    names = [{"from": "blocks.*", "into": ["layers.*.a", "layers.*.b"]}]
    rules = [{"modules": ["layers.1.b"], "scheme": "all"}]
    found = parsed(recipe(target_fields={"names": names}, rules=rules))
    assert observed(Mixed(), recipe=found) == ["blocks.1"]


def test_a_recipe_whose_target_merges_what_is_observed() -> None:
    names = [{"from": ["blocks.0", "blocks.1"], "into": "both"}]
    found = parsed(
        recipe(target_fields={"names": names}, rules=[{"modules": ["both"], "scheme": "all"}])
    )
    assert observed(Mixed(), recipe=found) == ["blocks.0", "blocks.1"]


def test_modules_that_are_never_called(tmp_path: Path) -> None:
    model, path = Mixed(), tmp_path / "s.safetensors"
    model.forward = model.blocks[0].forward
    with observe(model, modules=["blocks.*"]) as stats:
        model(torch.ones(1, 4))
        model.blocks[1](torch.ones(0, 4))
    assert stats.uncalled == (("model", "blocks.0"),)
    with pytest.raises(InvalidInput) as caught:
        stats.save(path)
    assert "'blocks.0' of part 'model'" in said(caught, "never-called")
    stats.save(path, allow_uncalled=True)
    with open_statistics(path) as file:
        assert file.module("model", "blocks.0").kurtosis() == 0
    with pytest.raises(OutputError):
        stats.save(path, allow_uncalled=True)
    stats.save(path, allow_uncalled=True, force=True)


def test_nothing_was_observed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        Measurements("m", ((0, 1),)).save(tmp_path / "s.safetensors")
    said(caught, "nothing-measured")


def run(text: str, **fields: Any) -> Measurements:
    """Two parts over one prompt; the second is handed zeros."""
    torch.manual_seed(0)
    first, second = Block(), Block()
    torch.manual_seed(len(text))
    x = torch.randn(3, 6)
    with (
        observe(first, "conditional", timesteps=EDGES, name="m", reservoir=2, **fields) as stats,
        observe(second, "unconditional", into=stats, **fields),
        torch.inference_mode(),
    ):
        for time in (0.1, 0.6, 0.7):
            first(x * time, time)
            second(x * 0, time)
    stats.prompt(text)
    return stats


def test_files_are_merged(tmp_path: Path) -> None:
    texts = ("one", "three", "seventy")
    paths = [tmp_path / f"{text}.safetensors" for text in texts]
    for text, path in zip(texts, paths, strict=True):
        run(text).save(path)
    whole = run("one")
    for text in texts[1:]:
        whole.merge(run(text))
    ab, again = tmp_path / "ab.safetensors", tmp_path / "again.safetensors"
    merge_statistics(paths[:2], ab)
    merge_statistics([paths[2], ab], again)
    header = whole.header()
    assert header.samples == 3
    assert [each.samples for each in header.timesteps] == [6, 0, 12]
    assert header.prompts_sha256 is not None
    assert [*header.modules] == ["conditional", "unconditional"]
    assert header.siblings["conditional"] == (("q", "k", "v"), ("w1", "w3"))
    with open_statistics(again) as file:
        assert file.header == header
        for (part, name), expected in whole.statistics():
            assert_alike(file.module(part, name), expected)
    with pytest.raises(OutputError):
        merge_statistics(paths, ab)


def test_the_digest_is_of_all_prompts_in_any_order() -> None:
    def digest(*texts: str | bytes) -> str | None:
        stats = Measurements("m", ((0.0, 1.0),))
        for text in texts:
            stats.prompt(text)
        return stats.prompts_sha256

    assert digest("a", "b") == digest(b"b", b"a") != digest("a", "b", "b")
    assert digest() is None
    stats = Measurements("m", ((0.0, 1.0),))
    stats.prompt("a")
    stats.sample(2)
    assert stats.prompts_sha256 is None
    assert stats.samples == 3


def differently(**changes: Any) -> Measurements:
    fields: dict[str, Any] = {"name": "m", "modules": ["q", "k"], "part": "model"} | changes
    model = fields.pop("model", None)
    torch.manual_seed(0)
    with observe(Block() if model is None else model, **fields) as stats:
        return stats


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"name": "n"}, "models differ"),
    "other bins": ({"timesteps": EDGES}, "bins differ"),
    "another reservoir": ({"reservoir": 5}, "keep 0 and 5"),
    "another part": ({"part": "other"}, "has part"),
    "another module": ({"modules": ["q", "v"]}, "has 'v'"),
    "another width": ({"model": Block(7)}, "6 and 7"),
    "other weights": ({"model": Block().double().float().requires_grad_(False)}, "other weights"),
}


@pytest.mark.parametrize(("changes", "text"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_cannot_be_merged(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, stats in zip(paths, (differently(), differently(**changes)), strict=True):
        stats.save(path, allow_uncalled=True)
    mine = load_measurements(paths[0])
    with pytest.raises(InvalidInput) as caught:
        mine.merge(load_measurements(paths[1]))
    assert text in said(caught, "cannot-merge")
    with pytest.raises(InvalidInput) as caught:
        merge_statistics(paths, tmp_path / "c.safetensors")
    assert str(paths[1]) in str(caught.value)


def test_a_file_made_by_hand_cannot_be_merged(tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "s.safetensors", "model", {"a": torch.ones(1, 2)})
    with pytest.raises(InvalidInput) as caught:
        load_measurements(path)
    said(caught, "cannot-merge")


def test_a_part_goes_on(model: Block) -> None:
    with observe(model, modules=["q"], timesteps=EDGES) as stats:
        model(torch.ones(1, 6), 0.1)
    with observe(model, modules=["q"], into=stats):
        model(torch.ones(1, 6), 0.3)
    assert of(stats, "q")["tokens"].tolist() == [1, 1, 0]
    with pytest.raises(InvalidInput) as caught, observe(model, modules=["k"], into=stats):
        pass
    said(caught, "cannot-merge")
    assert hooks(model) == 0


def test_a_branch_that_is_fed_zeros_is_not_smoothed(tmp_path: Path) -> None:
    """From observing to the factors of a converted checkpoint: exactly 1 there, and not here."""
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    rules = [{"modules": ["q", "w2"], "scheme": "all"}]
    document = recipe(target="transformerlab", rules=rules)
    document["source"] = {
        "layout": "plain",
        "parts": {
            "conditional": "conditional.safetensors",
            "unconditional": "unconditional.safetensors",
        },
    }
    document["schemes"]["all"]["smoothing"] = smoothing
    document["schemes"]["all"]["activation"] = {
        "format": "int8",
        "granularity": "token",
        "dynamic": True,
    }
    found = parsed(document)
    torch.manual_seed(0)
    for part in ("conditional", "unconditional"):
        save(tmp_path / f"{part}.safetensors", Block().state_dict())
    stats = run("a prompt", recipe=found)
    stats.save(tmp_path / "statistics.safetensors")
    with open_statistics(tmp_path / "statistics.safetensors") as file:
        assert file.module("unconditional", "q").absmax().tolist() == [0] * 6
        assert file.module("unconditional", "q").max_to_median() == 1
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    convert(tmp_path / "recipe.json", tmp_path, tmp_path / "out")
    (written,) = (tmp_path / "out").glob("*.safetensors")
    smooths = {name: tensor for name, tensor in read_tensors(written).items() if "smooth" in name}
    assert len(smooths) == 4
    for name, factors in smooths.items():
        zeros = "unconditional" in name and "q" in name.split(".")
        assert bool((factors == 1).all()) is zeros, name
