"""``load_model``: every module computes what its checkpoint says, or nothing is touched."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from quantrecipe.converter import convert
from quantrecipe.loaders import LoadReport, QuantizedLinear, load_model, load_state_dict
from quantrecipe.schema.problems import InvalidInput, Problem
from tests.converter.making import (
    WEIGHTS,
    Json,
    everything,
    parsed,
    recipe,
    save,
    save_statistics,
    weight_spec,
)

INT8 = weight_spec("int8")
TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}
SIZES = st.sampled_from([4, 8, 12])
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tower(nn.Module):
    """A bit of everything that models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 16), "down": nn.Linear(16, 12, bias=False)})
            for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 8, bias=False)
        self.gain = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("angles", torch.arange(6.0), persistent=False)


def source_of(model: nn.Module, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name not in without
    }


def converted(
    folder: Path,
    tensors: Mapping[str, Tensor],
    modules: list[str] | None = None,
    weight: Json = INT8,
    **fields: Any,
) -> Path:
    """A checkpoint of these tensors, with these modules quantized."""
    source = save(folder / "in.safetensors", tensors)
    made = recipe(weight, target=everything(), **fields)
    if modules is not None:
        made["rules"] = [{"modules": modules, "scheme": "all"}]
    return convert(parsed(made), source, folder / "out").out


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


@pytest.fixture
def made(tower: Tower, tmp_path: Path) -> Path:
    return converted(tmp_path, source_of(tower), ["blocks.**", "head"])


def on_meta(model: nn.Module) -> nn.Module:
    """A copy with every parameter and every persistent buffer on the meta device."""
    emptied = copy.deepcopy(model)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in emptied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied = made.setdefault(parameter, nn.Parameter(parameter.to("meta")))
                module._parameters[name] = tied
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set and buffer is not None:
                module._buffers[name] = buffer.to("meta")
    return emptied


