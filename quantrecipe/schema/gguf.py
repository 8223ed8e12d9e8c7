"""GGUF files as their headers describe them: types of tensors, and how a header is written.

A file is: the magic ``GGUF``, a version, the numbers of tensors and of metadata values; the values;
for each tensor its name, dimensions (the fastest first), type and offset; zeros up to the
alignment; then the tensors, each followed by zeros up to the alignment. All is little-endian.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from quantrecipe.schema.dtypes import BLOCK_DTYPES, byte_size
from quantrecipe.schema.gguf_values import pack_string, pack_value, value_text
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import OutputFilePlan, OutputTensor

MAGIC: Final = b"GGUF"
VERSION: Final = 3
VERSIONS: Final = (2, 3)
"""Versions that are read; they differ in nothing that concerns a little-endian file."""

DEFAULT_ALIGNMENT: Final = 32
QUANTIZATION_VERSION: Final = 2
ARCHITECTURE_KEY: Final = "general.architecture"
ALIGNMENT_KEY: Final = "general.alignment"
QUANTIZATION_KEY: Final = "general.quantization_version"
FILE_TYPE_KEY: Final = "general.file_type"
_SPLIT: Final = "split."
_COUNT_BYTES: Final = 8
_LONGEST_KEY: Final = 65_535
_LONGEST_NAME: Final = 63
_MOST_DIMENSIONS: Final = 4


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of tensors.

    Attributes:
        number: as files call it.
        name: as ggml calls it.
        numbers: elements in a record; 1 for plain types.
        nbytes: size of a record in bytes.
        dtype: the recipe name of it; ``None`` for those that are not read here.
    """

    number: int
    name: str
    numbers: int
    nbytes: int
    dtype: str | None = None


_TYPES: Final = (
    GgmlType(0, "F32", 1, 4, "float32"),
    GgmlType(1, "F16", 1, 2, "float16"),
    GgmlType(2, "Q4_0", 32, 18, "q4_0"),
    GgmlType(3, "Q4_1", 32, 20),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24),
    GgmlType(8, "Q8_0", 32, 34, "q8_0"),
    GgmlType(9, "Q8_1", 32, 40),
    GgmlType(10, "Q2_K", 256, 84),
    GgmlType(11, "Q3_K", 256, 110),
    GgmlType(12, "Q4_K", 256, 144, "q4_k"),
    GgmlType(13, "Q5_K", 256, 176),
    GgmlType(14, "Q6_K", 256, 210, "q6_k"),
    GgmlType(15, "Q8_K", 256, 292),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    GgmlType(24, "I8", 1, 1, "int8"),
    GgmlType(25, "I16", 1, 2, "int16"),
    GgmlType(26, "I32", 1, 4, "int32"),
    GgmlType(27, "I64", 1, 8, "int64"),
    GgmlType(28, "F64", 1, 8, "float64"),
    GgmlType(29, "IQ1_M", 256, 56),
    GgmlType(30, "BF16", 1, 2, "bfloat16"),
    GgmlType(34, "TQ1_0", 256, 54),
    GgmlType(35, "TQ2_0", 256, 66),
    GgmlType(39, "MXFP4", 32, 17),
    GgmlType(40, "NVFP4", 64, 36),
    GgmlType(41, "Q1_0", 128, 18),
)
GGML_TYPES: Final = MappingProxyType({each.number: each for each in _TYPES})
"""Every type that ggml knows, by number; numbers that are missing were given up."""

TYPE_OF: Final = MappingProxyType({each.dtype: each for each in _TYPES if each.dtype is not None})
"""The type of each dtype that a GGUF file can hold."""

_FILE_TYPES: Final = {
    "float32": 0,
    "float16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q4_k": 14,
    "q6_k": 18,
    "bfloat16": 32,
}


