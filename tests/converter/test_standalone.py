"""The loader that is written beside the weights, held to the reference loader and definitions."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe import loaders
from quantrecipe.converter import convert
from quantrecipe.converter import safetensors_loader as template
from quantrecipe.converter.loader_contents import Contents
from quantrecipe.converter.standalone import loader_source, with_ranges
from quantrecipe.converter.templates import Value, render
from quantrecipe.evaluate import verify
from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.validation import load_lock
from tests.converter.making import (
    Json,
    numbers,
    parsed,
    recipe,
    save,
    save_statistics,
    small,
    spread,
    tree,
    weight_spec,
)
from tests.converter.using_loader import Job, build, loader_of

DRIVER = Path(__file__).with_name("using_loader.py")
NAME = "safetensors_loader.py"
ACTIVATIONS: tuple[tuple[str, str] | None, ...] = (
    None,
    ("int8", "token"),
    ("int8", "tensor"),
    ("float8_e4m3fn", "token"),
    ("float8_e4m3fn", "tensor"),
)
SHAPES = {
    "one": (1, 8),
    "layers.0.up": (8, 12),
    "layers.1.up": (8, 12),
    "layers.0.down": (130, 260),
    "wide.0": (24, 2056),
}
ODD = {"odd.1": (7, 13), "layers.3.up": (1, 1)}
BIASED = {"layers.0.up", "wide.0", "odd.1"}


def every_way() -> Iterator[tuple[str, Json]]:
    """Layout and scheme: every built-in layout, and all that it can hold."""
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    scales = ("float32", "bfloat16", "float16")
    float8 = ("float8_e4m3fn", "float8_e5m2")
    held = [("plain", name, "") for name in ("float64", "float32", "float16", "bfloat16")]
    held += [("fp8-scaled", name, by) for name in float8 for by in ("tensor", "channel", "block")]
    held += [("int8-scaled", "int8", by) for by in ("tensor", "channel", "group")]
    held += [("transformerlab", "int8", "channel")]
    for number, (layout, name, granularity) in enumerate(held):
        for index, activation in enumerate(ACTIVATIONS):
            dtype = scales[(number + index) % 3] if layout != "transformerlab" else "float32"
            weight: Json = {"format": name}
            if granularity:
                weight = weight_spec(name, granularity, dtype)
            if granularity == "block":
                weight["block_size"] = [128, 128]
            scheme: Json = {"weight": weight}
            if activation is not None:
                kind, by = activation
                scheme["activation"] = {"format": kind, "granularity": by, "dynamic": True}
            yield layout, scheme
            if name == "int8":
                yield layout, {**scheme, "smoothing": smoothing}


def checkpoint(folder: Path, layout: str, scheme: Json) -> Path:
    """Convert linears of many shapes by one scheme; what it cannot take is protected."""
    rng = np.random.default_rng(sum(json.dumps(scheme).encode()))
    group = scheme["weight"].get("granularity") == "group"
    tensors: dict[str, Tensor] = {}
    for name, shape in {**SHAPES, **ODD}.items():
        tensors[f"{name}.weight"] = numbers(rng, *shape).float()
        if name in BIASED:
            tensors[f"{name}.bias"] = torch.from_numpy(rng.standard_normal(shape[0])).bfloat16()
    tensors |= {"norm.weight": torch.ones(5).bfloat16(), "ids": torch.arange(6).view(2, 3)}
    save(folder / "in.safetensors", tensors)
    odd = {"modules": ["odd.*", "layers.3.up"], "dtype": "float16", "reason": "odd"}
    maxima = {
        name: torch.from_numpy(2.0 ** rng.uniform(-3, 5, (2, shape[1]))).float()
        for name, shape in {**SHAPES, **ODD}.items()
    }
    save_statistics(folder / "statistics.safetensors", "model", maxima)
    document = recipe(
        target=layout,
        target_fields={"emit_loader": True, "max_shard_size": "30KB"},
        schemes={"all": scheme},
        protected=[odd] if group else [],
    )
    path = folder / "recipe.json"
    path.write_text(json.dumps(document))
    return convert(path, folder / "in.safetensors", folder / "out").out


def inputs_of(out: Path) -> dict[str, Tensor]:
    """For each module inputs of few and of many rows, float32 and bfloat16, zero rows too."""
    rng = np.random.default_rng(5)
    found: dict[str, Tensor] = {}
    for name, (_, columns) in {**SHAPES, **ODD}.items():
        for shape, dtype in (
            ((3, columns), torch.float32),
            ((2, 9, columns), torch.bfloat16),
            ((columns,), torch.float16),
            ((0, columns), torch.float32),
        ):
            x = rng.standard_normal(shape) * 2.0 ** rng.integers(-8, 4, (*shape[:-1], 1))
            x[:1] *= len(shape) != 2
            found[f"{name}/{len(found)}"] = torch.from_numpy(x).to(dtype)
    return found


def job(out: Path, part: str | None, inputs: dict[str, Tensor]) -> Job:
    folder = out.with_name(f"job-{part}")
    save(folder / "inputs.safetensors", inputs)
    with open_checkpoint(out) as opened:
        contents = opened.part(part)
        return {
            "folder": str(out),
            "part": part,
            "linears": {
                name: (each.out_features, each.in_features, "bias" in each.tensors)
                for name, each in contents.modules.items()
            },
            "others": {
                name: (list(info.shape), info.dtype) for name, info in contents.others.items()
            },
            "inputs": str(folder / "inputs.safetensors"),
            "state": str(folder / "state.safetensors"),
            "outputs": str(folder / "outputs.safetensors"),
        }


def run_alone(jobs: list[Job], tmp_path: Path) -> None:
    """Run jobs where this package cannot be imported."""
    listed = tmp_path / "jobs.json"
    listed.write_text(json.dumps(jobs))
    result = subprocess.run(
        [sys.executable, "-I", str(DRIVER), str(listed)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def quantized_inputs(x: Tensor, kind: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by their definition, in float32 as numpy computes it."""
    rows = x.float().numpy()
    largest = np.float32({"int8": 127, "float8_e4m3fn": 448}[kind])
    amax = np.abs(rows).max(axis=1 if granularity == "token" else None, keepdims=True)
    scale = np.where(amax / largest == 0, np.float32(1), amax / largest)
    ratio = np.clip(rows / scale, -largest, largest)
    if kind == "int8":
        return np.rint(ratio).astype(np.float64), scale.astype(np.float64)
    return torch.from_numpy(ratio).to(torch.float8_e4m3fn).double().numpy(), scale.astype(float)


