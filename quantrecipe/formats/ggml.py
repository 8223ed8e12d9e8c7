"""The record formats of ggml, by the names that recipes use."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from quantrecipe.formats.ggml_k import Q4K, Q6K
from quantrecipe.formats.ggml_legacy import Q4_0, Q8_0
from quantrecipe.formats.records import RecordFormat

RECORD_FORMATS: Final = MappingProxyType[str, RecordFormat](
    {fmt.name: fmt for fmt in (Q8_0(), Q4_0(), Q4K(), Q6K())}
)
"""Every format of records, by name; ``compiled()`` of one is faster and gives the same bytes."""
