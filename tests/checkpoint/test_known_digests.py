"""What the Hub's client and earlier conversions say of a file's digest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantrecipe.checkpoint.known_digests import known_sha256

SHA = "ab" * 32
OTHER = "cd" * 32


def test_the_blob_that_a_cached_file_is_a_link_to(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / SHA
    blob.parent.mkdir()
    blob.write_bytes(b"")
    link = tmp_path / "snapshots" / "rev" / "transformer" / "m.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    known = known_sha256(link, "transformer/m.safetensors")
    assert known is not None
    assert (known.sha256, known.origin) == (SHA, "the cache of the Hub")


def test_a_git_blob_is_no_sha256(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "ab" / SHA[:40]
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"")
    (tmp_path / "link").symlink_to(blob)
    assert known_sha256(tmp_path / "link", "link") is None


@pytest.mark.parametrize("relative", ["m.safetensors", "transformer/m.safetensors"])
def test_the_note_beside_a_download(tmp_path: Path, relative: str) -> None:
    note = tmp_path / ".cache" / "huggingface" / "download" / f"{relative}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"0123abc\n{SHA}\n1700000000.0\n")
    known = known_sha256(tmp_path / relative, relative)
    assert known is not None
    assert (known.sha256, known.origin) == (SHA, str(note))
    note.write_text('0123abc\nW/"etag"\n1700000000.0\n')
    assert known_sha256(tmp_path / relative, relative) is None
    note.write_text("nonsense")
    assert known_sha256(tmp_path / relative, relative) is None


def test_the_lock_of_the_conversion_that_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    lock = tmp_path / "recipe.lock.json"
    outputs = [{"path": "sub/m.safetensors", "sha256": SHA}, {"path": "n", "sha256": OTHER}]
    lock.write_text(json.dumps({"outputs": outputs}))
    known = known_sha256(tmp_path / "sub" / "m.safetensors", "sub/m.safetensors")
    assert known is not None
    assert (known.sha256, known.origin) == (SHA, str(lock))
    # The folder of a part, given as the source by itself.
    inner = tmp_path / "sub" / "recipe.lock.json"
    inner.write_text(json.dumps({"outputs": [{"path": "k.safetensors", "sha256": OTHER}]}))
    known = known_sha256(tmp_path / "sub" / "k.safetensors", "sub/k.safetensors")
    assert known is not None
    assert known.sha256 == OTHER


@pytest.mark.parametrize("text", ["", "[]", '{"outputs": 3}', '{"outputs": [{"path": "m"}]}'])
def test_a_lock_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.lock.json").write_text(text)
    assert known_sha256(tmp_path / "m", "m") is None
