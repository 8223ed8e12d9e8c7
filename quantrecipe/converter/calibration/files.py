"""Statistics files: read strictly, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from quantrecipe.checkpoint import OutputExists, SourceReader, read_header
from quantrecipe.checkpoint.closing import Closing
from quantrecipe.checkpoint.durable import output_error, sync_descriptor, sync_folder
from quantrecipe.converter.calibration.module import ModuleStatistics
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.refusals import first_index
from quantrecipe.schema.canonical import canonical_bytes
from quantrecipe.schema.parsed import capped
from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.statistics import KEPT_TOKENS, STATISTICS_KEY, TENSORS, Statistics
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo, TensorInfo
from quantrecipe.schema.validation import load_statistics_header

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_AGAIN = "Measure again."


class StatisticsFile(Closing):
    """An open statistics file. Made by ``open_statistics``; a context manager.

    Attributes:
        path: the file.
        header: what was measured, and on what.
    """

    def __init__(
        self, header: Statistics, file: SourceFileInfo, found: Mapping[tuple[str, str], _Tensors]
    ) -> None:
        self.path = file.path
        self.header = header
        self._found = found
        self._reader = SourceReader([file])

    def __contains__(self, module: tuple[str, str]) -> bool:
        """Whether a module of a part, ``(part, name)``, was measured."""
        return module in self._found

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Every module that was measured, as ``(part, name)``, in the order of the header."""
        return iter(self._found)

    def close(self) -> None:
        """Close the file; reads that follow are errors."""
        self._reader.close()

    def tensors(self, part: str, name: str) -> Mapping[str, TensorInfo]:
        """What the file has of a module, by what it is; nothing of one that was not measured."""
        return self._found.get((part, name), {})

    def module(self, part: str, name: str, *, tokens: bool = True) -> ModuleStatistics:
        """What was measured of a module, on the CPU.

        Args:
            part: the part.
            name: the module.
            tokens: whether those that were kept are read as well.

        Raises:
            InvalidInput: it was not measured (kind ``not-measured``), or a number cannot be what it
                is said to be (kind ``bad-statistics``).
            SourceError: the file cannot be read.
        """
        found = self._found.get((part, name))
        if found is None:
            known = self.header.modules.get(part)
            if known is None:
                message, hint = f"part {part!r}", did_you_mean(part, [*self.header.modules])
            else:
                message, hint = f"{name!r} of part {part!r}", did_you_mean(name, known)
            raise InvalidInput(
                Problem("not-measured", f"{message} was not measured", hint, file=str(self.path))
            )
        tensors = {
            what: self._read(info)
            for what, info in found.items()
            if tokens or what not in KEPT_TOKENS
        }
        problems = [
            Problem("bad-statistics", message, _AGAIN, file=str(self.path), tensor=found[what].name)
            for what, message in _impossible(tensors, len(self.header.timesteps))
        ]
        if problems:
            raise InvalidInput(problems)
        return ModuleStatistics.from_tensors(tensors)

    def _read(self, info: TensorInfo) -> Tensor:
        out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        self._reader.read_into(info, 0, as_memory(out))
        return out


_Tensors = dict[str, TensorInfo]


def open_statistics(path: Path | str) -> StatisticsFile:
    """Open a statistics file; what it says is checked, and none of its tensors is read yet.

    Raises:
        InvalidInput: it is missing, no statistics file, or its tensors are not those of its header,
            with every problem found.
        SourceError: it is there and cannot be read.
    """
    file = Path(path)
    try:
        known = file.stat()
    except OSError:
        known = None  # what is wrong, reading it says
    # Conversions ask for one module after the other, and some files say a lot.
    identity = known and (known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns)
    return StatisticsFile(*_checked(file, identity))


@lru_cache(maxsize=8)
def _checked(
    path: Path, _: tuple[int, ...] | None
) -> tuple[Statistics, SourceFileInfo, Mapping[tuple[str, str], _Tensors]]:
    """A header, and which tensors there are of each module; as long as the file is the same."""
    file = read_header(path)
    if STATISTICS_KEY not in file.metadata:
        raise InvalidInput(
            Problem(
                "not-statistics",
                f"its metadata has no {STATISTICS_KEY!r}: it is not a statistics file",
                hint="Name the file of what calibration measured.",
                file=str(file.path),
            )
        )
    header = load_statistics_header(file.metadata[STATISTICS_KEY], str(file.path))
    found, problems = _sorted_out(header, file)
    problems += [
        Problem("bad-statistics", message, file=str(file.path), tensor=tensor)
        for (part, name), tensors in found.items()
        for tensor, message in _disagreements(header, f"{part}/{name}", tensors)
    ]
    if problems:
        raise InvalidInput(capped(problems, "problems of its tensors"))
    return header, file, found


