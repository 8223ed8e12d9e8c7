"""The loader beside the weights, for models that call modules otherwise or have several for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantrecipe.converter import convert
from quantrecipe.converter import safetensors_loader as template
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.renaming import new_names
from tests.converter.making import Json, numbers, recipe, save, save_statistics, weight_spec
from tests.converter.using_loader import build, loader_of

NAMES = (
    ("blocks.*.qkv", ("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v")),
    ("blocks.*.norm", ("blocks.*.scale",)),
    ("ids", ("numbers",)),
)
PIECES = ("to_q", "to_k", "to_v")
SMOOTHED = {
    "kind": "smoothquant",
    "alpha": 0.5,
    "apply": "online",
    "statistics": "statistics.safetensors",
}
TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}
BLOCK = {**weight_spec("float8_e4m3fn", "block"), "block_size": [128, 128]}
WAYS: list[tuple[str, Json]] = [
    ("plain", {"weight": {"format": "bfloat16"}}),
    ("plain", {"weight": {"format": "float32"}, "activation": TOKEN}),
    ("int8-scaled", {"weight": weight_spec("int8", "channel"), "activation": TOKEN}),
    ("int8-scaled", {"weight": weight_spec("int8", "tensor")}),
    ("int8-scaled", {"weight": weight_spec("int8", "group")}),
    ("fp8-scaled", {"weight": weight_spec("float8_e4m3fn", "channel"), "activation": TOKEN}),
    ("fp8-scaled", {"weight": weight_spec("float8_e5m2", "tensor")}),
    ("fp8-scaled", {"weight": BLOCK}),
    ("transformerlab", {"weight": weight_spec("int8"), "activation": TOKEN, "smoothing": SMOOTHED}),
]


def fused(folder: Path, layout: str, scheme: Json, rows: int = 48, columns: int = 40) -> Any:
    """The loader of a checkpoint with a fused projection, and what else it has."""
    rng = np.random.default_rng(rows)
    tensors = {
        "blocks.0.qkv.weight": numbers(rng, rows, columns).float(),
        "blocks.0.qkv.bias": torch.from_numpy(rng.standard_normal(rows)).float(),
        "blocks.0.norm.weight": torch.ones(5),
        "ids": torch.arange(6),
    }
    save(folder / "in.safetensors", tensors)
    maxima = torch.from_numpy(2.0 ** rng.uniform(-3, 5, (2, columns))).float()
    save_statistics(folder / "statistics.safetensors", "model", {"blocks.0.qkv": maxima})
    document = recipe(target=layout, target_fields={"emit_loader": True}) | {
        "schemes": {"all": scheme}
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(document))
    return loader_of(convert(path, folder / "in.safetensors", folder / "out").out)


def whole(rows: int, columns: int = 40) -> nn.Module:
    others = {"blocks.0.norm.weight": ([5], "float32"), "ids": ([6], "int64")}
    return build({"blocks.0.qkv": (rows, columns, True)}, others)


def split(rows: int = 16, columns: int = 40) -> nn.Module:
    linears = {f"blocks.0.{piece}": (rows, columns, True) for piece in PIECES}
    others = {"blocks.0.scale.weight": ([5], "float32"), "numbers": ([6], "int64")}
    return build(linears, others)


@pytest.mark.parametrize(("layout", "scheme"), WAYS)
def test_pieces_are_the_whole(tmp_path: Path, layout: str, scheme: Json) -> None:
    rows = 384 if scheme["weight"] is BLOCK else 48
    loader = fused(tmp_path, layout, scheme, rows)
    one, several = loader.load(whole(rows)), loader.load(split(rows // 3), names=NAMES)
    qkv: Any = one.get_submodule("blocks.0.qkv")
    pieces: list[Any] = [several.get_submodule(f"blocks.0.{piece}") for piece in PIECES]
    for name, tensor in qkv.state_dict().items():
        found = [piece.state_dict()[name] for piece in pieces]
        shared = name == "smoothing" or (name == "weight_scale" and len(tensor) == 1)
        together = found[0] if shared else torch.cat(found)
        assert together.dtype == tensor.dtype, name
        assert torch.equal(together, tensor), name
        assert not shared or all(torch.equal(each, tensor) for each in found), name
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 40, dtype=dtype)
        if isinstance(qkv, nn.Linear):
            x = x.to(qkv.weight.dtype)
        together = torch.cat([piece(x) for piece in pieces], 1)
        torch.testing.assert_close(together, qkv(x))
        if scheme["weight"]["format"] == "int8" and "activation" in scheme:
            assert torch.equal(together, qkv(x))
    assert torch.equal(several.state_dict()["blocks.0.scale.weight"], torch.ones(5).bfloat16())
    assert torch.equal(several.state_dict()["numbers"], torch.arange(6))


def test_only_the_rows_of_a_piece_are_read(tmp_path: Path) -> None:
    loader = fused(tmp_path, *WAYS[2])
    read: list[int] = []

    class Spy:
        def __init__(self, file: Any) -> None:
            self.file = file

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            tensor = self.file.get_tensor(name)
            read.append(tensor.numel())
            return tensor

    opened = loader._open
    loader._open = lambda *arguments: (
        {name: Spy(file) for name, file in opened(*arguments)[0].items()},
        [],
    )
    loader.load(split(), names=NAMES)
    assert sorted(read) == [5, 6]


INT8, IN_BLOCKS = WAYS[2], ("fp8-scaled", {"weight": BLOCK})
MISFITS: list[tuple[tuple[str, Json], int, template.Names, str]] = [
    (INT8, 46, NAMES, "cannot be cut into 3: 'blocks.0.qkv', which has 46 rows"),
    (IN_BLOCKS, 192, NAMES, "cannot be cut into 3: 'blocks.0.qkv', whose scales are for 128 "),
    (INT8, 48, (("ids", ("a", "b")),), "cannot be cut into 2: 'ids', which is of no module"),
    (INT8, 48, NAMES[1:], "extra: the model has no 'blocks.0.qkv.weight'"),
    (INT8, 48, (("blocks.*.norm.weight", ("numbers",)), *NAMES), "extra: several are called 'nu"),
]


@pytest.mark.parametrize(("way", "rows", "names", "said"), MISFITS)
def test_what_does_not_fit_is_named(
    tmp_path: Path, way: tuple[str, Json], rows: int, names: template.Names, said: str
) -> None:
    loader = fused(tmp_path, *way, rows=rows)
    with pytest.raises(ValueError, match="do not fit") as error:
        loader.load(split(), names=names)
    assert f"\n  {said}" in str(error.value)


SEGMENTS = st.sampled_from(["a", "b", "0", "1", "*"])
DOTTED = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)
PLAIN = st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=3).map(".".join)


@st.composite
def entries(draw: st.DrawFn) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Entries in which the other names have as many stars as the stored one."""
    found = []
    for stored in draw(st.lists(DOTTED, min_size=1, max_size=3, unique=True)):
        stars = ["*"] * stored.split(".").count("*")
        others = draw(st.lists(PLAIN, min_size=1, max_size=3, unique=True))
        found.append((stored, tuple(".".join([*other.split("."), *stars]) for other in others)))
    return tuple(found)


@given(entries(), PLAIN)
def test_names_are_found_as_in_recipes(names: template.Names, name: str) -> None:
    mappings = [
        NameMapping.model_validate({"from": name, "into": others if len(others) > 1 else others[0]})
        for name, others in names
    ]
    assert template._renamed(name, names) == new_names(name, mappings)