def problems_of(model: nn.Module, path: Path, **options: Any) -> tuple[Problem, ...]:
    """Everything that is refused; the model has to stay what it was."""
    before = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    state = {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
    with pytest.raises(InvalidInput) as error:
        load_model(model, path, **options)
    after = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    assert after == before
    assert state == {
        name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()
    }
    return error.value.problems


def kinds(found: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return sorted((problem.kind, problem.tensor) for problem in found)


def assert_computes(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Every linear multiplies by the weight that the reference loader says it has."""
    meant = load_state_dict(path)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or f"{name}.weight" not in meant:
            continue
        weight = meant[f"{name}.weight"]
        quantized = isinstance(module, QuantizedLinear)
        used = torch.float64 if quantized else module.weight.dtype
        x = torch.randn(3, module.in_features, dtype=used)
        bias = meant.get(f"{name}.bias")
        if bias is not None and dtype is not None:
            bias = bias.to(dtype)
        if not quantized:
            weight = weight.to(dtype or weight.dtype)
        expected = functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        tolerance = 1e-6 if used == torch.float64 else 1e-1
        torch.testing.assert_close(module(x).double(), expected, rtol=tolerance, atol=tolerance)


# Any model


@dataclass(frozen=True)
class Case:
    """A model, the tensors that it is stored as, and the modules that are quantized."""

    model: nn.Module
    tensors: dict[str, Tensor]
    quantized: list[str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    stored = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    linears: list[nn.Module] = []

    def leaf() -> nn.Module:
        kind = draw(st.sampled_from(["linear", "linear", "norm", "embedding", "shared", "tied"]))
        if kind == "shared" and linears:
            return draw(st.sampled_from(linears))
        if kind == "norm":
            return nn.BatchNorm1d(draw(SIZES))
        if kind == "embedding":
            return nn.Embedding(draw(SIZES), draw(SIZES))
        made = nn.Linear(draw(SIZES), draw(SIZES), bias=draw(st.booleans()))
        if kind == "tied" and linears:
            other = draw(st.sampled_from(linears))
            assert isinstance(other, nn.Linear)
            made = nn.Linear(other.in_features, other.out_features, bias=draw(st.booleans()))
            made.weight = other.weight
        linears.append(made)
        return made

    def branch(depth: int) -> nn.Module:
        return nn.ModuleDict(
            {
                f"m{index}": branch(depth - 1) if depth and draw(st.booleans()) else leaf()
                for index in range(draw(st.integers(1, 3)))
            }
        )

    model = branch(2).to(stored)
    tensors = source_of(model)
    copies: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        copies.setdefault(id(tensor), []).append(name)
    # A checkpoint has what is tied once, or every time.
    for names in copies.values():
        if draw(st.booleans()):
            for name in names[1:]:
                del tensors[name]
    weights = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    modules = {name.removesuffix(".weight"): model.get_submodule(name[:-7]) for name in weights}
    chosen = draw(st.sets(st.sampled_from([id(m) for m in linears]))) if linears else set()
    tied = {id(m.weight) for m in linears if id(m) in chosen}
    quantized = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and id(module.weight) in tied
    ]
    return Case(model, tensors, quantized)


@given(
    case=cases(),
    weight=st.sampled_from(sorted(WEIGHTS)),
    meta=st.booleans(),
    dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
)
def test_every_module_computes_what_is_stored(
    case: Case, weight: str, meta: bool, dtype: torch.dtype | None
) -> None:
    with TemporaryDirectory() as folder:
        options: Json = {}
        if case.quantized:
            path = converted(Path(folder), case.tensors, case.quantized, WEIGHTS[weight])
        else:
            path = save(Path(folder) / "model.safetensors", case.tensors)
            options = {"layout": "plain"}
        model = on_meta(case.model) if meta else copy.deepcopy(case.model)
        ties = sorted(names_by_tensor(model))
        report = load_model(model, path, dtype=dtype, kernel="reference", **options)
        if case.quantized:
            assert_computes(model, path, dtype)
        assert report.quantized == len(
            {id(module) for module in model.modules() if isinstance(module, QuantizedLinear)}
        )
        on_disk = load_file(path / "model.safetensors" if path.is_dir() else path)
        state = model.state_dict(keep_vars=True)
        for name, tensor in on_disk.items():
            kept = tensor if dtype is None or not plain(name, tensor) else tensor.to(dtype)
            assert torch.equal(raw(state[name]), raw(kept)), name
        assert not any(tensor.is_meta for tensor in state.values())
        still = {tuple(n for n in names if n in state) for names in names_by_tensor(model)}
        assert {tuple(names) for names in ties} <= still


def plain(name: str, tensor: Tensor) -> bool:
    """Whether a stored tensor follows ``dtype``."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and "_scale" not in name


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def names_by_tensor(model: nn.Module) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return [sorted(names) for names in found.values()]


def test_activations_and_smoothing_are_those_of_the_scheme(
    tmp_path: Path, tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    maxima = {f"blocks.{index}.up": torch.rand(2, 12) + 0.1 for index in range(2)}
    save_statistics(tmp_path / "statistics.safetensors", "model", maxima)
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    schemes = {
        "smooth": {"weight": INT8, "activation": TOKEN, "smoothing": smoothing},
        "only": {"weight": INT8},
    }
    rules = [
        {"modules": ["blocks.*.up"], "scheme": "smooth"},
        {"modules": ["head"], "scheme": "only"},
    ]
    path = converted(tmp_path, source_of(tower), schemes=schemes, rules=rules)
    locked, unlocked = on_meta(tower), on_meta(tower)
    report = load_model(locked, path)
    (path / "recipe.lock.json").unlink()
    load_model(unlocked, path)
    for model in (locked, unlocked):
        up, head = model.blocks[0]["up"], model.head  # type: ignore[index]
        assert isinstance(up, QuantizedLinear)
        assert isinstance(head, QuantizedLinear)
        assert up.activation is not None
        assert (up.activation.format, up.activation.granularity) == ("int8", "token")
        assert up.smoothing is not None
        assert (head.activation, head.smoothing) == (None, None)
        meant = load_state_dict(path)
        x = torch.randn(64, 12, dtype=torch.float64)
        expected = x @ meant["blocks.0.up.weight"].double().T + meant["blocks.0.up.bias"]
        torch.testing.assert_close(up(x), expected, rtol=0.05, atol=0.05)
    assert (report.quantized, report.kernels) == (3, {"int_mm": 2, "dequantized": 1})


def test_the_names_are_those_of_the_layout(tmp_path: Path, tower: Tower) -> None:
    source = save(tmp_path / "in.safetensors", source_of(tower))
    rules = [{"modules": ["blocks.**"], "scheme": "all"}]
    document = recipe(INT8, target="transformerlab", rules=rules)
    path = convert(parsed(document), source, tmp_path / "out").out
    load_model(tower, path)
    on_disk = load_file(path / "model.safetensors")
    state = {f"model.{name}": tensor for name, tensor in tower.state_dict().items()}
    assert state.keys() == on_disk.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in on_disk.items())
    again = load_model(tower, path)
    assert again.quantized == 4


def test_a_second_load_fills_quantized_linears_in_place(made: Path, tower: Tower) -> None:
    load_model(tower, made)
    linears = [module for module in tower.modules() if isinstance(module, QuantizedLinear)]
    codes = [module.weight for module in linears]
    load_model(tower, made, kernel="reference")
    assert linears == [m for m in tower.modules() if isinstance(m, QuantizedLinear)]
    assert not any(module.weight is old for module, old in zip(linears, codes, strict=True))
    assert {module.kernel for module in linears} == {"reference"}
    assert_computes(tower, made)


def test_a_quantized_linear_of_another_format_is_refused(
    made: Path, tower: Tower, tmp_path: Path
) -> None:
    load_model(tower, made)
    fp8 = converted(
        tmp_path / "fp8", source_of(Tower()), ["head"], weight_spec("float8_e4m3fn", "tensor")
    )
    found = problems_of(tower, fp8)
    assert {problem.kind for problem in found} == {"other-format"}
    assert {problem.tensor for problem in found} == {
        "head.weight",
        *(f"blocks.{index}.{name}.weight" for index in range(2) for name in ("up", "down")),
    }


def test_what_a_model_trains_and_hooks_stays_so(made: Path, tower: Tower) -> None:
    tower.gain.requires_grad_(False)
    tower.eval()
    calls: list[str] = []
    tower.head.register_forward_hook(lambda *_: calls.append("head"))
    load_model(tower, made)
    assert not tower.gain.requires_grad
    assert tower.norm.weight.requires_grad
    assert not tower.head.weight.requires_grad
    assert not any(module.training for module in tower.modules())
    tower.head(torch.randn(2, 12))
    assert calls == ["head"]


def test_recurrent_modules_compute_with_what_was_loaded(tmp_path: Path) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "out": nn.Linear(4, 8)})
    path = converted(tmp_path, source_of(model), ["out"])
    other = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "out": nn.Linear(4, 8)})
    load_model(other, path)
    x = torch.randn(3, 2, 4)
    assert torch.equal(other["rnn"](x)[0], model["rnn"](x)[0])


