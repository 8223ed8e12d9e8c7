"""``load_model`` from every layout: modules compute with what ``load_state_dict`` gives.

The tensors are held as they are stored, so what is looked at is that they mean the same numbers to
the kernels as to the reference loader, and that nothing is held that the file does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.loaders import QuantizedLinear, load_model, load_state_dict, open_checkpoint
from quantrecipe.loaders.kernels import LEVEL_DTYPES
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import layout_names, resolve_layout
from tests.converter.making import Json, parsed, save

GOLDEN = Path(__file__).parents[1] / "foreign" / "golden"
TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NOT_ROUNDED = 2.0**-22
"""What float32 rounds in a product of two numbers, and a little more."""


def specs(name: str, granularity: str) -> Iterator[Json]:
    """Ways to store a weight in a format of a layout."""
    spec: Json = {"format": name, "granularity": granularity}
    if granularity == "group" and name in ("int8", "int4"):
        spec["group_size"] = 128 if name == "int4" else 64
    if granularity == "block" and name == "nf4":
        yield spec | {"block_size": 64, "double_quantized": True}
        spec["block_size"] = 64
    elif granularity == "block" and name.startswith("float8"):
        spec["block_size"] = [128, 128]
    if name == "int4":
        yield spec | {"symmetric": False}
    yield spec


WAYS: list[tuple[str, Json]] = [
    (layout, spec)
    for layout in layout_names()
    for name, held in resolve_layout(layout).holds.items()
    for granularity in held.granularity
    for spec in specs(name, granularity)
]
"""Every layout, with every way to store a weight that it holds."""


def way_id(way: Any) -> str | None:
    if not isinstance(way, tuple):
        return None
    more = [key for key in ("double_quantized", "symmetric") if key in way[1]]
    return "-".join([way[0], way[1]["format"], way[1]["granularity"], *more])


class Small(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.inside = nn.Linear(in_features, out_features, bias=bias)
        self.norm = nn.LayerNorm(out_features)


def small(in_features: int = 256, out_features: int = 160, bias: bool = True) -> Small:
    torch.manual_seed(in_features + out_features)
    return Small(in_features, out_features, bias)


def converted(folder: Path, model: nn.Module, layout: str, weight: Json, **scheme: Any) -> Path:
    """``model`` in a layout, with ``inside`` quantized."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target, metadata = {"layout": layout}, None
    if resolve_layout(layout).container == "gguf":
        target["file"] = "model.gguf"
        metadata = {"general.architecture": "small"}
    source = save(folder / "in.safetensors", tensors, metadata)
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": "plain"},
        "schemes": {"all": {"weight": weight, **scheme}},
        "rules": [{"modules": ["inside"], "scheme": "all"}],
        "target": target,
    }
    return convert(parsed(document), source, folder / "out").out


def loaded(path: Path, like: Small, device: str = "cpu", **options: Any) -> QuantizedLinear:
    with torch.device("meta"):
        inside = like.inside
        model = Small(inside.in_features, inside.out_features, inside.bias is not None)
    report = load_model(model, path, device=device, **options)
    assert report.quantized == 1
    made = model.inside
    assert isinstance(made, QuantizedLinear)
    return made