def check_outputs(out: Path, part: str | None, work: Job, scheme: Json) -> None:
    """Every output is what the definitions give in float64, but for the rounding of float32."""
    found = load_file(work["outputs"])
    activation = scheme.get("activation")
    with open_checkpoint(out) as opened:
        contents = opened.part(part)
        inputs = load_file(work["inputs"])
        quantized = {name for name in contents.modules if is_quantized(opened, part, name)}
        if isinstance(scheme["weight"].get("granularity"), str) or activation:
            assert {key.rpartition("/")[0] for key in found} == quantized != set()
        for key, y in found.items():
            name, x = key.rpartition("/")[0], inputs[key]
            module = contents.modules[name]
            assert y.shape == (*x.shape[:-1], module.out_features)
            assert y.dtype == x.dtype
            if not x.numel():
                continue
            weight = stored_weight(opened, part, name)
            bias = module.tensors.get("bias")
            rows = x.reshape(-1, module.in_features)
            smoothing = module.tensors.get("smoothing")
            if smoothing is not None:
                rows = rows.float() / opened.tensor(smoothing)
            # Multiplied out in the dtype of the inputs, else in float32.
            slack = (module.in_features + 4) * 2.0**-23 + 3 * torch.finfo(x.dtype).eps
            if activation:
                codes, scale = quantized_inputs(
                    rows, activation["format"], activation["granularity"]
                )
                values = codes * scale
                by = scheme["weight"].get("granularity")
                exact = activation["format"] == module.weight.format == "int8" and by != "group"
                slack = 2.0**-48 if exact else (module.in_features + 4) * 2.0**-23
            else:
                values = rows.double().numpy()
            expected = values @ weight.T
            allowed = slack * (np.abs(values) @ np.abs(weight).T) + 2.0**-22 * np.abs(expected)
            if bias is not None:
                added = opened.tensor(bias).double().numpy()
                expected = expected + added
                allowed = allowed + 2.0**-23 * np.abs(added) + slack * np.abs(added)
            allowed = allowed + (torch.finfo(x.dtype).eps / 2 + 2.0**-24) * np.abs(expected)
            allowed = allowed + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
            got = y.double().reshape(expected.shape).numpy()
            worst = np.nanmax(np.abs(got - expected) / allowed)
            assert worst <= 1, (key, scheme, worst)


