"""Reading and writing checkpoints: headers, sources, streamed bytes, publication. No torch."""

from quantrecipe.checkpoint.destination import check_destination
from quantrecipe.checkpoint.errors import OutputExists, SourceError
from quantrecipe.checkpoint.gguf import read_gguf_header, read_gguf_header_bytes
from quantrecipe.checkpoint.hashing import digests, file_sha256, xxh3_128
from quantrecipe.checkpoint.header import read_header, read_header_bytes
from quantrecipe.checkpoint.journal import Journal, read_journal
from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.checkpoint.source import open_parts
from quantrecipe.checkpoint.staging import Staging
from quantrecipe.checkpoint.writing import OutputFiles, lay_out, locate

__all__ = [
    "Journal",
    "OutputExists",
    "OutputFiles",
    "SourceError",
    "SourceReader",
    "Staging",
    "check_destination",
    "digests",
    "file_sha256",
    "lay_out",
    "locate",
    "open_parts",
    "read_gguf_header",
    "read_gguf_header_bytes",
    "read_header",
    "read_header_bytes",
    "read_journal",
    "xxh3_128",
]