def assert_computes(module: QuantizedLinear, weight: Tensor, lost: float) -> None:
    """``module`` is a linear with this weight, but for ``lost`` of each product."""
    x = torch.randn(5, module.in_features, dtype=torch.float64).to(weight.device)
    bias = None if module.bias is None else module.bias.double()
    wanted = nn.functional.linear(x, weight.double(), bias)
    if module.rotation is None:
        allowed = lost * (x.abs() @ weight.double().abs().T) + 1e-12
    else:  # numbers of a block meet each other, in the weight and in the activations
        norms = x.norm(dim=1, keepdim=True) @ weight.double().norm(dim=1)[None]
        allowed = (lost + 2.0**-19) * norms + 1e-12
    if bias is not None:
        allowed = allowed + 2.0**-22 * bias.abs()
    assert bool(((module(x) - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_every_format_of_every_layout(tmp_path: Path, way: tuple[str, Json], device: str) -> None:
    layout, weight = way
    model = small()
    path = converted(tmp_path, model, layout, weight)
    numbers = load_state_dict(path)["inside.weight"].to(device)
    module = loaded(path, model, device, kernel="reference")
    assert_computes(module, numbers, NOT_ROUNDED)
    assert_computes(loaded(path, model, device), numbers, (module.in_features + 4) * 2.0**-24)
    plain = module.dequantize()
    if weight["format"] == "llm_int8":  # multiplied in another order
        torch.testing.assert_close(plain, numbers, rtol=2.0**-21, atol=0.0)
    else:
        assert torch.equal(plain, numbers)


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_what_is_held_is_what_is_stored(tmp_path: Path, way: tuple[str, Json]) -> None:
    layout, weight = way
    model = small()
    path = converted(tmp_path, model, layout, weight)
    with torch.device("meta"):
        empty = Small(256, 160, bias=True)
    report = load_model(empty, path, device="cpu")
    with open_checkpoint(path) as checkpoint:
        part = checkpoint.part()
        infos = [info for module in part.modules.values() for info in module.tensors.values()]
        infos += part.others.values()
    stored = sum(info.nbytes for info in infos if info.name not in report.left_out)
    assert report.nbytes == {"cpu": stored}
    assert sum(tensor.nbytes for tensor in empty.state_dict().values()) == stored
    assert sum(info.nbytes for info in infos) - stored < 2048


STEPS: dict[str, int] = {
    **dict.fromkeys(("q8_0", "q4_0", "mxfp8", "mxfp4"), 32),
    **dict.fromkeys(("q4_k", "q6_k"), 256),
    "nvfp4": 16,
    "nf4": 64,
    "int4": 128,
}
"""Input features come in multiples of these."""


@st.composite
def odd_ways(draw: st.DrawFn) -> tuple[str, Json, int, int]:
    """A way to store, and out and in features of a weight that can be stored so."""
    layout, weight = draw(st.sampled_from(WAYS))
    held = resolve_layout(layout).holds.get(weight["format"])
    rows, columns = (1, 1) if held is None or held.multiples is None else held.multiples
    group: int = weight.get("group_size", 1)
    step = max(columns, STEPS.get(weight["format"], group))
    out_features = rows * draw(st.integers(1, 4 if rows > 1 else 140))
    return layout, weight, out_features, step * draw(st.integers(1, 2))


@settings(max_examples=25)  # each converts and loads
@given(odd_ways(), st.booleans())
def test_weights_of_any_shape(way: tuple[str, Json, int, int], bias: bool) -> None:
    layout, weight, out_features, in_features = way
    model = small(in_features, out_features, bias)
    with TemporaryDirectory() as folder:
        path = converted(Path(folder), model, layout, weight)
        numbers = load_state_dict(path)["inside.weight"]
        assert_computes(loaded(path, model, kernel="reference"), numbers, NOT_ROUNDED)


INT8 = [
    (layout, spec)
    for layout, spec in WAYS
    if spec["format"] in ("int8", "llm_int8") and spec["granularity"] in ("tensor", "channel")
]


@pytest.mark.parametrize("way", INT8, ids=way_id)
def test_int8_of_every_layout_is_multiplied_as_int8(tmp_path: Path, way: tuple[str, Json]) -> None:
    layout, weight = way
    model = small()
    path = converted(tmp_path, model, layout, weight, activation=TOKEN)
    module = loaded(path, model, kernel="int_mm")
    assert module.level_dtype == torch.int8
    exact = loaded(path, model, kernel="reference")
    x = torch.randn(7, 256)
    torch.testing.assert_close(module(x), exact(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(module(x), nn.functional.linear(x, module.dequantize(), module.bias))


def test_a_marker_says_how_activations_are_rotated(tmp_path: Path) -> None:
    model = small()
    rotation = {"kind": "hadamard", "size": 64}
    weight = {"format": "int8", "granularity": "channel"}
    path = converted(tmp_path, model, "comfyui", weight, rotation=rotation, activation=TOKEN)
    numbers = load_state_dict(path)["inside.weight"]
    x = torch.randn(7, 256)
    module = loaded(path, model, kernel="int_mm")
    plain = nn.functional.linear(x, numbers, module.bias)
    assert float((module(x) - plain).norm() / plain.norm()) < 0.02
    # Nothing but the marker says it here.
    alone = loaded(path / "model.safetensors", model, layout="comfyui", kernel="reference")
    assert alone.rotation is not None
    assert alone.rotation.size == 64
    assert_computes(alone, numbers, NOT_ROUNDED)


SPECIAL = [
    ("bitsandbytes", "nf4", True),
    ("bitsandbytes", "llm_int8", False),
    ("quantrecipe", "nf4", True),
    ("comfyui", "nvfp4", False),
    ("comfyui", "mxfp8", False),
    ("torchao", "nvfp4", False),
    ("compressed-tensors", "nvfp4", False),
    ("compressed-tensors", "mxfp4", False),
    ("gguf", "q8_0", False),
    ("gguf", "q4_k", False),
]


def special(layout: str, name: str, twice: bool) -> Json:
    return next(
        spec
        for each, spec in WAYS
        if (each, spec["format"], "double_quantized" in spec) == (layout, name, twice)
    )


@pytest.mark.parametrize(("layout", "name", "twice"), SPECIAL)
def test_it_compiles_casts_copies_and_loads_again(
    tmp_path: Path, layout: str, name: str, twice: bool
) -> None:
    model = small()
    path = converted(tmp_path, model, layout, special(layout, name, twice))
    module = loaded(path, model)
    x = torch.randn(2, 3, 256)
    wanted = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted)
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), wanted)
    upstream = torch.randn(2, 3, 160)
    given = x.clone().requires_grad_(True)
    module(given).backward(upstream)
    torch.testing.assert_close(given.grad, upstream @ module.dequantize())

    state = module.state_dict()
    half = loaded(path, model).bfloat16()
    for key, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if key == "bias" else state[key].dtype)
    assert torch.equal(half.dequantize(), module.dequantize())
    assert half(x.bfloat16()).dtype == torch.bfloat16

    holder = small()
    holder.inside = module
    load_model(holder, path)
    assert holder.inside is module
    assert torch.equal(module(x), wanted)


@pytest.mark.parametrize("name", sorted(LEVEL_DTYPES))
def test_levels_are_what_the_operators_say(tmp_path: Path, name: str) -> None:
    layout, weight = next(way for way in WAYS if way[1]["format"] == name)
    module = loaded(converted(tmp_path, small(), layout, weight), small())
    assert module._levels().dtype == module.level_dtype == LEVEL_DTYPES[name]
    assert module._levels().shape == (160, 256)
    assert module._scales().dtype == module.grid_dtype


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("quantrecipe", "nvfp4", False), ("comfyui", "nvfp4", False)),
        (("quantrecipe", "nf4", True), ("quantrecipe", "nf4", False)),
        (("gguf", "q4_k", False), ("gguf", "q6_k", False)),
    ],
)
def test_another_way_to_store_is_refused(
    tmp_path: Path, one: tuple[str, str, bool], other: tuple[str, str, bool]
) -> None:
    paths = [
        converted(tmp_path / way[0] / way[1] / str(way[2]), small(), way[0], special(*way))
        for way in (one, other)
    ]
    model = small()
    load_model(model, paths[0])
    with pytest.raises(InvalidInput) as error:
        load_model(model, paths[1])
    assert {problem.kind for problem in error.value.problems} == {"other-format"}