def stored_weight(opened: Checkpoint, part: str | None, name: str) -> np.ndarray:
    """Codes times scales, not rounded."""
    module = opened.module(name, part)
    shape = module.out_features, module.in_features
    codes = opened.stored(name, part).codes(0, shape[0]).double()
    if not isinstance(module.weight, PlainWeight):
        scale = opened.stored(name, part).scales(0, shape[0])
        codes = codes * spread(scale, shape, module.weight.group_shape(*shape))
    return np.asarray(codes)


def is_quantized(opened: Checkpoint, part: str | None, name: str) -> bool:
    locked = opened.locked(name, part or next(iter(opened.parts)))
    return locked is not None and locked.disposition == "quantized"


def from_lock(out: Path) -> bytes:
    """The loader that the lock of a checkpoint makes."""
    return loader_source(Contents.of_lock(load_lock(out / "recipe.lock.json")))


@pytest.mark.parametrize("layout", ["plain", "fp8-scaled", "int8-scaled", "transformerlab"])
def test_it_agrees_with_the_reference_loader_and_with_the_definitions(
    tmp_path: Path, layout: str
) -> None:
    made = []
    for number, (where, scheme) in enumerate(every_way()):
        if where == layout:
            out = checkpoint(tmp_path / str(number), where, scheme)
            made.append((out, scheme, job(out, None, inputs_of(out))))
    run_alone([work for *_, work in made], tmp_path)
    for out, scheme, work in made:
        assert from_lock(out) == (out / NAME).read_bytes()
        assert_same_state(load_file(work["state"]), load_state_dict(out))
        check_outputs(out, None, work, scheme)


def test_w8a8_stays_within_its_bound(tmp_path: Path) -> None:
    """The bound on ``abs(y - y_hat)`` of weights and inputs in INT8, from the original weights."""
    made = []
    for number, (layout, scheme) in enumerate(every_way()):
        weight, activation = scheme["weight"], scheme.get("activation")
        in_integers = weight["format"] == "int8" and weight["granularity"] != "group"
        if not in_integers or activation is None or activation["format"] != "int8":
            continue
        if weight["scale_dtype"] == "float32":
            made.append((checkpoint(tmp_path / str(number), layout, scheme), activation))
    assert len(made) >= 6
    inputs = {key: x for key, x in inputs_of(made[0][0]).items() if x.numel()}
    for out, activation in made:
        original = load_file(out.parent / "in.safetensors")
        loader = loader_of(out)
        work = job(out, None, inputs)
        model = loader.load(build(work["linears"], work["others"]))
        with open_checkpoint(out) as opened:
            for key, x in inputs.items():
                name = key.rpartition("/")[0]
                linear, stored = model.get_submodule(name), opened.module(name)
                columns = stored.in_features
                smooth = torch.ones(columns).double()
                if "smoothing" in stored.tensors:
                    smooth = opened.tensor(stored.tensors["smoothing"]).double()
                rows = (x.reshape(-1, columns).double() / smooth).numpy()
                weight = original[f"{name}.weight"].double().mul(smooth).numpy()
                s_w = (
                    opened.stored(name)
                    .scales(0, stored.out_features)
                    .double()
                    .numpy()
                    .reshape(1, -1)
                )
                per = 1 if activation["granularity"] == "token" else None
                s_x = np.abs(rows).max(axis=per, keepdims=True) / 127
                l1 = np.abs(rows).sum(1, keepdims=True), np.abs(weight).sum(1)
                expected = rows @ weight.T
                bound = (s_w * l1[0] + s_x * l1[1]) / 2 + columns * s_x * s_w / 4
                bound = bound * (1 + 4e-5)
                if linear.bias is not None:
                    expected = expected + linear.bias.double().numpy()
                got = linear(x).double().reshape(expected.shape).numpy()
                bound = bound + (4 * 2.0**-24 + torch.finfo(x.dtype).eps) * np.abs(got)
                assert (np.abs(got - expected) <= bound + 1e-12).all(), (key, out)