def aligned(position: int, alignment: int) -> int:
    """The first multiple of ``alignment`` that is not before ``position``."""
    return -(-position // alignment) * alignment


def is_container_key(key: str) -> bool:
    """Whether a metadata key says how a file is laid out: it is true of that file alone."""
    own = {ALIGNMENT_KEY, QUANTIZATION_KEY, FILE_TYPE_KEY}
    return key in own or key.startswith(_SPLIT)


def encode_gguf_header(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    alignment: int = DEFAULT_ALIGNMENT,
    longest_name: int = _LONGEST_NAME,
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a GGUF file of version 3, up to the first tensor.

    Tensors lie in the order of their names. Metadata is in the order of keys, after
    ``general.architecture``. ``general.alignment``, ``general.file_type`` and, if a tensor is
    quantized, ``general.quantization_version`` are this function's to say, and ``split.*`` is
    left out, whatever ``metadata`` says of them.

    Args:
        tensors: what is to be written, in any order.
        metadata: texts of ``gguf_values``; those of a safetensors file are strings.
        alignment: of tensors, in bytes; a power of two, from 8 on.
        longest_name: the most bytes of a tensor's name; llama.cpp reads no longer ones than 63.

    Returns:
        The header, padded; and where each tensor begins, from the start of the file.

    Raises:
        InvalidInput: there is no ``general.architecture``; a dtype, shape, name or metadata that
            GGUF does not hold. With all of them.
        ValueError: a name twice, one that is no Unicode text, or an alignment that is none.
    """
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"an alignment is a power of two from 8 on, not {alignment}")
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    for one, other in pairwise(ordered):
        if one.name == other.name:
            raise ValueError(f"two tensors are called {one.name!r}")
    values = {key: text for key, text in metadata.items() if not is_container_key(key)}
    problems = [
        *_metadata_problems(values),
        *(problem for tensor in ordered for problem in _tensor_problems(tensor, longest_name)),
    ]
    packed = {key: _packed(key, text, problems) for key, text in values.items()}
    if problems:
        raise InvalidInput(problems)
    packed |= {key: pack_value(text) for key, text in _own_values(ordered, alignment)}
    order = sorted(packed, key=lambda key: (key != ARCHITECTURE_KEY, key))
    header = bytearray(MAGIC + VERSION.to_bytes(4, "little"))
    for count in (len(ordered), len(packed)):
        header += count.to_bytes(_COUNT_BYTES, "little")
    for key in order:
        header += pack_string(key) + packed[key]
    offsets: dict[str, int] = {}
    position = 0
    for tensor in ordered:
        offsets[tensor.name] = position
        header += _tensor_info(tensor, position)
        position = aligned(position + tensor.nbytes, alignment)
    header += bytes(aligned(len(header), alignment) - len(header))
    return bytes(header), {name: len(header) + offset for name, offset in offsets.items()}


def plan_gguf_file(
    path: str,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    alignment: int = DEFAULT_ALIGNMENT,
    longest_name: int = _LONGEST_NAME,
) -> OutputFilePlan:
    """``encode_gguf_header`` as a file to be written; bytes of no tensor are zeros, to its end."""
    header, offsets = encode_gguf_header(tensors, metadata, alignment, longest_name)
    by_name = {tensor.name: tensor for tensor in tensors}
    size = len(header)
    for name, offset in offsets.items():
        size = aligned(offset + by_name[name].nbytes, alignment)
    return OutputFilePlan(
        path=path,
        header=header,
        size=size,
        tensors={name: by_name[name] for name in offsets},
        offsets=offsets,
    )


def _tensor_info(tensor: OutputTensor, offset: int) -> bytes:
    dims = b"".join(dim.to_bytes(8, "little") for dim in reversed(tensor.shape))
    number = TYPE_OF[tensor.dtype].number.to_bytes(4, "little")
    count = len(tensor.shape).to_bytes(4, "little")
    return pack_string(tensor.name) + count + dims + number + offset.to_bytes(8, "little")


def _own_values(tensors: Sequence[OutputTensor], alignment: int) -> Iterator[tuple[str, str]]:
    yield ALIGNMENT_KEY, value_text("uint32", str(alignment))
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        count = 1
        for dim in tensor.shape:
            count *= dim
        numbers[tensor.dtype] += count
    known = [dtype for dtype in sorted(numbers) if dtype in _FILE_TYPES]
    if known:
        most = max(known, key=lambda dtype: numbers[dtype])
        yield FILE_TYPE_KEY, value_text("uint32", str(_FILE_TYPES[most]))
    if any(dtype in BLOCK_DTYPES for dtype in numbers):
        yield QUANTIZATION_KEY, value_text("uint32", str(QUANTIZATION_VERSION))


def _packed(key: str, text: str, problems: list[Problem]) -> bytes:
    try:
        return pack_value(text)
    except ValueError as error:
        problems.append(Problem("bad-metadata", f"the metadata value of {key!r}: {error}"))
        return b""


def _metadata_problems(metadata: Mapping[str, str]) -> Iterator[Problem]:
    if not metadata.get(ARCHITECTURE_KEY):
        yield Problem(
            "missing-architecture",
            f"a GGUF file needs {ARCHITECTURE_KEY} in its metadata",
            "Name it as programs that read the file do, such as flux or bert.",
        )
    for key in metadata:
        try:
            if 0 < len(key.encode("utf-8")) <= _LONGEST_KEY:
                continue
        except UnicodeEncodeError:
            pass
        yield Problem(
            "bad-metadata", f"{key[:40]!r} is no key: a text of 1 to {_LONGEST_KEY:,} bytes"
        )


def _tensor_problems(tensor: OutputTensor, longest_name: int) -> Iterator[Problem]:
    def problem(kind: str, message: str, hint: str | None = None) -> Problem:
        return Problem(kind, message, hint, tensor=tensor.name)

    length = len(tensor.name.encode("utf-8", "surrogatepass"))
    if not 0 < length <= longest_name:
        yield problem(
            "name-too-long" if length else "bad-name",
            f"its name has {length} bytes; GGUF files are read with 1 to {longest_name}",
            "Rename it in the target's layout.",
        )
    if len(tensor.shape) > _MOST_DIMENSIONS:
        yield problem(
            "shape-refused",
            f"has {len(tensor.shape)} dimensions, and a GGUF tensor at most {_MOST_DIMENSIONS}",
        )
    if tensor.dtype not in TYPE_OF:
        yield problem(
            "dtype-not-held",
            f"a GGUF file holds no {tensor.dtype}",
            f"It holds {', '.join(sorted(TYPE_OF))}.",
        )
        return
    try:
        byte_size(tensor.dtype, tensor.shape)
    except ValueError as error:
        yield problem("shape-refused", str(error))