# What is wrong


def damaged(path: Path, name: str, value: Tensor) -> Path:
    """The file with one tensor replaced, and without what vouches for it."""
    file = path / "model.safetensors"
    tensors = {key: each.clone() for key, each in load_file(file).items()}
    assert tensors[name].shape == value.shape
    made = path.parent / "damaged.safetensors"
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        metadata = json.loads(opened.read(size))["__metadata__"]
    del metadata["quantrecipe"]
    save_file(tensors | {name: value}, made, metadata)
    return made


@pytest.mark.parametrize(
    ("layout", "name", "twice", "tensor", "value", "kind"),
    [
        ("quantrecipe", "mxfp8", False, "weight_scale", 255, "bad-scale"),
        ("comfyui", "nvfp4", False, "weight_scale", 0x7F, "bad-scale"),
        ("quantrecipe", "nvfp4", False, "second_scale", float("nan"), "bad-scale"),
        ("compressed-tensors", "nvfp4", False, "weight_global_scale", 0.0, "bad-scale"),
        ("quantrecipe", "nf4", True, "scale_offset", float("inf"), "bad-scale"),
        ("torchao", "int8", False, "_weight_zero_point", 1, "wrong-constant"),
        ("bitsandbytes", "nf4", False, "weight.quant_map", 0.5, "wrong-constant"),
        ("bitsandbytes", "nf4", True, "weight.nested_quant_map", 0.5, "wrong-constant"),
        ("bitsandbytes", "llm_int8", False, "weight_format", 1, "wrong-constant"),
    ],
)
def test_numbers_that_mean_nothing_or_something_else(
    tmp_path: Path, layout: str, name: str, twice: bool, tensor: str, value: float, kind: str
) -> None:
    path = converted(tmp_path, small(), layout, special(layout, name, twice))
    key = f"inside.{tensor}"
    stored = load_file(path / "model.safetensors")[key]
    bits = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored
    bad = torch.full_like(bits, value).view(stored.dtype)
    file = damaged(path, key, bad)
    with pytest.raises(InvalidInput) as error:
        loaded(file, small(), layout=layout)
    assert {problem.kind for problem in error.value.problems} == {kind}
    assert {problem.tensor for problem in error.value.problems} == {key}
    with pytest.raises(InvalidInput):
        load_state_dict(file, layout=layout)
    if kind == "wrong-constant":
        back: Json = {
            "kind": "recipe",
            "version": 1,
            "name": "back",
            "source": {"layout": layout},
            "schemes": {"all": {"weight": {"format": "int8", "granularity": "channel"}}},
            "rules": [{"modules": ["inside"], "scheme": "all"}],
            "target": {"layout": "quantrecipe"},
        }
        with pytest.raises(InvalidInput, match=r"stand for other numbers|zero points"):
            convert(parsed(back), file, tmp_path / "back")