# Parts, files, and what does not fit

PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
TARGETS: dict[str, Json] = {
    "one file": {"layout": "transformerlab", "file": "deep/all.safetensors"},
    "shards": {"layout": "transformerlab", "max_shard_size": "80B"},
    "folders": {
        "layout": "int8-scaled",
        "parts": {part: f"{place}/m.safetensors" for part, place in PARTS.items()},
    },
}


def two_parts(folder: Path, target: Json) -> Path:
    for index, place in enumerate(PARTS.values()):
        small(folder / "in" / place / "m.safetensors", seed=index)
    document = recipe() | {"source": {"layout": "plain", "parts": PARTS}}
    document["target"] = target | {"emit_loader": True}
    return convert(parsed(document), folder / "in", folder / "out").out


def one(folder: Path, **fields: Any) -> Path:
    small(folder / "in.safetensors")
    document = recipe(target_fields={"emit_loader": True}, **fields)
    return convert(parsed(document), folder / "in.safetensors", folder / "out").out


def small_model(**changes: Any) -> nn.Module:
    linears = {"a": (8, 12, True), "b": (5, 8, False)} | changes
    return build(linears, {"norm.weight": ([8], "bfloat16")})


def test_parts_are_loaded_one_at_a_time(tmp_path: Path) -> None:
    outs = [two_parts(tmp_path / name, target) for name, target in TARGETS.items()]
    x = {"a/0": torch.randn(4, 12), "b/1": torch.randn(4, 8)}
    jobs = [job(out, part, x) for out in outs for part in PARTS]
    run_alone(jobs, tmp_path)
    assert all(from_lock(out) == (out / NAME).read_bytes() for out in outs)
    scheme: Json = {"weight": weight_spec("int8")}
    for work in jobs:
        out, part = Path(work["folder"]), work["part"]
        assert_same_state(load_file(work["state"]), load_state_dict(out, part=part))
        check_outputs(out, part, work, scheme)
    loader = loader_of(outs[0])
    with pytest.raises(ValueError, match="one of 'conditional', 'unconditional'"):
        loader.state_dict()
    with pytest.raises(ValueError, match="part='both'"):
        loader.load(small_model(), part="both")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_graph_of_its_linears_has_no_break(tmp_path: Path) -> None:
    scheme = {
        "weight": weight_spec("int8"),
        "activation": {"format": "int8", "granularity": "token", "dynamic": True},
    }
    out = one(tmp_path, schemes={"all": scheme})
    model = loader_of(out).load(small_model(), out, dtype=torch.float32)
    x = torch.randn(3, 12)
    compiled: Any = torch.compile(model.a, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model.a(x))


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    out = one(tmp_path)
    loader = loader_of(out)
    tensors = load_file(out / "model.safetensors")
    del tensors["a.bias"]
    tensors["b.weight"] = tensors["b.weight"][:, :-1].contiguous()
    tensors["a.weight_scale"] = tensors["a.weight_scale"].half()
    tensors["more"] = torch.ones(1)
    save_file(tensors, out / "model.safetensors")
    model = build({"a": (8, 12, False), "b": (5, 9, False), "c": (2, 2, True)}, {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^9 thing\(s\) do not fit") as error:
        loader.load(model)
    for line in (
        "extra: 'more' is in no part",
        "missing: 'a.bias' is in no file",
        "misshaped: 'b.weight' is [5, 7], not [5, 8]",
        "mistyped: 'a.weight_scale' is F16, not F32",
        "extra: the model has no 'a.bias'",
        "misshaped: 'b.weight' is [5, 8], and [5, 9] in the model",
        "extra: the model has no 'norm.weight'",
        "missing: the checkpoint has no 'c.weight'",
        "missing: the checkpoint has no 'c.bias'",
    ):
        assert f"\n  {line}" in str(error.value)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match=r"^4 thing\(s\) do not fit"):
        loader.state_dict()
    (out / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing file"):
        loader.state_dict()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    out = two_parts(tmp_path, TARGETS["shards"])
    first, second, *_ = sorted(out.glob("*.safetensors"))
    tensors = load_file(first) | load_file(second)
    save_file(tensors, second)
    with pytest.raises(ValueError, match=r"extra: '.*' is in two files"):
        loader_of(out).state_dict(part="conditional")


def test_numbers_do_not_go_where_integers_are(tmp_path: Path) -> None:
    out = one(tmp_path)
    model = build({"a": (8, 12, True), "b": (5, 8, False)}, {"norm.weight": ([8], "int64")})
    with pytest.raises(ValueError, match=r"mistyped: 'norm\.weight' is torch\.int64 in the model"):
        loader_of(out).load(model)


# In a model


def test_only_plain_linears_are_replaced(tmp_path: Path) -> None:
    class Special(nn.Linear):
        """Its ``forward`` might be anything."""

    out = one(tmp_path)
    loader, state = loader_of(out), load_state_dict(out)
    model = small_model()
    model.a, model.b = Special(12, 8), nn.Embedding(5, 8)
    loader.load(model, dtype=torch.float32)
    assert type(model.a) is Special
    assert torch.equal(model.a.weight, state["a.weight"])
    assert torch.equal(model.b.weight, state["b.weight"])
    assert loader.load(small_model(), dtype=torch.float16).norm.weight.dtype == torch.float16


def test_tied_weights_and_shared_modules_stay_so(tmp_path: Path) -> None:
    out = one(tmp_path, protected=[{"modules": ["b"], "dtype": "float32", "reason": "tied"}])
    model: Any = small_model()
    model.head = nn.Linear(8, 5, bias=False)
    model.head.weight = model.b.weight
    model.again = model.a
    loader_of(out).load(model)
    assert model.head.weight is model.b.weight
    assert model.again is model.a
    assert type(model.a).__name__ == "QuantizedLinear"


@pytest.mark.parametrize(
    "without_weights", [template.without_weights, loaders.without_weights], ids=["emitted", "ours"]
)
def test_parameters_take_no_memory_and_buffers_are_made(
    without_weights: Callable[[], AbstractContextManager[None]],
) -> None:
    register = nn.Module.register_parameter
    with without_weights():
        model: Any = nn.Sequential(nn.Linear(1 << 20, 8, bias=False), nn.BatchNorm1d(8))
        model.tied = nn.Linear(1 << 20, 8, bias=False)
        model.tied.weight = model[0].weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model[1].running_var, torch.ones(8))
    assert model.tied.weight is model[0].weight
    assert nn.Module.register_parameter is register


def test_what_no_checkpoint_holds_has_to_be_there(tmp_path: Path) -> None:
    out = one(tmp_path)
    loader = loader_of(out)
    with torch.device("meta"):
        model = small_model()
    model.register_buffer("made", torch.ones(2, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="missing: 'made' is meta"):
        loader.load(model)
    model.register_buffer("made", torch.ones(2), persistent=False)
    assert not any(tensor.is_meta for tensor in loader.load(model).state_dict().values())


def test_moving_a_model_never_rounds_what_is_quantized(tmp_path: Path) -> None:
    out = one(tmp_path)
    model = loader_of(out).load(small_model())
    x = torch.randn(3, 12)
    before, y = {**model.a.state_dict()}, model.a(x)
    model.half().double().to("cpu", torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16
    for name, tensor in model.a.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.a(x), y)


# Arithmetic


@given(
    st.integers(0, 20), st.integers(1, 3000), st.integers(1, 9), st.sampled_from([1, 7, 127, 128])
)
def test_integers_are_multiplied_exactly(rows: int, terms: int, outputs: int, most: int) -> None:
    rng = np.random.default_rng(rows + terms)
    x = rng.integers(-most, min(most, 127), (rows, terms), endpoint=True).astype(np.int8)
    weight = rng.integers(-128, -most + 1, (outputs, terms)).astype(np.int8)
    found = template.int_matmul(torch.from_numpy(x), torch.from_numpy(weight))
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), x.astype(np.int64) @ weight.astype(np.int64).T)


