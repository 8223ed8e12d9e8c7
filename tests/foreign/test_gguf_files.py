"""GGUF: conversions are read by the package ``gguf``, and files of it are read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import named_layout
from tests.support.goldens import GOLDEN, Json, awkward, expected, same, source, written

FORMATS = ("q8_0", "q4_0", "q4_k", "q6_k")
OUT = "layers.0.attention.o"

# One row; one record a row where records are of 256; more of both.
SHAPES = {"one": (1, 256), "some": (9, 512), "over": (129, 768)}

every = pytest.mark.parametrize("name", FORMATS)


def scheme(name: str) -> Json:
    return {"weight": {"format": name, "granularity": "block"}}


def without_parts() -> Layout:
    """The layout of files of one model, whose tensors have no prefix."""
    text = named_layout("gguf").model_dump_json(by_alias=True, exclude_unset=True)
    return Layout.model_validate_json(text.replace("{part}.", ""))


def weights() -> dict[str, Tensor]:
    found = {
        f"{module}.weight": awkward(*shape, seed)
        for seed, (module, shape) in enumerate(SHAPES.items())
    }
    found |= {"some.bias": torch.linspace(-1, 1, 9).bfloat16(), "norm.weight": torch.ones(5).half()}
    found |= {f"plain.{kind}.weight": awkward(3, 32, 7) for kind in PLAIN}
    return found


PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def made(name: str, layout: str | Json, folder: Path) -> Path:
    kept = [
        {"modules": [f"plain.{dtype}"], "dtype": dtype, "reason": "it shows the dtype"}
        for dtype in PLAIN
    ]
    path, _ = written(
        folder, layout, scheme(name), weights(), target={"file": "model.gguf"}, protected=kept
    )
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each format."""
    return {name: made(name, "gguf", tmp_path_factory.mktemp(name)) for name in FORMATS}


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf")


# What it wrote


def test_its_golden_file_is_read_to_the_bit() -> None:
    found = load_state_dict(GOLDEN / "gguf-q8_0.gguf", layout=without_parts())
    for module, weight in expected("gguf-q8_0").items():
        read = found[f"{module}.weight"]
        assert same(read.float(), weight)
    assert found["layers.0.feed_forward.w2.weight"].dtype == torch.float16
    assert found["head.weight"].dtype == torch.bfloat16
    for key in (f"{OUT}.bias", "layers.0.norm.weight"):
        assert same(found[key], source()[key].float())


@pytest.mark.parametrize(("name", "kinds"), [("q4", "Q4_1"), ("q5", "Q5_0"), ("mxfp4", "MXFP4")])
def test_types_that_are_not_read_are_refused_by_name(name: str, kinds: str) -> None:
    with pytest.raises(InvalidInput, match=f"is stored as {kinds}, .* which is not read"):
        open_checkpoint(GOLDEN / f"gguf-{name}.gguf", layout=without_parts())


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_what_it_quantizes_is_read_to_the_bit(name: str, gguf: Any, tmp_path: Path) -> None:
    kind, path = gguf.GGMLQuantizationType[name.upper()], tmp_path / "theirs.gguf"
    writer, wanted = gguf.GGUFWriter(path, "test"), {}
    for module, shape in SHAPES.items():
        data = gguf.quants.quantize(awkward(*shape).numpy(), kind)
        writer.add_tensor(f"{module}.weight", data, raw_dtype=kind)
        wanted[f"{module}.weight"] = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_state_dict(path, layout=without_parts())
    assert found.keys() == wanted.keys()
    assert all(same(found[key], each) for key, each in wanted.items())


# What it reads


def tensors_in(gguf: Any, path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@every
def test_it_reads_the_same_names_types_and_shapes(name: str, gguf: Any, ours: Any) -> None:
    read, given = tensors_in(gguf, ours[name]), weights()
    assert read.keys() == {f"model.{key}" for key in given}
    types = gguf.GGMLQuantizationType
    for key, weight in given.items():
        tensor, (first, *middle) = read[f"model.{key}"], key.split(".")
        wanted = PLAIN[middle[0]] if first == "plain" else name.upper()
        if weight.ndim == 1:
            wanted = "F32"
        assert tensor.tensor_type == types[wanted]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(weight.shape)


@every
def test_it_dequantizes_to_the_same_numbers(name: str, gguf: Any, ours: Any) -> None:
    read, found = tensors_in(gguf, ours[name]), load_state_dict(ours[name])
    # The names of the source are those without a part.
    assert found.keys() == weights().keys()
    for key, mine in found.items():
        tensor = read[f"model.{key}"]
        theirs = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        assert same(theirs.float().view(mine.shape), mine.float())


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_it_would_have_written_the_same_records(name: str, gguf: Any, ours: Any) -> None:
    read, kind = tensors_in(gguf, ours[name]), gguf.GGMLQuantizationType[name.upper()]
    for module in SHAPES:
        theirs = gguf.quants.quantize(weights()[f"{module}.weight"].numpy(), kind)
        assert read[f"model.{module}.weight"].data.tobytes() == theirs.tobytes()


@every
def test_it_reads_the_metadata(name: str, gguf: Any, ours: Any) -> None:
    fields = gguf.GGUFReader(ours[name]).fields
    assert fields["general.architecture"].contents() == "ideogram4"
    assert fields["general.quantization_version"].contents() == 2
    kind = fields["general.file_type"].contents()
    wanted = {
        "q8_0": "MOSTLY_Q8_0",
        "q4_0": "MOSTLY_Q4_0",
        "q4_k": "MOSTLY_Q4_K_S",
        "q6_k": "MOSTLY_Q6_K",
    }[name]
    assert gguf.LlamaFileType(kind).name in (wanted, wanted.replace("K_S", "K_M"))


def test_files_without_parts_go_both_ways(gguf: Any, tmp_path: Path) -> None:
    path = made("q8_0", without_parts().to_json_value(), tmp_path)
    assert tensors_in(gguf, path).keys() == weights().keys()
    found = load_state_dict(path, layout=without_parts())
    with_parts = load_state_dict(path.parent)
    assert all(same(found[key], each) for key, each in with_parts.items())
