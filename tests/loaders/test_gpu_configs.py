"""What the GPU kernels do on the host: configurations, caches, compiling, launching. No GPU."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.loaders.kernels import LinearCall, configs, find_kernel, hopper, nvrtc, on_triton
from quantrecipe.loaders.kernels.cache import cache_folder, keep
from quantrecipe.loaders.kernels.configs import (
    Measured,
    Product,
    TritonProduct,
    product_config,
    read_measured,
    shared_limit,
    shipped_measured,
    tuned_file,
    write_measured,
)
from quantrecipe.loaders.kernels.hopper import CANDIDATES, HopperProduct
from quantrecipe.loaders.kernels.nvrtc import CudaError, CudaFunction, byte_map, compile_cuda

HOPPER = CANDIDATES[0]
TRITON = TritonProduct(128, 64, 64, 4, 4, 8)
MEASURED = Measured("sm_90", "A GPU", 32, 48, 1000, HOPPER, 12.5)


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measurements of the user's, and nothing remembered."""
    monkeypatch.setenv("QUANTRECIPE_CACHE", str(tmp_path / "cache"))
    remembered: tuple[Any, ...] = (configs._known, product_config, nvrtc._libraries, byte_map)
    for each in remembered:
        each.cache_clear()
    yield
    monkeypatch.undo()
    for each in remembered:
        each.cache_clear()


# How products are cut up.


def test_candidates_run_and_use_the_memory_there_is() -> None:
    assert len(CANDIDATES) == len(set(CANDIDATES))
    assert {each.columns for each in CANDIDATES} >= {128, 208, 256}
    for each in CANDIDATES:
        assert each.runs("sm_90")
        assert not replace(each, stages=each.stages + 1).runs("sm_90")
        # Parts of a tile that blocks of a cluster load for each other start where swizzling does.
        assert each.columns // each.cluster * each.depth % (8 * each.depth) == 0
        assert (128 + each.columns) * each.depth % 1024 == 0
        assert each.shared <= shared_limit("sm_90")


@pytest.mark.parametrize(
    "change",
    [
        {"columns": 0},
        {"columns": 200},
        {"columns": 272},
        {"depth": 32},
        {"depth": 256},
        {"stages": 1, "lag": 0},
        {"stages": 64},
        {"cluster": 0},
        {"cluster": 4},
        {"lag": -1},
        {"lag": 6},
        {"group": 0},
    ],
)
def test_what_the_hopper_kernel_cannot_be(change: dict[str, int]) -> None:
    good = HopperProduct(128, 64, 6, 2, 2, 8)
    assert good.runs("sm_90")
    assert not good.runs("sm_100")
    assert not replace(good, **change).runs("sm_90")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 8},
        {"rows": 96},
        {"columns": 0},
        {"depth": 16},
        {"depth": 1024, "rows": 256},
        {"rows": 512, "columns": 256},
        {"warps": 3},
        {"warps": 32},
        {"stages": 0},
        {"stages": 40},
        {"group": 0},
    ],
)
def test_what_the_triton_kernel_cannot_be(change: dict[str, int]) -> None:
    assert TRITON.runs("sm_80")
    assert not replace(TRITON, **change).runs("sm_80")


ARCHITECTURES = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121"]


@given(
    st.sampled_from(ARCHITECTURES),
    st.integers(1, 256),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 17),
    st.integers(1, 1 << 17),
    st.booleans(),
)
def test_rules_run_where_they_apply(
    architecture: str, multiprocessors: int, rows: int, out: int, depth: int, can: bool
) -> None:
    can = can and architecture == "sm_90"
    config = product_config(architecture, multiprocessors, rows, out, depth, can)
    assert config.runs(architecture)
    assert can or isinstance(config, TritonProduct)


@pytest.mark.parametrize(
    ("rows", "found"),
    [(499, None), (500, 1000), (1400, 1000), (1450, 2100), (4200, 2100), (4201, None)],
)
def test_the_measurement_nearest_in_rows_stands(rows: int, found: int | None) -> None:
    products = {1000: TRITON, 2100: replace(TRITON, group=4)}
    for each, product in products.items():
        configs.add_measured(Measured("sm_80", "A GPU", 32, 48, each, product, 1.0))
    rule = product_config("sm_80", 100, rows, 48, 32, False)
    assert rule not in products.values()
    expected = rule if found is None else products[found]
    assert product_config("sm_80", 100, rows, 32, 48, False) == expected


def test_what_cannot_be_computed_on_hopper_takes_another_measurement() -> None:
    configs.add_measured(MEASURED)
    configs.add_measured(replace(MEASURED, rows=900, product=TRITON))
    assert product_config("sm_90", 132, 1000, 32, 48, True) == HOPPER
    assert product_config("sm_90", 132, 1000, 32, 48, False) == TRITON