def test_inputs_are_divided_truly_and_rounded_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, -0.0, 0.0, 0.0]])
    codes, scale = template.quantize(x, "int8", "token")
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [1.0]]
    assert template.quantize(x, "int8", "tensor")[1].tolist() == [[1.0]]
    tiny, scale = template.quantize(torch.tensor([[1e-45, 0.0]]), "int8", "token")
    assert (tiny.tolist(), scale.tolist()) == ([[0, 0]], [[1.0]])
    wide = template.quantize(torch.tensor([[1e30, 1.0]]), "float8_e4m3fn", "token")[0]
    assert wide.float().tolist() == [[448.0, 0.0]]


def test_what_is_no_number_stays_in_its_row(tmp_path: Path) -> None:
    scheme = {
        "weight": weight_spec("int8"),
        "activation": {"format": "int8", "granularity": "token", "dynamic": True},
    }
    model = loader_of(one(tmp_path, schemes={"all": scheme})).load(small_model())
    x = torch.randn(3, 12)
    x[1, 4] = torch.nan
    y = model.a(x)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[0], model.a(x[:1])[0])
    assert bool(y[2].isfinite().all())


# Names, and the text of the file

HOSTILE = [
    "quote'",
    'double"',
    'triple"""',
    "'''); import os; ('",
    "new\nline",
    "back\\slash\\",
    "bidi\u202e\u2066",
    "{}",
    "{0}{module}{part}",
    "# </checkpoint>\n",
    "\u2028é\U0001f600",
    "layers.01.x",
    "layers.1.x",
    "layers.2.x",
    "layers.10.",
    "..",
    "__class__",
]
NAMES = st.lists(
    st.one_of(
        st.sampled_from(HOSTILE),
        st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=12),
        st.from_regex(r"[ab](\.(0|1|2|3|03|10|x)){0,3}\.?", fullmatch=True),
    ),
    unique=True,
)


