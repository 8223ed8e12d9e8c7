"""Files of the package ``gguf`` are read, and it reads ours.

``python -m tests.foreign.test_gguf_package`` writes the golden file anew, with that package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantrecipe.checkpoint.gguf import read_gguf_header
from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.formats.ggml import RECORD_FORMATS
from quantrecipe.schema.gguf import TYPE_OF, is_container_key, plan_gguf_file
from quantrecipe.schema.schemes import GgmlRecords
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo

GOLDEN = Path(__file__).with_name("golden") / "gguf-0.19-mixed.gguf"

METADATA = {
    "general.architecture": "test",
    "general.name": "mixed, with é",
    "test.uint8": "gguf:uint8:255",
    "test.int8": "gguf:int8:-128",
    "test.uint16": "gguf:uint16:65535",
    "test.int16": "gguf:int16:-2",
    "test.uint32": "gguf:uint32:7",
    "test.int32": "gguf:int32:-7",
    "test.float32": "gguf:float32:0.1",
    "test.uint64": f"gguf:uint64:{2**64 - 1}",
    "test.int64": f"gguf:int64:{-(2**63)}",
    "test.float64": "gguf:float64:0.1",
    "test.bool": "gguf:bool:true",
    "test.strings": 'gguf:[string]:["a","\\n"]',
    "test.floats": "gguf:[float32]:[0.5,-1.0]",
    "test.nested": "gguf:[[int32]]:[[1,2],[3]]",
}


def numbers() -> Any:
    """float32 ``[3, 256]``, whole sixty-fourths: the same everywhere."""
    steps = np.arange(768).reshape(3, 256)
    return ((steps * 37 % 101 - 50) * (1 + steps % 5) / 64).astype(np.float32)


def tensors() -> dict[str, tuple[str, Any]]:
    """Name to dtype and array; K-quants are bytes of our own making."""
    weight = numbers()
    arrays: dict[str, tuple[str, Any]] = {
        "norm.bias": ("float32", weight[0, :5]),
        "half.weight": ("float16", weight[:, :3].astype(np.float16)),
        "double.weight": ("float64", weight[:2, :2].astype(np.float64)),
        "whole.int8": ("int8", np.arange(-3, 4, dtype=np.int8)),
        "whole.int64": ("int64", np.arange(2, dtype=np.int64).reshape(1, 2, 1)),
    }
    for name, fmt in RECORD_FORMATS.items():
        records = fmt.encode(torch.from_numpy(weight), torch.empty(0), spec(name))
        arrays[f"{name}.weight"] = (name, records.numpy())
    return arrays


def spec(name: str) -> GgmlRecords:
    return GgmlRecords.model_validate({"format": name, "granularity": "block"})


def write_with_package(path: Path) -> None:
    """``METADATA`` and ``tensors`` as the package writes them."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "test")
    for key, text in METADATA.items():
        if key == "general.architecture":
            continue
        if not text.startswith("gguf:"):
            writer.add_string(key, text)
            continue
        kind, value = text.removeprefix("gguf:").split(":", 1)
        add = writer.add_array if kind.startswith("[") else getattr(writer, f"add_{kind}")
        add(key, json.loads(value))
    for name, (dtype, array) in tensors().items():
        number = TYPE_OF[dtype].number
        raw = GGMLQuantizationType(number) if dtype in RECORD_FORMATS else None
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bytes(found: SourceFileInfo, name: str) -> bytes:
    info = found.tensors[name]
    data = bytearray(info.nbytes)
    with SourceReader([found]) as reader:
        reader.read_into(info, 0, data)
    return bytes(data)


def check(found: SourceFileInfo) -> None:
    """All that was written is described, and its bytes are where they are said to be."""
    assert {k: v for k, v in found.metadata.items() if not is_container_key(k)} == METADATA
    assert found.tensors.keys() == tensors().keys()
    for name, (dtype, array) in tensors().items():
        info = found.tensors[name]
        assert info.dtype == dtype
        assert info.shape == ((3, 256) if dtype in RECORD_FORMATS else array.shape)
        assert read_bytes(found, name) == array.tobytes()


def test_the_golden_file_is_read() -> None:
    """It was written by gguf 0.19."""
    check(read_gguf_header(GOLDEN))


def test_the_golden_file_decodes_to_its_numbers() -> None:
    found = read_gguf_header(GOLDEN)
    for name, fmt in RECORD_FORMATS.items():
        data = bytearray(read_bytes(found, f"{name}.weight"))
        records = torch.frombuffer(data, dtype=torch.uint8).view(3, -1)
        error = fmt.decode(records, torch.empty(0), spec(name)).numpy() - numbers()
        assert np.abs(error).max() < {"q8_0": 0.03, "q6_k": 0.12}.get(name, 0.7)


def test_files_of_the_package_are_read(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    write_with_package(path)
    check(read_gguf_header(path))
    assert path.read_bytes() == GOLDEN.read_bytes()


def write_ours(path: Path, alignment: int) -> None:
    arrays = tensors()
    outputs = [
        OutputTensor(name, dtype, (3, 256) if dtype in RECORD_FORMATS else array.shape)
        for name, (dtype, array) in arrays.items()
    ]
    plan = plan_gguf_file(path.name, outputs, METADATA, alignment)
    with path.open("wb") as file:
        file.write(plan.header)
        for name, offset in plan.offsets.items():
            file.seek(offset)
            file.write(arrays[name][1].tobytes())
    os.truncate(path, plan.size)


@pytest.mark.parametrize("alignment", [32, 128])
def test_the_package_reads_our_files(tmp_path: Path, alignment: int) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "ours.gguf"
    write_ours(path, alignment)
    check(read_gguf_header(path))
    reader = gguf.GGUFReader(path)
    read = {tensor.name: tensor for tensor in reader.tensors}
    assert read.keys() == tensors().keys()
    for name, (dtype, array) in tensors().items():
        tensor = read[name]
        shape = (3, 256) if dtype in RECORD_FORMATS else array.shape
        assert tensor.tensor_type == TYPE_OF[dtype].number
        assert tuple(reversed(tensor.shape.tolist())) == shape
        assert tensor.data.tobytes() == array.tobytes()
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.alignment"] == alignment
    assert fields["general.quantization_version"] == 2
    assert fields["general.architecture"] == "test"
    assert fields["general.name"] == METADATA["general.name"]
    assert fields["test.uint64"] == 2**64 - 1
    assert fields["test.float32"] == float(np.float32(0.1))
    assert fields["test.bool"] is True
    assert fields["test.strings"] == ["a", "\n"]
    assert fields["test.floats"] == [0.5, -1.0]


if __name__ == "__main__":
    write_with_package(GOLDEN)
