from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quantrecipe.checkpoint import OutputExists, Staging, check_destination
from quantrecipe.checkpoint.staging import MARKER
from quantrecipe.schema.problems import OutputError

LOCK = "recipe.lock.json"
FILES = {"m.safetensors": "weights", "m.safetensors.index.json": "{}", LOCK: "lock"}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(out: Path, *order: str) -> None:
    with Staging(out) as staging:
        fill(staging.folder, FILES)
        staging.publish(force=True, lock=LOCK, order=order)


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "empty"])
def test_a_new_output_appears_whole(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True, mode=0o750)
    with Staging(out) as staging:
        assert staging.root == tmp_path / "deep" / "out.partial"
        fill(staging.folder, FILES | {"sub/config.json": "{}"})
        assert staging.files() == [*sorted(FILES), "sub/config.json"]
        assert not exists or tree(out) == {}
        staging.publish(lock=LOCK)
    assert tree(out) == FILES | {"sub/config.json": "{}"}
    assert names(out.parent) == ["out"]
    if exists:
        assert stat.S_IMODE(out.stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_what_is_not_published_leaves_nothing(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with Staging(out) as staging:
            fill(staging.folder, FILES)
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert names(tmp_path) == []


def test_files_in_the_way_are_listed_and_kept(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"m.safetensors": "old", "notes.txt": "mine"})
    with pytest.raises(OutputExists, match="--force") as caught:
        check_destination(tmp_path / "out", FILES, force=False)
    assert caught.value.paths == ("m.safetensors",)
    with Staging(tmp_path / "out") as staging:
        fill(staging.folder, FILES)
        with pytest.raises(OutputExists):
            staging.publish(lock=LOCK)
    assert tree(tmp_path) == {"out/m.safetensors": "old", "out/notes.txt": "mine"}


def test_unrelated_files_do_not_ask_for_force(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"notes.txt": "mine"})
    with Staging(tmp_path / "out") as staging:
        fill(staging.folder, FILES)
        staging.publish(lock=LOCK)
    assert tree(tmp_path / "out") == FILES | {"notes.txt": "mine"}
    assert names(tmp_path) == ["out"]


def test_force_replaces_ours_and_removes_what_ours_left_behind(tmp_path: Path) -> None:
    old = {LOCK: "old", "m.safetensors": "old", "m-1.safetensors": "old", "notes.txt": "mine"}
    fill(tmp_path / "out", old)
    fill(tmp_path, {"outside": "mine"})
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with Staging(tmp_path / "out") as staging:
        fill(staging.folder, FILES)
        staging.publish(
            force=True,
            lock=LOCK,
            stale=["m-1.safetensors", "m.safetensors", "gone", "../outside", "link/outside", LOCK],
        )
    assert tree(tmp_path / "out") == FILES | {"notes.txt": "mine"}
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_half_replaced_folder_has_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", dict.fromkeys(FILES, "old"))
    seen: list[str] = []
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        seen.append(self.name)
        if len(seen) == 3:
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        publish(tmp_path / "out", "m.safetensors")
    assert seen == [LOCK, "m.safetensors", "m.safetensors.index.json"]
    assert tree(tmp_path) == {
        "out/m.safetensors": "weights",
        "out/m.safetensors.index.json": "old",
    }


def test_the_lock_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", {"notes.txt": ""})
    seen: list[str] = []
    replace = Path.replace

    def noting(self: Path, target: Path) -> Path:
        seen.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    with Staging(tmp_path / "out") as staging:
        fill(staging.folder, FILES | {"z.json": "", "a.json": ""})
        staging.publish(lock=LOCK, order=["z.json", "m.safetensors"])
    assert seen == ["z.json", "m.safetensors", "a.json", "m.safetensors.index.json", LOCK]


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [
        ("out", "out: is not a folder"),
        ("out/m.safetensors/x", "in the way of the output: m.safetensors"),
        ("out/sub", "in the way of the output: sub"),
    ],
)
def test_obstacles_that_force_does_not_move(tmp_path: Path, obstacle: str, said: str) -> None:
    fill(tmp_path, {obstacle: ""})
    with pytest.raises(OutputError, match=said):
        check_destination(tmp_path / "out", ["m.safetensors", "sub/config.json"], force=True)