@given(NAMES)
def test_names_and_ranges_stand_for_each_other(names: list[str]) -> None:
    written = tuple(with_ranges(names))
    read: Any = eval(compile(render(written), "names", "eval"), {"range": range})
    assert sorted(template._expand(read)) == sorted(names)
    assert tuple(with_ranges(sorted(names))) == tuple(
        with_ranges(sorted(names, reverse=True)[::-1])
    )


@given(NAMES)
def test_a_name_is_written_as_one_literal_of_one_line(names: list[str]) -> None:
    value: Value = {"names": {(1, 2): tuple(names), (3,): ()}, "none": None}
    text = render(value)
    assert ast.literal_eval(text) == value
    assert text.isascii()
    assert set(text) <= {"\n", *map(chr, range(32, 127))}
    assert all(len(line) <= 100 or line.count("'") + line.count('"') for line in text.split("\n"))


def test_numbers_that_run_on_are_ranges() -> None:
    names = ["top", *(f"layers.{n}.up" for n in (0, 1, 2, 5, 7, 8)), "layers.01.up", "x.3"]
    assert tuple(with_ranges(names)) == (
        "top",
        ("layers.", range(3), ".up"),
        "layers.5.up",
        ("layers.", range(7, 9), ".up"),
        "layers.01.up",
        "x.3",
    )