def _sorted_out(
    header: Statistics, file: SourceFileInfo
) -> tuple[dict[tuple[str, str], _Tensors], list[Problem]]:
    found: dict[tuple[str, str], _Tensors] = {
        (part, name): {} for part, names in header.modules.items() for name in names
    }
    problems = []
    for info in file.tensors.values():
        part, _, rest = info.name.partition("/")
        name, _, what = rest.rpartition("/")
        if (part, name) in found and what in TENSORS:
            found[part, name][what] = info
            continue
        if what not in TENSORS:
            message = f"nothing that is measured is called {what!r}"
        else:
            message = f"{name!r} of part {part!r} is not among the modules of the header"
        problems.append(Problem("bad-statistics", message, file=str(file.path), tensor=info.name))
    return found, problems


def _disagreements(header: Statistics, prefix: str, found: _Tensors) -> Iterator[tuple[str, str]]:
    """What does not hold about the tensors of a module: a tensor's name, and why."""
    for what in _wanted(header) - found.keys():
        yield f"{prefix}/{what}", "it is missing"
    for what in sorted(found.keys() - _allowed(header)):
        yield f"{prefix}/{what}", "the header does not say that the file holds it"
    sizes: dict[str | int, int] = {"B": len(header.timesteps)}
    for what, (dtypes, axes) in TENSORS.items():
        info = found.get(what)
        if info is None:
            continue
        if info.dtype not in dtypes:
            yield info.name, f"{info.dtype}, expected {' or '.join(dtypes)}"
        if len(info.shape) == len(axes):
            for axis, size in zip(axes, info.shape, strict=True):
                sizes.setdefault(axis, axis if isinstance(axis, int) else size)
        expected = [sizes.get(axis, axis) for axis in axes]
        if list(info.shape) != expected:
            shape = ", ".join(map(str, expected))
            yield info.name, f"shape {list(info.shape)}, expected [{shape}]"
    if sizes.get("I") == 0:
        yield f"{prefix}/input_absmax", "it has no channels"
    if sizes.get("K", 0) > header.reservoir > 0:
        message = f"{sizes['K']} tokens, and the header says {header.reservoir} at most"
        yield f"{prefix}/{KEPT_TOKENS[0]}", message


def _wanted(header: Statistics) -> set[str]:
    held = set(header.holds or ("input_absmax",)) - {"weight_absmax"}
    return held | set(KEPT_TOKENS if header.reservoir else ())


def _allowed(header: Statistics) -> set[str]:
    held = set(header.holds) if header.holds else set(TENSORS) - set(KEPT_TOKENS)
    return held | set(KEPT_TOKENS if header.reservoir else ())


_ANY_SIGN = frozenset({"input_moments", "input_tokens", "input_token_keys"})
_LARGEST_SQUARE = 2.0**256
"""That of a float32 is less."""


def _impossible(tensors: Mapping[str, Tensor], bins: int) -> Iterator[tuple[str, str]]:
    """Numbers that cannot have been measured: a tensor, and why."""
    for what, values in tensors.items():
        possible = values.isfinite()
        if what not in _ANY_SIGN:
            possible &= values >= 0
        if what == "input_second_moment":
            possible &= values <= _LARGEST_SQUARE
        index = first_index(~possible)
        if index is not None:
            yield what, f"{values[index].item()} at index {list(index)} cannot have been measured"
    tokens, histogram = tensors.get("tokens"), tensors.get("token_absmax_histogram")
    if tokens is not None and histogram is not None and not histogram.sum(1).equal(tokens):
        yield "token_absmax_histogram", "its bins do not add up to the tokens seen"
    if KEPT_TOKENS[0] in tensors:
        keys, at = tensors["input_token_keys"], tensors["input_token_bins"]
        if not bool((keys[1:] > keys[:-1]).all()):
            yield "input_token_keys", "they do not ascend"
        if not bool((at < bins).all()):
            yield "input_token_bins", f"one is not among the {bins} bins"


def write_statistics(
    path: Path | str,
    header: Statistics,
    modules: Mapping[tuple[str, str], ModuleStatistics],
    *,
    force: bool = False,
) -> None:
    """Write a statistics file; it appears whole, or not at all.

    Args:
        path: the file.
        header: what was measured, and on what.
        modules: by part and name: every module of the header.
        force: replace a file that is there.

    Raises:
        OutputExists: there is such a file, and ``force`` is not given.
        OutputError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not force:
        raise OutputExists(path.parent, [path.name])
    tensors = {
        f"{part}/{name}/{what}": tensor
        for (part, name), measured in modules.items()
        for what, tensor in measured.tensors().items()
    }
    described = file_order(
        OutputTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    metadata = {STATISTICS_KEY: canonical_bytes(header.to_json_value()).decode()}
    start = encode_header(described, metadata)
    try:
        _write_whole(path, start, (tensors[each.name] for each in described))
    except OSError as error:
        raise output_error(path, error) from error


def _write_whole(path: Path, start: bytes, tensors: Iterable[Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with made.open("wb") as file:
            file.write(start)
            for tensor in tensors:
                file.write(as_memory(tensor.cpu().contiguous()))
            file.flush()
            sync_descriptor(file.fileno())
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