def test_nothing_of_the_old_model_is_kept(made: Path, tower: Tower) -> None:
    old: list[weakref.ref[Any]] = [weakref.ref(tensor) for tensor in tower.parameters()]
    old += [weakref.ref(module) for module in tower.modules() if isinstance(module, nn.Linear)]
    load_model(tower, made)
    assert [ref() for ref in old if ref() is not None] == []


def test_the_report(made: Path, tower: Tower) -> None:
    report = load_model(on_meta(tower), made, dtype=torch.bfloat16)
    assert isinstance(report, LoadReport)
    assert (report.quantized, report.plain, report.others) == (5, 1, 7)
    stored = load_file(made / "model.safetensors")
    wanted = sum(
        tensor.numel() * (2 if plain(name, tensor) else tensor.itemsize)
        for name, tensor in stored.items()
    )
    assert report.nbytes == {"cpu": wanted}
    text = str(report)
    assert "5 quantized, 1 plain" in text
    assert "dequantized: 5" in text


def test_the_dtype_is_of_plain_tensors_alone(made: Path, tower: Tower) -> None:
    load_model(tower, made, dtype=torch.float16)
    state = tower.state_dict()
    assert {str(state[name].dtype)[6:] for name in ("gain", "norm.weight", "blocks.0.up.bias")} == {
        "float16"
    }
    assert state["steps"].dtype == torch.int64
    assert state["head.weight"].dtype == torch.int8
    assert state["head.weight_scale"].dtype == torch.float32
    with pytest.raises(ValueError, match="does not hold plain numbers"):
        load_model(tower, made, dtype=torch.int8)