def test_the_users_measurements_come_before_the_shipped_ones() -> None:
    shipped = shipped_measured()[0]
    question = ("sm_90", 132, shipped.rows, shipped.out_features, shipped.in_features, True)
    assert product_config(*question) == shipped.product
    configs.add_measured(replace(shipped, product=TRITON))
    assert product_config(*question) == TRITON


def test_measurements_that_are_shipped() -> None:
    ideogram = [(13824, 4608), (4608, 4608), (12288, 4608), (4608, 12288), (4608, 53248)]
    found = shipped_measured()
    assert {(each.architecture, each.device) for each in found} == {("sm_90", "NVIDIA H200")}
    assert sorted(configs._key(each) for each in found) == sorted(
        (*shape, rows) for shape in ideogram for rows in (4352, 1024, 16, 1)
    )


# Files of measurements.

SIZES = st.integers(1, 1 << 20)
PRODUCTS = st.one_of(
    st.sampled_from(CANDIDATES),
    st.builds(
        TritonProduct,
        st.sampled_from([16, 64, 128]),
        st.sampled_from([16, 64, 128]),
        st.sampled_from([32, 64]),
        st.sampled_from([1, 2, 4, 8, 16]),
        st.integers(1, 5),
        st.integers(1, 16),
    ),
)


@given(
    st.lists(
        st.builds(
            Measured,
            st.just("sm_90"),
            st.text(),
            SIZES,
            SIZES,
            SIZES,
            PRODUCTS,
            st.floats(0.1, 1e6),
        )
    )
)
def test_files_say_what_was_written(measured: list[Measured]) -> None:
    content = write_measured(measured)
    assert read_measured(content, "here") == tuple(measured)
    assert content.count(b"\n") == max(1, len(measured)) + 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"{}", b'{"measured": 1}', b"[" * 100_000, b"9" * 5000],
)
def test_a_file_of_something_else_is_named_and_ignored(content: bytes) -> None:
    with pytest.warns(UserWarning, match=r"here\.json is ignored"):
        assert read_measured(content, "here.json") == ()


PLACES = ["architecture", "device", "out_features", "in_features", "rows", "microseconds"]
FIELDS = ["engine", "columns", "depth", "stages", "cluster", "lag", "group"]
WRONG: list[Any] = [None, True, "16", [], {}, -1, 0.5, float("nan"), float("inf"), 1 << 40]


FINE = [("device", "16"), ("microseconds", 0.5), ("microseconds", 1 << 40)]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (place, wrong)
        for place in [*PLACES, "product", *FIELDS, "extra", "product extra"]
        for wrong in WRONG
        if (place, wrong) not in FINE
    ],
)
def test_one_bad_measurement_is_left_out(place: str, wrong: object) -> None:
    value = MEASURED.to_json_value()
    inside = place in FIELDS or place.startswith("product ")
    (value["product"] if inside else value)[place] = wrong
    content = json.dumps({"measured": [value, MEASURED.to_json_value()]}).encode()
    with pytest.warns(UserWarning, match=r"here\.json: 1 of 2"):
        assert read_measured(content, "here.json") == (MEASURED,)


def test_a_broken_file_changes_nothing_but_says_so() -> None:
    question = ("sm_90", 132, 1000, 32, 48, True)
    rule = product_config(*question)
    keep(tuned_file("sm_90"), b"not JSON")
    configs._known.cache_clear()
    product_config.cache_clear()
    with pytest.warns(UserWarning, match=r"sm_90\.json is ignored"):
        assert product_config(*question) == rule


def test_a_file_of_another_architecture_is_not_used() -> None:
    keep(
        tuned_file("sm_90"),
        write_measured([replace(MEASURED, architecture="sm_80", product=TRITON)]),
    )
    assert product_config("sm_90", 132, 1000, 32, 48, True) != TRITON


