"""Looking at tensors that say the same of every module.

What is in them is taken for granted here; other programs read what codes mean in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo

_DTYPES: Final = {"float32": "<f4", "int64": "<i8", "int8": "i1", "uint8": "u1"}
_MAPS: Final = ("code_map", "scale_map")


def constant_problems(
    files: Iterable[SourceFileInfo], modules: Iterable[StoredModule]
) -> Iterator[Problem]:
    """Maps of codes, shapes and zeros that are not what they have to be.

    Args:
        files: that the modules lie in.
        modules: as they are stored.

    Raises:
        InvalidInput, SourceError: as ``SourceReader.read_into``.
    """
    with SourceReader(files) as reader:
        for module in modules:
            for role, info in module.tensors.items():
                if role not in ("weight_shape", "zeros", *_MAPS) or info.dtype not in _DTYPES:
                    continue
                buffer = bytearray(info.nbytes)
                reader.read_into(info, 0, buffer)
                found = np.frombuffer(buffer, _DTYPES[info.dtype])
                wrong = _wrong(role, found, module)
                if wrong is not None:
                    yield _problem(role, wrong, info)


def _wrong(role: str, found: NDArray[Any], module: StoredModule) -> str | None:
    if role == "weight_shape":
        shape = [module.out_features, module.in_features]
        if found.tolist() == shape:
            return None
        return f"says {found.tolist()}, and its codes are those of a weight {shape}"
    expected = _map(role) if role in _MAPS else np.zeros(1, found.dtype)
    if expected.size not in (1, found.size):
        # That its shape is wrong was said already.
        return None
    differs = found != expected
    if not differs.any():
        return None
    first = int(np.argmax(differs))
    wanted = np.broadcast_to(expected, found.shape)[first]
    return f"has {found[first]} at [{first}], where {wanted} is expected"


def _map(role: str) -> NDArray[Any]:
    # What needs torch is loaded for the few checkpoints that have maps.
    from quantrecipe.formats.double_quantization import dynamic_map
    from quantrecipe.formats.nf4 import LEVELS

    if role == "code_map":
        return np.array(LEVELS, np.float32)
    return dynamic_map().numpy()


def _problem(role: str, wrong: str, info: TensorInfo) -> Problem:
    kind, hint = _WORDS.get(role, _OF_MAPS)
    return Problem(kind, wrong, hint=hint, file=str(info.file), tensor=info.name)


_OF_MAPS: Final = (
    "wrong-map",
    (
        "Programs that look codes up in it get other numbers than those that know them by heart, "
        "as this one does."
    ),
)
_WORDS: Final = {
    "weight_shape": (
        "wrong-shape",
        (
            "The codes are packed otherwise than they are read here (8 bits, for one), or the "
            "shape is another weight's."
        ),
    ),
    "zeros": (
        "wrong-constant",
        (
            "Zeros are taken for granted when it is read here: with others its numbers are "
            "shifted, or in another order."
        ),
    ),
}
