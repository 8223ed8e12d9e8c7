"""A case on disk: its recipe, source and statistics, and the checkpoint that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader, locate, read_header
from quantrecipe.converter import carry_out, find_converter, plan
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.schema.dtypes import DTYPES
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.statistics import STATISTICS_KEY
from quantrecipe.testing.conformance.cases import Case
from quantrecipe.testing.conformance.comparing import Deviation, same_tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    payload = bytearray()
    names = {
        TORCH_DTYPES[name]: dtype.code for name, dtype in DTYPES.items() if name in TORCH_DTYPES
    }
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        start = len(payload)
        payload += _content(tensor)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, len(payload)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def _content(tensor: Tensor) -> bytes:
    content: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    header, found = read_header(path), {}
    with SourceReader([header]) as reader:
        for name, info in header.tensors.items():
            buffer = bytearray(info.nbytes)
            reader.read_into(info, 0, buffer)
            dtype = TORCH_DTYPES[info.dtype]
            flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
            found[name] = flat.reshape(info.shape)
    return found


def write_case(case: Case, folder: Path) -> tuple[Path, Path]:
    """Write what goes into a conversion.

    Returns:
        The recipe and the root of the source.
    """
    source = folder / "source"
    for name, tensors in case.source.items():
        write_tensors(locate(source, name), {name: t.tensor() for name, t in tensors.items()})
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(case.recipe, indent=2), encoding="utf-8")
    if case.statistics is not None:
        header, tensors = case.statistics
        write_tensors(
            folder / "statistics.safetensors",
            {name: tensor.tensor() for name, tensor in tensors.items()},
            {STATISTICS_KEY: json.dumps(header)},
        )
    return recipe, source


def check_written(case: Case, out: Path) -> list[str]:
    """A line for each difference between the files of an output and those of the case."""
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.safetensors")}
    differences = [f"{path} was not written" for path in sorted(case.target.keys() - found)]
    differences += [f"{path} is not expected" for path in sorted(found - case.target.keys())]
    for path in sorted(found & case.target.keys()):
        differences += same_tensors(read_tensors(locate(out, path)), case.target[path], path)
    return differences


def make_checkpoint(case: Case, folder: Path) -> Path:
    """The converted checkpoint of a case, with its lock, or edited and without.

    The reference converter makes it; its tensors are held against the case, so that a loader is
    given what the case says and nothing else.
    """
    recipe, source = write_case(case, folder)
    converter = find_converter("reference")
    out = carry_out(plan(recipe, source, converter="reference"), converter, folder / "out").out
    differences = check_written(case, out)
    if differences:
        raise Deviation(["the checkpoint itself is not that of the case", *differences])
    for path, edit in case.edited.items():
        (out / LOCK_NAME).unlink(missing_ok=True)
        edited = locate(out, path)
        metadata, tensors = read_header(edited).metadata, read_tensors(edited)
        for name in edit.remove:
            del tensors[name]
        tensors |= {name: tensor.tensor() for name, tensor in edit.put.items()}
        write_tensors(edited, tensors, metadata)
    return out