# Where things are kept.


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("QUANTRECIPE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quantrecipe"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "quantrecipe"


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some" / "folders" / "file"
    keep(path, b"first")
    keep(path, b"second")
    assert path.read_bytes() == b"second"

    def full(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    keep(path, b"third")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    keep(tmp_path / "file" / "below", b"content")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    keep(locked / "file", b"content")
    if os.geteuid():  # root writes everywhere
        assert not list(locked.iterdir())


# Compiling and launching.


class Driver:
    """Records what it is called with; ``status`` is what it answers."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.values: list[int] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls[name] = arguments
            if name == "cuLaunchKernel":
                self._read(arguments[9])
            return self.status

        return call

    def _read(self, pointers: Any) -> None:
        # While the call lasts: what pointers point at need not live longer.
        kinds: list[Any] = [ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong]
        for address, kind in zip(pointers, kinds, strict=True):
            self.values.append(kind.from_address(address).value or 0)


class Compiler:
    """NVRTC, for programs of one word."""

    def __init__(self) -> None:
        self.compiled: list[tuple[bytes, list[bytes]]] = []

    def nvrtcVersion(self, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = 12, 9
        return 0

    def nvrtcCreateProgram(self, program: Any, text: bytes, *_: object) -> int:  # noqa: N802
        self.text = text
        return 0

    def nvrtcCompileProgram(self, program: Any, count: int, options: Any) -> int:  # noqa: N802
        self.compiled.append((self.text, list(options)))
        return 6 if b"wrong" in self.text else 0

    def nvrtcGetProgramLogSize(self, program: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = 64
        return 0

    def nvrtcGetProgramLog(self, program: Any, log: Any) -> int:  # noqa: N802
        log.value = b"quantrecipe.cu(1): error: a word is wrong"
        return 0

    def nvrtcGetCUBINSize(self, program: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = 5
        return 0

    def nvrtcGetCUBIN(self, program: Any, code: Any) -> int:  # noqa: N802
        code.raw = b"a\0b\0c"
        return 0

    def nvrtcDestroyProgram(self, program: Any) -> int:  # noqa: N802
        return 0


def there_are(monkeypatch: pytest.MonkeyPatch, compiler: object, driver: object) -> None:
    monkeypatch.setattr(nvrtc, "_loaded", lambda: (compiler, driver))


def test_without_libraries_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not nvrtc.is_available()
    with pytest.raises(CudaError, match="neither NVRTC nor the driver was found"):
        compile_cuda("", (), "sm_90a")


@pytest.mark.parametrize("there", ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", None])
def test_any_nvrtc_does(monkeypatch: pytest.MonkeyPatch, there: str | None) -> None:
    def load(name: str) -> object:
        if name in ("libcuda.so.1", there):
            return object()
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert nvrtc.is_available() == (there is not None)


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    there_are(monkeypatch, compiler, None)
    for _ in range(2):
        assert compile_cuda("word", (("A", "1"), ("B", "x")), "sm_90a") == b"a\0b\0c"
    options = [b"--gpu-architecture=sm_90a", b"-std=c++17"]
    assert compiler.compiled == [(b"#define A 1\n#define B x\nword", options)]
    compile_cuda("word", (("A", "2"), ("B", "x")), "sm_90a")
    compile_cuda("word", (("A", "2"), ("B", "x")), "sm_100a")
    assert len(compiler.compiled) == 3
    assert len(list((cache_folder() / "cuda").iterdir())) == 3


def test_a_program_that_is_wrong_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are(monkeypatch, Compiler(), None)
    with pytest.raises(CudaError, match=r"NVRTC: .*a word is wrong"):
        compile_cuda("wrong", (), "sm_90a")
    assert not (cache_folder() / "cuda").exists()


@given(
    st.integers(1, 1 << 40).map(lambda address: 16 * address),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 13).map(lambda columns: 16 * columns),
    st.integers(1, 256),
    st.sampled_from([32, 64, 128]),
)
def test_maps_say_where_boxes_are(
    address: int, rows: int, columns: int, box_rows: int, box_columns: int
) -> None:
    driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        there_are(patch, None, driver)
        byte_map.cache_clear()
        made = byte_map(address, rows, columns, box_rows, box_columns)
    assert ctypes.addressof(made) % 64 == 0
    assert ctypes.sizeof(made) == 128
    to, dtype, rank, at, sizes, strides, box, steps, *rest = driver.calls["cuTensorMapEncodeTiled"]
    assert to is made
    assert (dtype, rank, at.value) == (0, 2, address)
    assert [*sizes, *strides] == [columns, rows, columns]
    assert [*box, *steps] == [box_columns, box_rows, 1, 1]
    assert rest == [0, {32: 1, 64: 2, 128: 3}[box_columns], 2, 0]


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> tuple[CudaFunction, Driver]:
    driver = Driver()
    there_are(monkeypatch, None, driver)

    class Stream:
        cuda_stream = 77

    class Device:
        def __init__(self, device: int) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream)
    return CudaFunction(b"code", "some_function", 0, shared=100_000), driver


def test_a_function_is_found_and_given_its_memory(function: tuple[CudaFunction, Driver]) -> None:
    _, driver = function
    assert driver.calls["cuModuleLoadData"][1] == b"code"
    assert driver.calls["cuModuleGetFunction"][2] == b"some_function"
    assert driver.calls["cuFuncSetAttribute"][1:] == (8, 100_000)


def test_arguments_are_passed_by_address_in_order(function: tuple[CudaFunction, Driver]) -> None:
    launched, driver = function
    x = torch.zeros(4)
    launched.launch(3, 384, nvrtc.pointer(x), ctypes.c_int(-5), ctypes.c_longlong(1 << 40))
    assert driver.values == [x.data_ptr(), -5, 1 << 40]
    _, *grid, shared, stream, _, extra = driver.calls["cuLaunchKernel"]
    assert grid == [3, 1, 1, 384, 1, 1]
    assert (shared, stream.value, extra) == (100_000, 77, None)
    assert nvrtc.pointer(None).value is None


def test_a_driver_that_refuses_is_named(function: tuple[CudaFunction, Driver]) -> None:
    launched, driver = function
    driver.status = 700
    with pytest.raises(CudaError, match="cuLaunchKernel failed with status 700"):
        launched.launch(1, 32, ctypes.c_void_p(), ctypes.c_int(), ctypes.c_longlong())


# What is computed by whom.


@given(st.integers(1, 1 << 20))
def test_two_powers_of_two_cover_closely(length: int) -> None:
    first, second = on_triton.covering(length)
    assert first & (first - 1) == second & (second - 1) == 0
    assert length <= first + second < 2 * length
    assert second < first


@given(st.integers(1, 1 << 17))
def test_threads_cover_a_row(in_features: int) -> None:
    vectors, threads = hopper._vectors(in_features)
    assert threads % 32 == 0
    assert 32 <= threads <= 512
    if vectors:  # held in registers: all of it, and no warp too many
        assert 0 <= 8 * vectors * threads - in_features < 8 * 32 * vectors
    else:
        assert in_features > 8 * 4 * 512


def call(**changes: Any) -> LinearCall:
    made = LinearCall(
        rows=4096,
        out_features=64,
        in_features=32,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        code_dtype=torch.int8,
        scale_dtype=torch.float32,
        group=(1, 32),
        activation="int8:token",
        smoothing=False,
        rotation=0,
        bias=False,
    )
    return replace(made, **changes)


WEIGHT_ONLY = {"activation": ""}


@pytest.mark.parametrize(
    ("changes", "capability", "says"),
    [
        ({}, (8, 0), None),
        ({}, (12, 1), None),
        ({"group": (64, 32)}, (9, 0), None),
        (WEIGHT_ONLY | {"code_dtype": torch.float8_e5m2}, (8, 0), None),
        (WEIGHT_ONLY | {"code_dtype": torch.float8_e4m3fn}, (8, 9), None),
        ({"activation": "int8:tensor", "dtype": torch.float32}, (8, 0), None),
        ({}, (7, 5), "capability 8.0"),
        ({"device": torch.device("cpu")}, (9, 0), "NVIDIA"),
        ({"dtype": torch.float64}, (9, 0), "float64"),
        ({"group": (1, 16)}, (9, 0), "one scale for each row"),
        ({"group": (2, 32)}, (9, 0), "one scale for each row"),
        ({"activation": "float8_e4m3fn:token"}, (9, 0), "int8 beside int8"),
        ({"code_dtype": torch.float8_e5m2}, (9, 0), "int8 beside int8"),
        (WEIGHT_ONLY | {"code_dtype": torch.float8_e4m3fn}, (8, 6), "capability 8.9"),
    ],
)
def test_what_the_triton_kernel_refuses(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    capability: tuple[int, int],
    says: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(on_triton, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = find_kernel("triton").refuses(call(**changes))
    assert reason is None if says is None else says in (reason or "")


def test_it_needs_triton_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_triton, "find_spec", lambda name: None)
    assert find_kernel("triton").refuses(call()) == "Triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert find_kernel("triton").refuses(call()) == "it runs on NVIDIA GPUs"


@pytest.mark.parametrize(
    ("dtype", "in_features", "capability", "can"),
    [
        (torch.bfloat16, 4608, (9, 0), True),
        (torch.float16, 16, (9, 0), True),
        (torch.float32, 4608, (9, 0), False),
        (torch.bfloat16, 4616, (9, 0), False),
        (torch.bfloat16, 4608, (10, 0), False),
    ],
)
def test_what_runs_on_hoppers_own_instructions(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    in_features: int,
    capability: tuple[int, int],
    can: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(hopper, "is_available", lambda: True)
    assert hopper.can_multiply(torch.device("cuda"), dtype, in_features) == can
    whole = torch.zeros(64, dtype=torch.int8)
    assert hopper.can_multiply(torch.device("cuda"), dtype, in_features, whole) == can
    assert not hopper.can_multiply(torch.device("cuda"), dtype, in_features, whole[1:])


def test_an_engine_has_one_name() -> None:
    products: list[Product] = [HOPPER, TRITON]
    engines = [
        replace(MEASURED, product=each).to_json_value()["product"]["engine"] for each in products
    ]
    assert engines == ["hopper", "triton"]
