"""The cases, read from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.loaders import Names

Rule = Literal["w8a8", "weight-only"]
"""How near a module's output must be to the expected one; see ``modules.rounding``."""


@dataclass(frozen=True, slots=True)
class CaseTensor:
    """A tensor as a case gives it.

    Attributes:
        dtype: as recipes name it.
        shape: sizes.
        values: nested lists of numbers that ``dtype`` holds exactly; ``None`` where only bytes can
            say what is meant (a NaN).
        hex: its bytes, little-endian; ``None`` where the values say it all.
    """

    dtype: str
    shape: tuple[int, ...]
    values: Any = None
    hex: str | None = None

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> CaseTensor:
        """From a file of cases."""
        return cls(
            document["dtype"],
            tuple(document["shape"]),
            document.get("values"),
            document.get("hex"),
        )

    def tensor(self) -> Tensor:
        """Made from its bytes if they are given, else from its values."""
        dtype = TORCH_DTYPES[self.dtype]
        if self.hex:
            flat = torch.frombuffer(bytearray.fromhex(self.hex), dtype=dtype)
            return flat.reshape(self.shape)
        exact = torch.int64 if isinstance(_first(self.values), int) else torch.float64
        return torch.tensor(self.values or [], dtype=exact).reshape(self.shape).to(dtype)


def _first(values: Any) -> Any:
    while isinstance(values, list) and values:
        values = values[0]
    return values


TensorFile = Mapping[str, CaseTensor]
"""The tensors of a file, by name."""


@dataclass(frozen=True, slots=True)
class Load:
    """A call of ``load_state_dict``, and what it gives.

    Attributes:
        part, names, dtype: what it is called with.
        tensors: by name; dtype, shape and every bit are the same.
    """

    part: str
    names: Names
    dtype: str
    tensors: TensorFile


@dataclass(frozen=True, slots=True)
class Output:
    """A call of a loaded module, and what it gives.

    Attributes:
        part, module: whose.
        rule: how near the output must be.
        input: ``[tokens, in]``.
        output: float64 ``[tokens, out]``, rounded once from the exact result.
        magnitude: float64 ``[tokens, out]``, what rounding errors are relative to: the sum of the
            magnitudes that are added up (``w8a8``: of product and bias).
        unquantized: for ``w8a8`` the exact output of the source's weights.
        bound: for ``w8a8`` how far from it quantizing may lead.
    """

    part: str
    module: str
    rule: Rule
    input: CaseTensor
    output: CaseTensor
    magnitude: CaseTensor
    unquantized: CaseTensor | None = None
    bound: CaseTensor | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A problem that has to be found: its kind, and the place in the recipe or the tensor."""

    kind: str
    pointer: str | None = None
    tensor: str | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to a converted file: tensors taken out, and tensors put in."""

    remove: tuple[str, ...] = ()
    put: TensorFile = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        id: what it is chosen by.
        title: what it is about, a few words.
        shows: what it shows, in a sentence or two.
        recipe: the document.
        source: the tensors of each file, by path.
        statistics: the statistics file beside the recipe: its header and tensors.
        target: the tensors that are written, by file; empty where nothing is.
        loads: what loading gives, or would give if nothing were edited.
        outputs: what modules compute.
        edited: what is done to the converted files before they are loaded, by path.
        refused: the problems that are found, all of them; empty where nothing is wrong.
    """

    id: str
    title: str
    shows: str
    recipe: Mapping[str, Any]
    source: Mapping[str, TensorFile]
    statistics: tuple[Mapping[str, Any], TensorFile] | None
    target: Mapping[str, TensorFile]
    loads: tuple[Load, ...]
    outputs: tuple[Output, ...]
    edited: Mapping[str, Edit]
    refused: tuple[Refusal, ...]

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Case:
        """From a file of cases."""
        statistics = document.get("statistics")
        return cls(
            id=document["id"],
            title=document["title"],
            shows=document["shows"],
            recipe=document["recipe"],
            source=_files(document["source"]),
            statistics=None
            if statistics is None
            else (statistics["header"], _tensors(statistics["tensors"])),
            target=_files(document.get("target", {})),
            loads=tuple(
                Load(**{**load, "tensors": _tensors(load["tensors"])})
                for load in document.get("loads", ())
            ),
            outputs=tuple(_output(output) for output in document.get("outputs", ())),
            edited={
                path: Edit(tuple(edit.get("remove", ())), _tensors(edit.get("put", {})))
                for path, edit in document.get("edited", {}).items()
            },
            refused=tuple(Refusal(**problem) for problem in document.get("refused", ())),
        )


def _tensors(document: Mapping[str, Any]) -> TensorFile:
    return {name: CaseTensor.of_json(tensor) for name, tensor in document.items()}


def _files(document: Mapping[str, Any]) -> Mapping[str, TensorFile]:
    return {path: _tensors(tensors) for path, tensors in document.items()}


def _output(document: Mapping[str, Any]) -> Output:
    given: dict[str, Any] = {
        key: CaseTensor.of_json(value) if isinstance(value, Mapping) else value
        for key, value in document.items()
    }
    return Output(**given)


@cache
def cases() -> tuple[Case, ...]:
    """Every case, family by family."""
    folder = files("quantrecipe").joinpath("testing", "cases")
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(
        Case.of_json(document)
        for entry in entries
        if entry.name.endswith(".json")
        for document in json.loads(entry.read_text("utf-8"))
    )