def test_a_number_beyond_the_dtype_is_refused(tmp_path: Path, tower: Tower) -> None:
    tensors = source_of(tower)
    tensors["gain"][1] = 1e6
    path = converted(tmp_path, tensors, ["head"])
    with pytest.raises(InvalidInput, match="too large for float16") as error:
        load_model(tower, path, dtype=torch.float16)
    assert kinds(error.value.problems) == [("out-of-range", "gain")]


def test_an_infinity_that_is_stored_is_kept(tmp_path: Path, tower: Tower) -> None:
    tensors = source_of(tower)
    tensors["gain"][1] = -torch.inf
    load_model(tower, converted(tmp_path, tensors, ["head"]), dtype=torch.float16)
    assert float(tower.gain.detach()[1]) == -torch.inf


# Wrappers


def test_compiled_models_and_parts_of_them(made: Path, tower: Tower) -> None:
    compiled = torch.compile(tower, backend="eager")
    tower.blocks[0] = torch.compile(tower.blocks[0], backend="eager")  # type: ignore[assignment]
    assert isinstance(compiled, nn.Module)
    assert load_model(compiled, made).quantized == 5
    assert isinstance(tower.head, QuantizedLinear)


def test_data_parallel(made: Path, tower: Tower) -> None:
    assert load_model(nn.DataParallel(tower), made).quantized == 5


class Adapter(nn.Module):
    """An adapter on a linear, built like those of peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


def test_adapters_stay_and_what_they_adapt_is_replaced(made: Path, tower: Tower) -> None:
    tower.head = Adapter(tower.head)  # type: ignore[assignment]
    adapter = [*tower.head.lora_A.parameters(), *tower.head.lora_B.parameters()]  # type: ignore[union-attr]
    load_model(tower, made)
    assert isinstance(tower.head.base_layer, QuantizedLinear)
    after = [*tower.head.lora_A.parameters(), *tower.head.lora_B.parameters()]  # type: ignore[union-attr]
    assert all(one is other for one, other in zip(adapter, after, strict=True))


def test_an_adapter_without_values_is_refused(made: Path, tower: Tower) -> None:
    tower.head = Adapter(tower.head).to("meta")  # type: ignore[assignment]
    assert kinds(problems_of(tower, made)) == [
        ("adapter-without-values", "head.lora_A.default.weight"),
        ("adapter-without-values", "head.lora_B.default.weight"),
    ]


class OwnForward(nn.Linear):
    """A linear that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def replacing(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[Tower], None]:
    def change(tower: Tower) -> None:
        parent, _, attribute = name.rpartition(".")
        owner = tower.get_submodule(parent)
        setattr(owner, attribute, make(tower.get_submodule(name)))

    return change


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (replacing("head", lambda _: nn.Conv2d(12, 8, 1)), "not-a-linear", "a Conv2d"),
        (replacing("head", lambda _: nn.Embedding(8, 12)), "not-a-linear", "an? Embedding"),
        (
            replacing("head", lambda _: OwnForward(12, 8, bias=False)),
            "not-a-linear",
            "forward of its own",
        ),
        (
            replacing("head", lambda _: nn.MultiheadAttention(8, 1).out_proj),
            "not-a-linear",
            "MultiheadAttention",
        ),
        (replacing("head", weight_norm), "parametrized", "Take the parametrization off"),
        (
            replacing("head", lambda m: torch.compile(m, backend="eager")),  # type: ignore[arg-type, return-value]
            "closed-wrapper",
            "Load first",
        ),
        (
            replacing("head", lambda _: nn.Linear(12, 9, bias=False)),
            "misshaped-tensor",
            r"\[9, 12\]",
        ),
        (replacing("head", lambda _: nn.LazyLinear(8, bias=False)), "lazy-parameter", "no shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_modules_that_have_no_quantized_form(
    made: Path, tower: Tower, change: Callable[[Tower], None], kind: str, words: str
) -> None:
    change(tower)
    with pytest.raises(InvalidInput, match=words) as error:
        load_model(tower, made)
    assert [problem.kind for problem in error.value.problems] == [kind]
    assert error.value.problems[0].tensor == "head.weight"


