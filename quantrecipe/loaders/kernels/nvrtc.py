"""CUDA C++ that is compiled when it is first needed, and launched on torch's current stream.

Uses NVRTC, which comes with CUDA builds of torch, and the driver; both through ``ctypes``.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantrecipe.loaders.kernels.cache import cache_folder, keep

Macros = tuple[tuple[str, str], ...]
"""Names and texts, which are part of what is compiled."""

_MAX_DYNAMIC_SHARED: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAP_BYTES: Final = 128
_SWIZZLES: Final = {32: 1, 64: 2, 128: 3}
_PROMOTE_TO_128_BYTES: Final = 2


class CudaError(RuntimeError):
    """NVRTC or the driver refused something."""


@cache
def _libraries() -> tuple[Any, Any] | None:
    """NVRTC and the driver, or ``None`` where one of them is missing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [str(file) for each in folders for file in sorted(each.rglob("libnvrtc.so.1[2-9]"))]
    for name in (*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name), driver
        except OSError:
            continue
    return None


def is_available() -> bool:
    """Whether CUDA C++ can be compiled and launched here."""
    return _libraries() is not None


def _loaded() -> tuple[Any, Any]:
    libraries = _libraries()
    if libraries is None:
        raise CudaError("neither NVRTC nor the driver was found")
    return libraries


def _check(status: int, what: str) -> None:
    if status:
        raise CudaError(f"{what} failed with status {status}")


def _version(compiler: Any) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"{major.value}.{minor.value}"


def compile_cuda(source: str, macros: Macros, architecture: str) -> bytes:
    """Machine code of ``source``, from the cache if it was compiled before.

    Raises:
        CudaError: it cannot be compiled; holds the compiler's words.
    """
    compiler, _ = _loaded()
    text = "".join(f"#define {name} {value}\n" for name, value in macros) + source
    digest = hashlib.sha256(f"{_version(compiler)} {architecture}\n{text}".encode()).hexdigest()
    kept = cache_folder() / "cuda" / f"{digest}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        code = _compile(compiler, text, architecture)
        keep(kept, code)
        return code


def _compile(compiler: Any, text: str, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    _check(
        compiler.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"quantrecipe.cu", 0, None, None
        ),
        "nvrtcCreateProgram",
    )
    try:
        options = (ctypes.c_char_p * 2)(
            f"--gpu-architecture={architecture}".encode(), b"-std=c++17"
        )
        status = compiler.nvrtcCompileProgram(program, len(options), options)
        size = ctypes.c_size_t()
        if status:
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise CudaError(f"NVRTC: {log.value.decode(errors='replace')}")
        _check(compiler.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        _check(compiler.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


class CudaFunction:
    """A function of a compiled program, on one device.

    Args:
        code: the machine code.
        name: of the function, declared ``extern "C"``.
        device: index of the device, whose context must exist: torch makes it on first use.
        shared: bytes of dynamic shared memory of each block.
    """

    def __init__(self, code: bytes, name: str, device: int, shared: int = 0) -> None:
        _, self._driver = _loaded()
        self._device, self._shared = device, shared
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()
            _check(self._driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
            _check(
                self._driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
                "cuModuleGetFunction",
            )
            if shared:
                _check(
                    self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared),
                    "cuFuncSetAttribute",
                )
        self._function = function

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        """Queue it on the current stream; arguments are ``ctypes`` values, passed by value."""
        pointers = (ctypes.c_void_p * len(arguments))(
            *[ctypes.addressof(argument) for argument in arguments]
        )
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _check(
            self._driver.cuLaunchKernel(
                self._function,
                *(blocks, 1, 1),
                *(threads, 1, 1),
                self._shared,
                ctypes.c_void_p(stream),
                pointers,
                None,
            ),
            "cuLaunchKernel",
        )


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's data, as an argument; null for none."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


@lru_cache(maxsize=4096)
def byte_map(address: int, rows: int, columns: int, box_rows: int, box_columns: int) -> Any:
    """How the copy engine finds boxes in a contiguous matrix of bytes, as an argument.

    Args:
        address: of the matrix, a multiple of 16.
        rows: of the matrix.
        columns: of the matrix, a multiple of 16.
        box_rows: rows of a box, at most 256.
        box_columns: columns of a box: 32, 64 or 128, which is also how it is swizzled.
    """
    _, driver = _loaded()
    # The map must lie at a multiple of 64 bytes, and Python promises 16.
    memory = (ctypes.c_char * (_MAP_BYTES + 64))()
    offset = -ctypes.addressof(memory) % 64
    made = (ctypes.c_char * _MAP_BYTES).from_buffer(memory, offset)
    _check(
        driver.cuTensorMapEncodeTiled(
            made,
            0,  # bytes
            2,  # dimensions
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(columns),
            (ctypes.c_uint32 * 2)(box_columns, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,  # not interleaved
            _SWIZZLES[box_columns],
            _PROMOTE_TO_128_BYTES,
            0,  # zeros beyond the edges
        ),
        "cuTensorMapEncodeTiled",
    )
    return made
