"""A file of a repository, open for reading: for headers and small files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import SEEK_CUR, SEEK_END, SEEK_SET, RawIOBase
from typing import TYPE_CHECKING, Any, Final

from quantrecipe.checkpoint.hub.client import fetch
from quantrecipe.checkpoint.hub.ranges import Range, Request, requests_for

if TYPE_CHECKING:
    from quantrecipe.checkpoint.hub.repository import HubPath

HEAD_BYTES: Final = 64 << 10
"""How much is fetched at first: most headers are no longer."""

_HEAD_SHARE: Final = 512
"""Of what part of a file that may be at most."""

_CONNECTIONS: Final = 8


class HubStream(RawIOBase):
    """Fetches what is read of a file, and keeps it while it is open.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: HubPath) -> None:
        super().__init__()
        self._path = path
        self._size = path.file.size
        self._position = 0
        self._starts: list[int] = []
        self._pieces: list[bytearray] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        start = {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch some ranges, several at a time. See ``opening.announce``."""
        wanted = [Range(self._path, start, min(stop, self._size)) for start, stop in ranges]
        unknown = [one for one in wanted if self._known(one.start, one.stop - one.start) is None]
        unknown.sort(key=lambda one: one.start)
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="quantrecipe-hub") as pool:
            for request, piece in pool.map(self._fetch, list(requests_for(unknown))):
                self._keep(request.start, piece)

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as given, given.cast("B") as view:
            count = min(len(view), self._size - self._position)
            if count <= 0:
                return 0
            known = self._known(self._position, 1)
            if known is None:
                # What comes first says how much of it there is; so a little more is asked for.
                head = min(HEAD_BYTES, self._size // _HEAD_SHARE) if self._position == 0 else 0
                request = Request(
                    self._path, self._position, self._position + max(count, head), count
                )
                self._keep(request.start, self._fetch(request)[1])
                known = self._known(self._position, 1)
                assert known is not None
            got = min(count, len(known))
            view[:got] = known[:got]
            self._position += got
            return got

    def _fetch(self, request: Request[HubPath]) -> tuple[Request[HubPath], bytearray]:
        piece = bytearray(request.stop - request.start)
        with memoryview(piece) as view:
            fetch(request.file, request.start, view)
        return request, piece

    def _keep(self, start: int, piece: bytearray) -> None:
        place = bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._pieces.insert(place, piece)

    def _known(self, start: int, count: int) -> memoryview | None:
        """What is there from ``start`` on, if that is ``count`` bytes or more."""
        place = bisect_right(self._starts, start) - 1
        if place < 0:
            return None
        piece, offset = self._pieces[place], start - self._starts[place]
        return memoryview(piece)[offset:] if offset + count <= len(piece) else None