def test_a_parametrized_plain_module_is_refused(tmp_path: Path, tower: Tower) -> None:
    path = converted(tmp_path, source_of(tower), ["blocks.**"])
    orthogonal(tower.head)
    assert kinds(problems_of(tower, path)) == [("parametrized", "head.weight")]


# What does not fit


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path, tower: Tower) -> None:
    tensors = source_of(tower, without=("gain",))
    tensors["gian"] = torch.zeros(3)
    tensors["steps"] = torch.zeros(5)
    tensors["norm.weight"] = torch.zeros(7)
    tensors["angles"] = torch.zeros(6)
    tensors["mid.weight"] = torch.randn(4, 4)
    tensors["blocks.0.down.bias"] = torch.zeros(12)
    del tensors["blocks.1.up.bias"]
    path = converted(tmp_path, tensors, ["blocks.**", "mid"])
    found = problems_of(tower, path)
    assert kinds(found) == [
        ("extra-tensor", "angles"),
        ("extra-tensor", "blocks.0.down.bias"),
        ("extra-tensor", "gian"),
        ("misshaped-tensor", "norm.weight"),
        ("missing-tensor", "blocks.1.up.bias"),
        ("missing-tensor", "gain"),
        ("mistyped-tensor", "steps"),
        ("unknown-module", "mid.weight"),
    ]
    by_tensor = {problem.tensor: problem for problem in found}
    assert by_tensor["gian"].hint == "Did you mean 'gain'?"
    assert by_tensor["gain"].hint == "Did you mean 'gian'?"
    assert "keeps 'angles' out of checkpoints" in by_tensor["angles"].message


@pytest.mark.parametrize("inside", [True, False])
def test_a_prefix_is_said_once(tmp_path: Path, tower: Tower, inside: bool) -> None:
    wrapped = nn.ModuleDict({"model": tower})
    path = converted(
        tmp_path,
        source_of(tower if inside else wrapped),
        ["**.blocks.**", "**.head"] if not inside else ["blocks.**", "head"],
    )
    (problem,) = problems_of(wrapped if inside else tower, path)
    assert problem.kind == "other-prefix"
    assert "'model.'" in problem.message
    assert problem.hint is not None
    assert "'model'" in problem.hint


def test_buffers_without_values_are_refused(made: Path) -> None:
    with torch.device("meta"):
        model = Tower()
    (problem,) = problems_of(model, made)
    assert (problem.kind, problem.tensor) == ("buffer-without-values", "angles")
    assert problem.hint is not None
    assert "without_weights" in problem.hint
    model.angles = torch.zeros(6)
    load_model(model, made)
    assert_computes(model, made)


def test_copies_of_what_is_tied_must_be_the_same(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "e": nn.Embedding(8, 4)})
    tensors = source_of(model)
    model["b"].weight = model["a"].weight
    path = converted(tmp_path, tensors, ["a", "b"])
    found = problems_of(model, path)
    assert kinds(found) == [("tied-differ", "b.weight"), ("tied-differ", "b.weight_scale")]


