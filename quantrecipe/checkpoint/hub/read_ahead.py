"""Reading files of repositories: what will be needed is fetched ahead, within a bound on memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from threading import Condition
from typing import Final

from quantrecipe.checkpoint.hub.client import fetch, unchecked
from quantrecipe.checkpoint.hub.ranges import REQUEST_BYTES, Range, requests_for
from quantrecipe.checkpoint.hub.repository import HubPath

AHEAD_BYTES: Final = 256 << 20
"""The most bytes that are held because they will be needed, or may be again."""

CONNECTIONS: Final = 8

_LOOK_UP_SECONDS: Final = 0.2


class Closed(Exception):  # noqa: N818 - nothing went wrong here
    """Raised in a thread that fetches, when nobody wants what it fetches any more."""


class _State(Enum):
    WAITING = auto()
    COMING = auto()
    THERE = auto()
    GONE = auto()
    FAILED = auto()


class _Block:
    """What one request brings.

    Attributes:
        left: bytes that were announced, and not read so far.
    """

    __slots__ = ("content", "error", "file", "left", "start", "state", "stop")

    def __init__(self, file: HubPath, start: int, stop: int, left: int) -> None:
        self.file = file
        self.start = start
        self.stop = stop
        self.left = left
        self.state = _State.WAITING
        self.content: bytearray | None = None
        self.error: BaseException | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Blocks:
    """The blocks of a file, by position."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._blocks: list[_Block] = []

    def add(self, block: _Block) -> None:
        place = bisect_right(self._starts, block.start)
        self._starts.insert(place, block.start)
        self._blocks.insert(place, block)

    def at(self, position: int) -> tuple[_Block | None, int | None]:
        """The block that holds a position, if one does; else where the next one starts."""
        place = bisect_right(self._starts, position)
        if place and position < self._blocks[place - 1].stop:
            return self._blocks[place - 1], None
        return None, self._starts[place] if place < len(self._starts) else None


class ReadAhead:
    """Fetches what was announced, in that order, and hands it out to any number of threads.

    What was read once is kept as long as there is room, for those who read twice. What was not
    announced is fetched when it is read.

    Args:
        most_bytes: the most to hold. A reader that gets ahead of what has come fetches for itself,
            and holds one request more.
        connections: how many requests at a time.
        request_bytes: the most bytes of a request.
    """

    def __init__(
        self,
        most_bytes: int = AHEAD_BYTES,
        connections: int = CONNECTIONS,
        request_bytes: int = REQUEST_BYTES,
    ) -> None:
        self._most = most_bytes
        self._connections = connections
        self._request_bytes = request_bytes
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="quantrecipe-hub")
        self._changed = Condition()
        self._blocks: dict[HubPath, _Blocks] = {}
        self._queue: deque[_Block] = deque()
        self._spent: OrderedDict[_Block, None] = OrderedDict()
        self._held = 0
        self._active = 0
        self._closed = False

    def expect(self, ranges: Iterable[Range[HubPath]]) -> None:
        """Say what will be read, in order; once for each reader.

        Raises:
            ValueError: something was expected before.
        """
        if self._blocks:
            raise ValueError("what is expected is said once")
        blocks = [
            _Block(one.file, one.start, one.stop, one.needed)
            for one in requests_for(ranges, request_bytes=self._request_bytes)
        ]
        with self._changed:
            for block in blocks:
                self._blocks.setdefault(block.file, _Blocks()).add(block)
            self._queue.extend(blocks)
            self._go_on()

    def read(
        self,
        file: HubPath,
        start: int,
        view: memoryview,
        check: Callable[[], None] = unchecked,
    ) -> None:
        """Fill ``view`` with the bytes of a file from byte ``start`` on.

        Raises:
            InvalidInput: kind ``source-changed``.
            HubError: the Hub does not give them.
        """
        done = 0
        while done < len(view):
            position = start + done
            with self._changed:
                known = self._blocks.get(file)
                block, following = (None, None) if known is None else known.at(position)
            end = block.stop if block is not None else following
            count = len(view) - done if end is None else min(len(view) - done, end - position)
            with view[done : done + count] as part:
                if block is None or not self._take(block, position - block.start, part, check):
                    fetch(file, position, part, check)
            done += count

    def close(self) -> None:
        """Let go of everything; threads that fetch end soon."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._blocks.clear()
        self._spent.clear()

    def _take(
        self, block: _Block, offset: int, view: memoryview, check: Callable[[], None]
    ) -> bool:
        """Bytes of a block, when they are there; ``False`` if they were let go of."""
        with self._changed:
            mine = block.state is _State.WAITING
            if mine:
                # Nobody has got to it: whoever needs it does not wait for its turn.
                self._begin(block)
        if mine:
            self._bring(block, check)
        with self._changed:
            while block.state is _State.COMING:
                self._changed.wait(_LOOK_UP_SECONDS)
                check()
            if block.state is _State.FAILED:
                assert block.error is not None
                raise block.error
            if block.state is _State.GONE:
                return False
            content = block.content
        assert content is not None
        # Whoever lets go of the block meanwhile lets go of its name for the bytes, not of mine.
        with memoryview(content) as whole:
            view[:] = whole[offset : offset + len(view)]
        with self._changed:
            block.left -= len(view)
            if block.left <= 0 and block.state is _State.THERE:
                self._spent[block] = None
                self._spent.move_to_end(block)
                self._go_on()
        return True

    def _begin(self, block: _Block) -> None:
        block.state = _State.COMING
        self._make_room(block.size)
        self._held += block.size

    def _bring(self, block: _Block, check: Callable[[], None]) -> None:
        try:
            content = bytearray(block.size)
            with memoryview(content) as view:
                fetch(block.file, block.start, view, check)
        except BaseException as error:  # noqa: BLE001 - it is raised where the bytes are read
            with self._changed:
                block.state, block.error = _State.FAILED, error
                self._held -= block.size
                self._changed.notify_all()
            return
        with self._changed:
            block.state, block.content = _State.THERE, content
            self._changed.notify_all()

    def _make_room(self, size: int) -> bool:
        """Let go of what was read, oldest first, until there is room; whether there is."""
        while self._spent and self._held + size > self._most:
            block, _ = self._spent.popitem(last=False)
            block.state, block.content = _State.GONE, None
            self._held -= block.size
        return self._held + size <= self._most

    def _go_on(self) -> None:
        """Fetch more, as far as there are connections and room."""
        while self._queue and self._active < self._connections and not self._closed:
            block = self._queue[0]
            if block.state is not _State.WAITING:
                self._queue.popleft()
                continue
            if not self._make_room(block.size) and self._held:
                return
            self._queue.popleft()
            self._begin(block)
            self._active += 1
            self._pool.submit(self._in_background, block)

    def _in_background(self, block: _Block) -> None:
        self._bring(block, self._unless_closed)
        with self._changed:
            self._active -= 1
            self._go_on()

    def _unless_closed(self) -> None:
        if self._closed:
            raise Closed
