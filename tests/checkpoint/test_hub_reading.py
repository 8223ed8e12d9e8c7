"""Reading files of a repository: headers, ranges, and what a network does to them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from quantrecipe.checkpoint import SourceReader, open_parts
from quantrecipe.checkpoint.hub import client
from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.checkpoint.hub.opening import open_address
from quantrecipe.checkpoint.hub.ranges import Range
from quantrecipe.checkpoint.hub.read_ahead import ReadAhead
from quantrecipe.checkpoint.hub.repository import HubPath
from quantrecipe.converter.workers import Stopped
from quantrecipe.schema.address import parse_address
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import SourcePart
from tests.support.hub_server import Fault, HubServer

NOWHERE = Path()
RNG = np.random.default_rng(0)


def tensors(count: int = 3, size: int = 1000) -> dict[str, np.ndarray]:
    found = {f"l.{i}.weight": RNG.integers(0, 255, (4, size), np.uint8) for i in range(count)}
    marker = json.dumps({"format": "x"}).encode()
    return found | {"l.0.marker": np.frombuffer(marker, np.uint8)}


def folder() -> dict[str, bytes]:
    shards = {f"model-0000{i}-of-00002.safetensors": {f"s{i}.w": np.ones(9)} for i in (1, 2)}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    return {
        "README.md": b"# hello",
        "transformer/diffusion_pytorch_model.safetensors": save(tensors()),
        "transformer/config.json": b"{}",
        "text/model.safetensors.index.json": json.dumps(index).encode(),
        **{f"text/{name}": save(held) for name, held in shards.items()},
    }


def on_disk(files: dict[str, bytes], root: Path) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def opened(text: str = "hf://o/n") -> HubPath:
    root = open_address(parse_address(text)).root
    assert isinstance(root, HubPath)
    return root


def described(part: SourcePart) -> list[object]:
    return [
        (
            file.relative,
            file.size,
            file.header_sha256,
            dict(file.metadata),
            replace(tensor, file=NOWHERE),
        )
        for file in part.files
        for tensor in file.tensors.values()
    ]


@pytest.mark.parametrize(
    "location",
    ["transformer", "text", "transformer/diffusion_pytorch_model.safetensors", "t*/*.safetensors"],
)
def test_headers_are_those_of_the_same_files_here(
    hub: HubServer, tmp_path: Path, location: str
) -> None:
    files = folder()
    hub.add("o/n", files)
    (there,) = open_parts(opened(), {"m": location})
    (here,) = open_parts(on_disk(files, tmp_path / "src"), {"m": location})
    assert described(there) == described(here)
    root = pickle.loads(pickle.dumps(there.root))
    assert root == there.root
    assert root.relative_to(opened()) == here.root.relative_to(tmp_path / "src")


@pytest.mark.parametrize(
    "pattern", ["*", "**", "*/*.json", "**/*.safetensors", "t*/model*", "text/*", "t[er]*/*", "x/*"]
)
def test_globs_match_what_they_match_here(hub: HubServer, tmp_path: Path, pattern: str) -> None:
    hub.add("o/n", folder())
    root = on_disk(folder(), tmp_path / "src")
    there = sorted(str(path.relative_to(opened())) for path in opened().glob(pattern))
    assert there == sorted(str(path.relative_to(root)) for path in root.glob(pattern))


@pytest.mark.parametrize(
    ("location", "kind", "said"),
    [
        ("transfomer", "missing-part", "Did you mean 'transformer'?"),
        ("transformer/diffusion_model.safetensors", "missing-part", "'diffusion_pytorch_model"),
        ("vae", "missing-part", "README.md"),
        (".", "no-safetensors", "It looks like a pipeline"),
        ("*.gguf", "missing-part", "It looks like a pipeline"),
    ],
)
def test_what_is_missing_is_named_with_what_there_is(
    hub: HubServer, location: str, kind: str, said: str
) -> None:
    hub.add("o/n", folder())
    with pytest.raises(InvalidInput) as caught:
        open_parts(opened(), {"m": location})
    (problem,) = caught.value.problems
    assert problem.kind == kind
    assert said in str(problem)
    assert problem.file is not None
    assert problem.file.startswith("hf://o/n@")


def test_a_listing_of_many_pages_is_read_whole(hub: HubServer) -> None:
    hub.page = 2
    files = folder()
    hub.add("o/n", files)
    assert client.listing(opened().repository).keys() == files.keys()


def test_a_revision_stays_the_commit_that_it_was(hub: HubServer) -> None:
    first = hub.add("o/n", {"a.safetensors": save({"a": np.zeros(3)})})
    root = opened()
    hub.commit("o/n", {"a.safetensors": save({"b": np.zeros(4)})})
    (part,) = open_parts(root, {"m": "."})
    assert root.repository.commit == first
    assert list(part.tensors) == ["a"]


def read_all(part: SourcePart, step: int, reader: SourceReader) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, info in part.tensors.items():
        content = bytearray(info.nbytes)
        for start in range(0, info.nbytes, step):
            with memoryview(content) as view:
                reader.read_into(info, start, view[start : start + step])
        found[name] = bytes(content)
    return found


@pytest.mark.parametrize("announced", [True, False])
def test_tensors_are_read_as_they_are_and_once(hub: HubServer, announced: bool) -> None:
    content = tensors()
    hub.add("o/n", {"m.safetensors": save(content)})
    (part,) = open_parts(opened(), {"m": "."})
    hub.forget()
    with SourceReader(part.files) as reader:
        if announced:
            reader.expect((info, 0, info.nbytes) for info in part.tensors.values())
        found = read_all(part, 333, reader)
    assert found == {name: value.tobytes() for name, value in content.items()}
    assert hub.sent == sum(len(value) for value in found.values())


FAULTS: dict[str, Callable[[], list[Fault]]] = {
    "dropped": lambda: [Fault("/blobs/", "GET", times=5, drop_after=1000)],
    "dropped before a byte": lambda: [Fault("/blobs/", "GET", times=5, drop_after=0)],
    "no answer": lambda: [Fault("/resolve/", "GET", times=5, drop_after=-1)],
    "failing": lambda: [
        Fault("/resolve/", times=3, status=500),
        Fault("/blobs/", times=3, status=503),
        Fault("/api/", times=2, status=502),
    ],
    "too many": lambda: [Fault("/resolve/", times=4, status=429, headers={"Retry-After": "0"})],
    "ratelimit": lambda: [Fault("/resolve/", status=429, headers={"RateLimit": '"api";r=0;t=0'})],
    "slow": lambda: [Fault("/blobs/", "GET", delay=0.2)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_bad_network_changes_no_byte(hub: HubServer, faults: Callable[[], list[Fault]]) -> None:
    content = tensors()
    hub.add("o/n", {"m.safetensors": save(content)})
    hub.faults = faults()
    (part,) = open_parts(opened(), {"m": "."})
    hub.faults = faults()
    with SourceReader(part.files) as reader:
        reader.expect((info, 0, info.nbytes) for info in part.tensors.values())
        found = read_all(part, 500, reader)
    assert not any(fault.times for fault in hub.faults if fault.path != "/api/")
    assert found == {name: value.tobytes() for name, value in content.items()}


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault("/blobs/", times=99, drop_after=0), "no-connection", "did not come|reached"),
        (Fault("/blobs/", times=99, status=502), "hub-failing", "answers 502"),
        (Fault("/resolve/", times=99, status=429), "rate-limit", "too many requests"),
        (
            Fault("/resolve/", status=429, headers={"Retry-After": "9999"}),
            "rate-limit",
            "too many requests",
        ),
        (Fault("/blobs/", times=99, status=200), "hub-failing", "no ranges|not give ranges"),
    ],
)
def test_what_does_not_get_better_is_an_error(
    hub: HubServer, fault: Fault, kind: str, message: str
) -> None:
    hub.add("o/n", {"m.safetensors": save(tensors())})
    (part,) = open_parts(opened(), {"m": "."})
    hub.faults = [fault]
    with SourceReader(part.files) as reader:
        reader.expect((info, 0, info.nbytes) for info in part.tensors.values())
        with pytest.raises(HubError, match=message) as caught:
            read_all(part, 500, reader)
    assert caught.value.kind == kind
    assert caught.value.place.endswith("/m.safetensors")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Repo-Commit": "0" * 40},
        {"X-Linked-Etag": '"' + "0" * 64 + '"'},
    ],
)
def test_a_file_that_is_another_one_by_now_is_refused(
    hub: HubServer, headers: dict[str, str]
) -> None:
    hub.add("o/n", {"m.safetensors": save(tensors())})
    (part,) = open_parts(opened(), {"m": "."})
    hub.faults = [Fault("/resolve/", "GET", times=99, headers=headers)]
    with SourceReader(part.files) as reader, pytest.raises(InvalidInput) as caught:
        read_all(part, 500, reader)
    assert [problem.kind for problem in caught.value.problems] == ["source-changed"]


def test_another_size_is_another_file(hub: HubServer) -> None:
    hub.add("o/n", {"m.safetensors": save(tensors())})
    (part,) = open_parts(opened(), {"m": "."})
    hub.faults = [Fault("/blobs/", "GET", headers={"Content-Range": "bytes 100-599/700"})]
    with SourceReader(part.files) as reader, pytest.raises(InvalidInput, match="700 bytes now"):
        read_all(part, 500, reader)


def test_who_waits_for_a_network_can_be_stopped(hub: HubServer) -> None:
    hub.add("o/n", {"m.safetensors": save(tensors())})
    (part,) = open_parts(opened(), {"m": "."})
    hub.faults = [Fault("/blobs/", times=99, status=429, headers={"Retry-After": "2"})]

    def check() -> None:
        if hub.requests[-1].status == 429:
            raise Stopped

    with SourceReader(part.files, check=check) as reader, pytest.raises(Stopped):
        read_all(part, 500, reader)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: HubServer) -> None:
    hub.add("o/n", {"m.safetensors": save(tensors())}, gated=True, granted={"hf_loopback"})
    (part,) = open_parts(opened(), {"m": "."})
    assert part.tensors
    stored = [seen for seen in hub.requests if "/blobs/" in seen.path]
    assert stored
    assert all(seen.token is None for seen in stored)


SIZE = 5000
CONTENT = RNG.integers(0, 255, SIZE, np.uint8).tobytes()
PLACES = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 900)).map(
    lambda given: (given[0], min(SIZE, sum(given)))
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(PLACES, max_size=12),
    st.lists(PLACES, max_size=12),
    st.integers(200, 2000),
    st.integers(1, 3),
)
def test_whatever_is_expected_all_is_read(
    hub: HubServer,
    expected: list[tuple[int, int]],
    read: list[tuple[int, int]],
    most_bytes: int,
    connections: int,
) -> None:
    if "o/n" not in hub.repositories:
        hub.add("o/n", {"m.bin": CONTENT})
    path = opened() / "m.bin"
    ahead = ReadAhead(most_bytes, connections, request_bytes=700)
    try:
        ahead.expect(Range(path, *place) for place in expected)

        def get(place: tuple[int, int]) -> bytes:
            content = bytearray(place[1] - place[0])
            with memoryview(content) as view:
                ahead.read(path, place[0], view)
            return bytes(content)

        with ThreadPoolExecutor(3) as pool:
            places = [*read, *expected, *expected]
            assert list(pool.map(get, places)) == [CONTENT[a:b] for a, b in places]
    finally:
        ahead.close()


def test_what_is_read_twice_is_fetched_once_while_there_is_room(hub: HubServer) -> None:
    hub.add("o/n", {"m.bin": CONTENT})
    path = opened() / "m.bin"
    for most_bytes, times in ((SIZE, 1), (SIZE // 2, 2)):
        hub.forget()
        ahead = ReadAhead(most_bytes, 1, request_bytes=500)
        ahead.expect([Range(path, 0, SIZE)])
        for _ in range(2):
            for start in range(0, SIZE, 100):
                content = bytearray(100)
                with memoryview(content) as view:
                    ahead.read(path, start, view)
                assert content == CONTENT[start : start + 100]
        ahead.close()
        assert hub.sent <= times * SIZE
        assert (hub.sent == SIZE) == (times == 1)


def test_paths_are_as_those_of_this_machine(hub: HubServer) -> None:
    hub.add("o/n", folder())
    root = opened()
    file = root / "text" / "model.safetensors.index.json"
    assert (file.name, file.suffix, file.parent) == (file.path.name, ".json", root / "text")
    assert (root.parent, root.is_dir(), root.is_file(), root.exists()) == (root, True, False, True)
    assert (file.is_file(), file.is_dir(), file.is_symlink()) == (True, False, False)
    assert file.read_bytes() == folder()["text/model.safetensors.index.json"]
    assert not (root / "nothing").exists()
    assert str(file) == f"hf://o/n@{root.repository.commit}/{file.path}"
    assert sorted([file, root]) == [root, file]
    assert root == HubPath(root.repository, PurePosixPath())
    with pytest.raises(FileNotFoundError):
        (root / "nothing").stat()
    with pytest.raises(NotADirectoryError):
        list(file.iterdir())
