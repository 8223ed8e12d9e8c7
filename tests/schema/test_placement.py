from __future__ import annotations

import ctypes
import json
import string

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import _TYPES, save

from quantrecipe.schema.dtypes import BY_CODE, DTYPES
from quantrecipe.schema.placement import encode_header, parse_size, place
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import OutputFilePlan, OutputTensor

NAMES = st.one_of(
    st.text(string.ascii_lowercase + "._0", min_size=1, max_size=12),
    st.text(st.characters(codec="utf-8"), max_size=8),
).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
METADATA = st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=1)
TORCH_DTYPES = st.sampled_from(sorted(BY_CODE[code].name for code in _TYPES))
NAMES_OF_SPECS = sorted(set(DTYPES) - {"float6_e2m3fn", "float6_e3m2fn"})


def tensor(name: str, size: int = 1) -> OutputTensor:
    return OutputTensor(name, "uint8", (size,))


def filled(output: OutputTensor, seed: int) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, output.dtype)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2, (output.nbytes,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(output.shape)


def test_every_dtype_that_torch_saves_is_known() -> None:
    assert {code: str(dtype) for code, dtype in _TYPES.items()} == {
        code: f"torch.{BY_CODE[code].name}" for code in _TYPES
    }
    assert {code: 8 * torch.empty(0, dtype=_TYPES[code]).element_size() for code in _TYPES} == {
        code: BY_CODE[code].bits for code in _TYPES
    }


@given(
    st.dictionaries(NAMES, st.tuples(TORCH_DTYPES, SHAPES), max_size=8),
    METADATA,
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
)
def test_a_plan_gives_the_bytes_of_safetensors(tensors, metadata, seed, random) -> None:  # type: ignore[no-untyped-def]
    outputs = [OutputTensor(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    data = {output.name: filled(output, seed + at) for at, output in enumerate(outputs)}
    expected = save(data, metadata)
    random.shuffle(outputs)

    (plan,), index, index_path = place(outputs, metadata or {}, "x.safetensors")

    assert (index, index_path) == (None, None)
    assert encode_header(outputs, metadata or {}) == plan.header
    file = bytearray(plan.header)
    for name in plan.tensors:
        assert plan.offsets[name] == len(file)
        file += data[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert bytes(file) == expected
    assert plan.size == len(expected)


def test_every_dtype_ranks_as_in_safetensors() -> None:
    data = ctypes.create_string_buffer(64)
    address = ctypes.addressof(data)
    specs = {
        name: safetensors.TensorSpec(dtype=name, shape=[2], data_ptr=address, data_len=2 * size)
        for name in NAMES_OF_SPECS
        for size in [DTYPES[name].bits // 8 or 1]
    }
    # The library counts a packed pair of F4 as one element of torch, and as two in the header.
    outputs = [
        OutputTensor(name, name, (4 if DTYPES[name].bits == 4 else 2,)) for name in NAMES_OF_SPECS
    ]
    expected = safetensors.serialize(specs, None)
    assert expected.startswith(encode_header(outputs, {}))


def test_golden_bytes() -> None:
    outputs = [OutputTensor("b", "int8", (2,)), OutputTensor("ü", "float32", ())]
    assert encode_header(outputs, {"k": '"'}).hex() == (
        "8800000000000000"
        + b'{"__metadata__":{"k":"\\""},'.hex()
        + '"ü":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'.encode().hex()
        + b'"b":{"dtype":"I8","shape":[2],"data_offsets":[4,6]}}    '.hex()
    )


def test_metadata_keys_are_sorted() -> None:
    header = encode_header([], {"b": "1", "a": "2"})
    assert header[8:] == b'{"__metadata__":{"a":"2","b":"1"}}      '


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        pytest.param([tensor("a"), tensor("a")], "two tensors are called 'a'", id="twice"),
        pytest.param([tensor("__metadata__")], "not a name", id="metadata"),
        pytest.param(
            [OutputTensor("a", "float4_e2m1fn_x2", (3,))], "does not fill whole bytes", id="torn"
        ),
        pytest.param([tensor("\ud800")], "surrogates not allowed", id="surrogate"),
    ],
)
def test_what_no_file_can_hold_is_refused(outputs: list[OutputTensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_header(outputs, {})
    with pytest.raises(ValueError, match=message):
        place(outputs, {}, "x.safetensors", 1)


def test_a_header_over_the_limit_asks_for_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantrecipe.schema.placement.MAX_HEADER_BYTES", 1000)
    assert place([tensor("a")], {"k": "x" * 800}, "x.safetensors")
    with pytest.raises(InvalidInput) as caught:
        place([tensor("a")], {"k": "x" * 1000}, "x.safetensors")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.file) == ("header-too-large", "x.safetensors")


SIZED = st.dictionaries(NAMES, st.integers(0, 40), min_size=1, max_size=12)


@given(SIZED, st.integers(1, 60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_shards_hold_every_tensor_once_and_keep_groups(sizes, limit, modulus, random) -> None:  # type: ignore[no-untyped-def]
    outputs = [tensor(name, size) for name, size in sizes.items()]
    groups = {name: str(at % modulus) for at, name in enumerate(sizes) if at % 3}
    plans, index, index_path = place(outputs, {"k": "v"}, "d/m.safetensors", limit, groups)

    random.shuffle(outputs)
    again = place(outputs, {"k": "v"}, "d/m.safetensors", limit, groups)
    assert again == (plans, index, index_path)
    where = {name: plan for plan in plans for name in plan.tensors}
    assert sum(len(plan.tensors) for plan in plans) == len(sizes)
    assert where.keys() == sizes.keys()
    for plan in plans:
        assert plan.tensors
        payload = plan.size - len(plan.header)
        assert payload <= limit or sum(size > 0 for size in map(sizes.get, plan.tensors)) == 1
    for key in set(groups.values()):
        members = [name for name in groups if groups[name] == key]
        if sum(sizes[name] for name in members) <= limit:
            assert len({where[name].path for name in members}) == 1
    if len(plans) == 1:
        assert (plans[0].path, index, index_path) == ("d/m.safetensors", None, None)
    else:
        check_index(plans, index, index_path, sum(sizes.values()))


def check_index(
    plans: tuple[OutputFilePlan, ...], index: bytes | None, index_path: str | None, total: int
) -> None:
    count = len(plans)
    assert [plan.path for plan in plans] == [
        f"d/m-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    assert index_path == "d/m.safetensors.index.json"
    assert json.loads(index or b"") == {
        "metadata": {"total_size": total},
        "weight_map": {name: plan.path[2:] for plan in plans for name in plan.tensors},
    }


def test_shards_are_filled_in_the_order_of_names() -> None:
    outputs = [tensor(name, 4) for name in "edcba"]
    plans, _, _ = place(outputs, {}, "m.safetensors", 8)
    assert [list(plan.tensors) for plan in plans] == [["a", "b"], ["c", "d"], ["e"]]


def test_a_group_moves_whole_into_the_next_shard() -> None:
    outputs = [tensor("a", 4), tensor("m.scale", 2), tensor("m.weight", 4)]
    groups = {"m.weight": "m", "m.scale": "m"}
    plans, _, _ = place(outputs, {}, "m.safetensors", 8, groups)
    assert [list(plan.tensors) for plan in plans] == [["a"], ["m.scale", "m.weight"]]


def test_no_limit_reached_no_shards() -> None:
    plans, index, _ = place([tensor("a", 4), tensor("b", 4)], {}, "m.safetensors", 8)
    assert [plan.path for plan in plans] == ["m.safetensors"]
    assert index is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1B", 1), ("7KB", 7_000), ("5MB", 5_000_000), ("5GB", 5 * 10**9), ("2TB", 2 * 10**12)],
)
def test_sizes_are_decimal(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "5", "0GB", "5gb", "5 GB", "5GiB", "1.5GB", "-1B", "\u0665GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("path", "limit"), [("x.bin", None), ("x.safetensors", 0)])
def test_impossible_requests_are_refused(path: str, limit: int | None) -> None:
    with pytest.raises(ValueError, match=r"not a|at least one byte"):
        place([], {}, path, limit)