def skeleton(source: str) -> str:
    """The code of a loader without the two values that say what the checkpoint is."""
    nodes = ast.parse(source)
    for node in nodes.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and ast.unparse(node).startswith(
            ("RECIPE = ", "PARTS: ")
        ):
            node.value = ast.Constant(None)
    return ast.dump(nodes)


def test_names_never_become_code(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {f"m{name}.weight": numbers(rng, 3, 4).float() for name in HOSTILE}
    tensors |= {f"o{name}": torch.ones(2) for name in HOSTILE}
    save(tmp_path / "in.safetensors", tensors)
    document = recipe(target_fields={"emit_loader": True})
    out = convert(parsed(document), tmp_path / "in.safetensors", tmp_path / "out").out
    source = (out / NAME).read_text("ascii")
    assert skeleton(source) == skeleton(Path(template.__file__).read_text("utf-8"))
    assert source.count("# <checkpoint>") == 0
    assert_same_state(loader_of(out).state_dict(), load_state_dict(out))


def test_the_file_needs_torch_and_safetensors_only() -> None:
    source = Path(template.__file__).read_text("utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "safetensors"}


def test_what_is_in_the_checkpoint_is_printed(tmp_path: Path) -> None:
    out = two_parts(tmp_path, TARGETS["one file"])
    result = subprocess.run(
        [sys.executable, "-I", str(out / NAME)], capture_output=True, text=True, check=True
    )
    _, _, heading, *rows = result.stdout.splitlines()
    assert heading.split() == ["part", "stored", "as", "count", "bytes"]
    assert rows[0].split() == ["conditional", "int8", "by", "channel", "1", "144"]
    assert [row.split()[0] for row in rows] == ["conditional"] * 3 + ["unconditional"] * 3
    printed = sum(int(row.split()[-1].replace(",", "")) for row in rows)
    with open_checkpoint(out) as opened:
        parts = opened.parts.values()
        modules = sum(each.nbytes for part in parts for each in part.modules.values())
        assert printed == modules + sum(i.nbytes for part in parts for i in part.others.values())


# As a file of the output


def test_it_is_written_where_the_recipe_asks_and_always_the_same(tmp_path: Path) -> None:
    first, second = one(tmp_path / "1"), one(tmp_path / "2")
    assert (first / NAME).read_bytes() == (second / NAME).read_bytes()
    assert (first / "recipe.lock.json").read_bytes() == (second / "recipe.lock.json").read_bytes()
    lock = json.loads((first / "recipe.lock.json").read_text("utf-8"))
    assert NAME in [entry["path"] for entry in lock["sidecars"]]
    small(tmp_path / "in.safetensors")
    without = convert(parsed(recipe()), tmp_path / "in.safetensors", tmp_path / "out").out
    assert NAME not in tree(without)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda path: path.unlink(), "missing-file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "digest-mismatch"),
    ],
    ids=["gone", "edited"],
)
def test_the_lock_vouches_for_it(
    tmp_path: Path, change: Callable[[Path], object], kind: str
) -> None:
    out = one(tmp_path)
    assert not verify(out).problems
    change(out / NAME)
    (problem,) = verify(out).problems
    assert (problem.kind, problem.file) == (kind, str(out / NAME))


def test_a_conversion_that_goes_on_writes_the_same(tmp_path: Path) -> None:
    expected = tree(one(tmp_path / "undisturbed"))
    folder = tmp_path / "interrupted"
    folder.mkdir()
    small(folder / "in.safetensors")
    document = parsed(recipe(target_fields={"emit_loader": True}))
    said: list[str] = []

    def interrupt(count: int, name: str) -> None:
        if name == "b":
            raise KeyboardInterrupt

    def attempt(**means: Any) -> Path:
        source = folder / "in.safetensors"
        return convert(document, source, folder / "out", jobs=1, notice=said.append, **means).out

    with pytest.raises(KeyboardInterrupt):
        attempt(progress=interrupt)
    assert not (folder / "out").exists()
    assert tree(attempt()) == expected
    assert any(line.startswith("going on") for line in said)
