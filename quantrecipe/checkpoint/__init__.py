"""Reading and writing checkpoints: headers, sources, streamed bytes, publication. No torch."""

from quantrecipe.checkpoint.destination import check_destination
from quantrecipe.checkpoint.errors import OutputExists, SourceError
from quantrecipe.checkpoint.hashing import digests, file_sha256, xxh3_128
from quantrecipe.checkpoint.header import read_header, read_header_bytes
from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.checkpoint.source import open_parts
from quantrecipe.checkpoint.staging import Staging
from quantrecipe.checkpoint.writing import FileWriter, OutputWriter

__all__ = [
    "FileWriter",
    "OutputExists",
    "OutputWriter",
    "SourceError",
    "SourceReader",
    "Staging",
    "check_destination",
    "digests",
    "file_sha256",
    "open_parts",
    "read_header",
    "read_header_bytes",
    "xxh3_128",
]