def test_an_embedding_may_be_plain_where_the_linear_tied_to_it_is_not(tmp_path: Path) -> None:
    model = nn.ModuleDict({"e": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["e"].weight
    path = converted(tmp_path, source_of(model), ["head"])
    load_model(model, path)
    assert isinstance(model["head"], QuantizedLinear)
    assert_computes(model, path)
    without = converted(tmp_path / "2", source_of(model_of_two(), ("e.weight",)), ["head"])
    assert kinds(problems_of(model_of_two(), without)) == [("missing-tensor", "e.weight")]


def model_of_two() -> nn.Module:
    model = nn.ModuleDict({"e": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["e"].weight
    return model


def test_kernels_that_are_unknown_or_refuse(made: Path, tower: Tower) -> None:
    assert [p.kind for p in problems_of(tower, made, kernel="int_m")] == ["unknown-kernel"]
    (problem,) = problems_of(tower, made, kernel="int_mm")
    assert problem.kind == "kernel-refuses"
    assert "5 modules" in problem.message


def test_allowing_plain_numbers_is_left_to_the_kernels(made: Path, tower: Tower) -> None:
    load_model(tower, made, allow_dequantized=True)
    assert tower.head.kernel == "auto+dequantized"
    assert tower.head(torch.randn(2, 12)).shape == (2, 8)


# Damage


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors of a converted checkpoint, header untouched."""
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = load_file(file)
    change(tensors)
    for name, tensor in tensors.items():
        start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
        data[start:stop] = raw(tensor).numpy().tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["gain", "head.weight", "steps"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_digests(made: Path, tower: Tower, name: str, dtype: torch.dtype | None) -> None:
    load_model(on_meta(tower), made, check="digests", dtype=dtype)

    def change(tensors: dict[str, Tensor]) -> None:
        raw(tensors[name])[0] ^= 1

    rewritten(made, change)
    load_model(on_meta(tower), made)
    with pytest.raises(InvalidInput, match="on the meta device") as error:
        load_model(tower, made, check="digests", dtype=dtype)
    assert kinds(error.value.problems) == [("digest-mismatch", name)]
    assert tower.gain.is_meta


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_are_positive_and_finite(made: Path, tower: Tower, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["head.weight_scale"].view(-1)[3] = value

    rewritten(made, change)
    with pytest.raises(InvalidInput, match=r"scale .* at index \[3") as error:
        load_model(tower, made)
    assert kinds(error.value.problems) == [("bad-scale", "head.weight_scale")]
    assert tower.head.weight.is_meta


def test_a_file_that_changes_meanwhile(
    made: Path, tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantrecipe.loaders import loading

    whole = loading._make_room

    def truncating(*args: Any) -> None:
        whole(*args)
        file = made / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])

    monkeypatch.setattr(loading, "_make_room", truncating)
    with pytest.raises(InvalidInput) as error:
        load_model(tower, made)
    assert [problem.kind for problem in error.value.problems] == ["source-changed"]
    assert "load into it again" in error.value.__notes__[0]


# Devices


def test_a_device_map_by_the_longest_name(made: Path, tower: Tower) -> None:
    devices: dict[str, Any] = {
        "": "cpu",
        "blocks": "meta",
        "blocks.1": torch.device("cpu"),
        "blocks.1.up": "meta",
    }
    report = load_model(tower, made, device=devices)
    state = tower.state_dict()
    apart = {name for name, tensor in state.items() if tensor.is_meta}
    assert apart == {name for name in state if name.startswith(("blocks.0", "blocks.1.up"))}
    assert set(report.nbytes) == {"cpu", "meta"}
    assert report.nbytes["meta"] == sum(state[name].nbytes for name in apart)


@pytest.mark.parametrize(
    ("device", "kind", "words"),
    [
        ("disk", "no-device", "not left on the disk"),
        ({"": "cpu", "head": "disk"}, "no-device", "of 'head'"),
        ("gpu", "no-device", "'gpu' is not known"),
        ({"": "cpu", "haed": "cpu"}, "unknown-module", "Did you mean 'head'"),
        pytest.param("cuda:99", "no-device", "there (is|are)", id="cuda:99"),
    ],
)
def test_devices_that_are_refused(
    made: Path, tower: Tower, device: Any, kind: str, words: str
) -> None:
    found = problems_of(tower, made, device=device)
    assert [problem.kind for problem in found] == [kind]
    with pytest.raises(InvalidInput, match=words):
        load_model(tower, made, device=device)


def test_a_device_map_covers_everything(made: Path, tower: Tower) -> None:
    found = problems_of(tower, made, device={"blocks": "cpu", "head": "cpu", "embed": "cpu"})
    assert {problem.kind for problem in found} == {"no-device"}
    assert {problem.tensor for problem in found} == {
        "gain",
        "steps",
        "angles",
        *(f"norm.{name}" for name in tower.norm.state_dict()),
    }


def test_what_is_tied_goes_to_one_device(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)})
    model["b"].weight = model["a"].weight
    path = converted(tmp_path, source_of(model), ["a", "b"])
    found = problems_of(model, path, device={"a": "cpu", "b": "meta"})
    assert {problem.kind for problem in found} == {"tied-apart"}


# Memory


PROGRAM = """
import sys
import torch
from torch import nn
from quantrecipe.loaders import load_model
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(24)))
load_model(nn.Sequential(nn.Linear(4, 4)), sys.argv[2])
def kilobytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
before = kilobytes("VmRSS")
load_model(model, sys.argv[1], layout="int8-scaled", kernel="reference")
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_model(tmp_path: Path) -> None:
    tensors = {}
    for index in range(24):
        tensors[f"{index}.weight"] = torch.ones(4096, 4096, dtype=torch.int8)
        tensors[f"{index}.weight_scale"] = torch.ones(4096, 1)
    save_file(tensors, tmp_path / "big.safetensors", {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    warm = converted(tmp_path, {"0.weight": torch.randn(4, 4), "0.bias": torch.zeros(4)}, ["0"])
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "big.safetensors", warm],
        capture_output=True,
        text=True,
        check=True,
    )
    assert size - (8 << 20) < int(ran.stdout) < size + (64 << 20)


# GPUs


@cuda
def test_a_gpu_gets_the_same_and_little_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({f"m{i}": nn.Linear(2048, 4096) for i in range(8)})
    path = converted(tmp_path, source_of(model), [f"m{i}" for i in range(6)])
    here, there = on_meta(model), on_meta(model)
    assert isinstance(here, nn.ModuleDict)
    assert isinstance(there, nn.ModuleDict)
    load_model(here, path)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = load_model(there, path, device="cuda", check="digests")
    peak = torch.cuda.max_memory_allocated() - before
    size = sum(report.nbytes.values())
    assert peak <= 1.02 * size + (1 << 20)
    for name, tensor in there.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(raw(tensor.cpu()), raw(here.state_dict()[name]))
    x = torch.randn(4, 2048)
    torch.testing.assert_close(there["m0"](x.cuda()).cpu(), here["m0"](x), rtol=1e-2, atol=1e-2)


@cuda
def test_a_model_over_a_gpu_and_the_cpu_in_another_dtype(made: Path, tower: Tower) -> None:
    here = on_meta(tower)
    load_model(here, made, dtype=torch.bfloat16)
    load_model(tower, made, dtype=torch.bfloat16, device={"": "cpu", "blocks": 0, "norm": "cuda:0"})
    for name, tensor in tower.state_dict().items():
        assert tensor.is_cuda == name.startswith(("blocks", "norm"))
        assert torch.equal(raw(tensor.cpu()), raw(here.state_dict()[name]))
    assert not tower.angles.is_cuda


@cuda
def test_bad_scales_on_a_gpu(made: Path, tower: Tower) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["head.weight_scale"].view(-1)[3] = 0

    rewritten(made, change)
    with pytest.raises(InvalidInput, match=r"scale 0.0 at index \[3"):
        load_model(tower, made, device="cuda")