def test_destinations_that_are_fine(tmp_path: Path) -> None:
    check_destination(tmp_path, ["a"], force=False)
    check_destination(tmp_path / "not" / "there", ["a"], force=False)
    fill(tmp_path, {"file": ""})
    with pytest.raises(OutputError, match="is not a folder"):
        check_destination(tmp_path / "file" / "below", ["a"], force=False)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "out.partial", {"mine": ""})
    with pytest.raises(OutputError, match="in use for something else"), Staging(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out.partial/mine": ""}


def test_a_running_conversion_is_left_alone(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as first:
        fill(first.folder, FILES)
        with pytest.raises(OutputError, match=f"is running: process {os.getpid()} on"):
            Staging(tmp_path / "out").__enter__()
        first.publish()
    assert tree(tmp_path / "out") == FILES


def left_by_a_killed_process(out: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom quantrecipe.checkpoint import Staging\n"
        "with Staging(Path(sys.argv[1])) as staging:\n"
        "    (staging.folder / 'm').write_text('half')\n"
        "    (staging.root / 'journal').write_text('m')\n    os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert done.returncode == 9
    assert not out.exists()


def test_what_a_killed_process_left_is_there_until_it_is_cleared(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path / "out")
    with Staging(tmp_path / "out") as staging:
        assert staging.files() == ["m"]
        assert (staging.root / "journal").read_text() == "m"
        staging.clear()
        assert staging.files() == []
        assert names(staging.root) == [MARKER, "output"]
        fill(staging.folder, FILES)
        staging.publish()
    assert tree(tmp_path) == {f"out/{name}": content for name, content in FILES.items()}


def test_what_a_killed_process_left_can_be_published(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path / "out")
    with Staging(tmp_path / "out") as staging:
        staging.publish()
    assert tree(tmp_path) == {"out/m": "half"}


def test_what_is_kept_is_kept_for_the_next(tmp_path: Path) -> None:
    def fail() -> None:
        with Staging(tmp_path / "out") as staging:
            fill(staging.folder, FILES)
            staging.keep = True
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["out.partial"]
    with Staging(tmp_path / "out") as staging:
        assert staging.files() == sorted(FILES)
    assert names(tmp_path) == []


def test_a_lock_that_was_moved_away_is_known_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever goes on can still tell which files the last output consisted of."""
    fill(tmp_path / "out", {LOCK: "old", "m.safetensors": "old"})
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "m.safetensors":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    def fail() -> None:
        with Staging(tmp_path / "out") as staging:
            staging.keep = True
            fill(staging.folder, FILES)
            staging.publish(force=True, lock=LOCK)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(OutputError, match="Input/output error"):
            fail()
    assert not (tmp_path / "out" / LOCK).exists()
    with Staging(tmp_path / "out") as staging:
        assert staging.replaced_lock(LOCK).read_text() == "old"
        staging.clear()
        assert staging.replaced_lock(LOCK).read_text() == "old"
        fill(staging.folder, FILES)
        staging.publish(force=True, lock=LOCK)
    assert tree(tmp_path) == {f"out/{name}": content for name, content in FILES.items()}


def test_a_symlinked_output_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with Staging(tmp_path / "out") as staging:
        fill(staging.folder, FILES)
        staging.publish()
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "real") == FILES


def test_the_working_folder_stays_the_folder_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    with Staging(Path()) as staging:
        fill(staging.folder, FILES)
        staging.publish()
    assert out.stat().st_ino == before
    assert tree(out) == FILES


def test_inside_where_beside_is_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with Staging(out) as staging:
        assert staging.root.parent == out
        fill(staging.folder, FILES)
        staging.publish(lock=LOCK)
    assert tree(out) == FILES
    assert names(out) == sorted(FILES)


def test_files_are_synced_before_they_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        link = Path(f"/proc/self/fd/{descriptor}")
        synced.append(link.readlink().relative_to(tmp_path).as_posix())
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", noting)
    with Staging(tmp_path / "out") as staging:
        fill(staging.folder, {"m.safetensors": ""})
        staging.publish()
    assert synced[0] == "out.partial/output/m.safetensors"
    assert "out.partial/output" in synced[1:]
    assert synced[-1] == "."