def test_a_weight_that_was_filled_up() -> None:
    path = GOLDEN / "comfyui-nvfp4.safetensors"
    numbers = load_state_dict(path, layout="comfyui")
    shapes = {n[:-7]: tuple(t.shape) for n, t in numbers.items() if n.endswith(".weight")}
    model = Holder(shapes | {"layers.0.feed_forward.w3": (129, 66)})
    with pytest.raises(InvalidInput, match=r"fills weights up to multiples of \[16, 16\]") as error:
        load_model(model, path, layout="comfyui")
    (problem,) = error.value.problems
    assert problem.kind == "misshaped-tensor"
    assert problem.tensor == "layers.0.feed_forward.w3.weight"


# Checkpoints of other programs

UNREAD = {
    "bitsandbytes-nf4",  # blocks run over the ends of rows
    "bitsandbytes-nf4-nested",
    "gguf-mxfp4",
    "gguf-q4",
    "gguf-q5",
    "gguf-0.19-mixed",
    "sdnq-int8-matmul",  # transposed
    "source",
}
FOREIGN = sorted(
    path
    for path in GOLDEN.iterdir()
    if path.suffix in (".safetensors", ".gguf")
    and not path.stem.endswith(".expected")
    and path.stem not in UNREAD
)


def layout_of(path: Path) -> str:
    if path.suffix == ".gguf":
        return "gguf-one-part"
    return next(each for each in layout_names() if path.stem.startswith(each))


class Holder(nn.Module):
    """Linears and the norm of a golden file, under their names."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *folders, last = name.split(".")
            at: nn.Module = self
            for folder in folders:
                if folder not in dict(at.named_children()):
                    at.add_module(folder, nn.Module())
                at = at.get_submodule(folder)
            made: nn.Module = nn.RMSNorm(64)
            if len(shape) == 2:
                made = nn.Linear(shape[1], shape[0], bias=name == "layers.0.attention.o")
            at.add_module(last, made)


@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: path.stem)
def test_a_checkpoint_of_another_program(path: Path) -> None:
    layout = layout_of(path)
    expected = load_file(path.with_name(f"{path.stem}.expected.safetensors"))
    numbers = load_state_dict(path, layout=layout)
    shapes = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in numbers.items()
        if name.endswith(".weight")
    }
    model = Holder(shapes)
    report = load_model(model, path, layout=layout, kernel="reference")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert report.quantized == len(modules) > 0
    assert modules.keys() <= expected.keys()
    for name, module in modules.items():
        assert_computes(module, numbers[f"{name}.weight"], NOT_ROUNDED)
        if module.rotation is None:
            wanted = expected[name]
            rows, columns = wanted.shape  # some programs store more than there is
            found = module.dequantize()[:rows, :columns].to(wanted.dtype)
            exact = module.weight_format.format != "llm_int8"
            torch.testing.assert_close(
                found, wanted, rtol=0.0 if exact else 2.0**-21, atol=0.0, equal_nan=True
            )
