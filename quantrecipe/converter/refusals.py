"""Giving a refused number its address: the file, the tensor, and the index in the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from quantrecipe.formats import Unrepresentable
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import TensorInfo


@contextmanager
def naming(info: TensorInfo, first_row: int = 0) -> Iterator[None]:
    """Within it, a refused number of a block that begins at ``first_row`` of ``info`` is named.

    Raises:
        InvalidInput: in the place of ``Unrepresentable``, with tensor, index and file.
    """
    try:
        yield
    except Unrepresentable as refused:
        problem = replace(refused.at(info.name, first_row), file=str(info.file))
        raise InvalidInput(problem) from refused
