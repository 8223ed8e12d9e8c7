"""Units: every byte of every tensor belongs to one of them, and to no other."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.converter import plan
from quantrecipe.converter.units import Unit, cut, row_blocks
from quantrecipe.schema.location import Location
from quantrecipe.schema.plan import Plan, PlannedModule
from tests.converter.making import parsed
from tests.converter.test_streaming import grid_of_everything


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source, document = grid_of_everything(tmp_path_factory.mktemp("units"), (14, 40))
    return plan(parsed(document), source)


@given(st.integers(1, 2000))
def test_together_they_write_every_byte_once(everything: Plan, size: int) -> None:
    written = {file.path: np.zeros(file.size, np.uint8) for file in everything.files}
    for unit in cut(everything, size):
        for part in unit.ranges().values():
            written[part.file][part.position : part.position + part.nbytes] += 1
    for file in everything.files:
        assert not written[file.path][: len(file.header)].any()
        assert (written[file.path][len(file.header) :] == 1).all()


@given(st.integers(1, 2000))
def test_together_they_are_done_with_all_of_the_source(everything: Plan, size: int) -> None:
    assert sum(unit.source_bytes for unit in cut(everything, size)) == everything.source_bytes


@given(st.integers(1, 2000))
def test_they_are_numbered_in_the_order_of_the_source(everything: Plan, size: int) -> None:
    units = cut(everything, size)
    assert [unit.index for unit in units] == list(range(len(units)))
    offsets = [_offset(unit) for unit in units]
    assert offsets == sorted(offsets)


@given(st.integers(1, 2000))
def test_what_the_disk_is_asked_for_lies_in_the_tensor(everything: Plan, size: int) -> None:
    asked: dict[tuple[Location, int], int] = {}
    for unit in cut(everything, size):
        info, start, nbytes = unit.main_source
        assert 0 <= start <= start + nbytes <= info.nbytes
        asked[info.file, info.offset] = asked.get((info.file, info.offset), 0) + nbytes
    weights = [module.source.tensors["weight"] for module in everything.modules]
    assert all(asked[info.file, info.offset] == info.nbytes for info in weights)


def test_what_needs_its_whole_weight_is_not_cut(everything: Plan) -> None:
    names = [(unit.of.part, unit.of.name) for unit in cut(everything, 1)]
    for module in everything.modules:
        pieces = names.count((module.part, module.name))
        whole = "tensor" in (
            getattr(module.weight, "granularity", ""),
            getattr(module.source.weight, "granularity", ""),
        )
        assert (pieces == 1) == whole, module.name


def test_one_can_travel(everything: Plan) -> None:
    units = cut(everything)
    assert pickle.loads(pickle.dumps(units)) == units
    assert len(pickle.dumps(units[0])) < 10_000


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 9), st.integers(1, 4000))
def test_row_blocks_cover_the_rows(start: int, rows: int, multiple: int, size: int) -> None:
    first = start * multiple
    blocks = list(row_blocks(first, first + rows, 10, multiple, size))
    assert [row for begin, end in blocks for row in range(begin, end)] == list(
        range(first, first + rows)
    )
    assert all(begin % multiple == 0 for begin, _ in blocks)
    assert all((end - begin) * 40 <= max(size, 40 * multiple) for begin, end in blocks)


def _offset(unit: Unit) -> tuple[Location, int]:
    of = unit.of
    info = of.source.tensors["weight"] if isinstance(of, PlannedModule) else of.source
    return info.file, info.offset
