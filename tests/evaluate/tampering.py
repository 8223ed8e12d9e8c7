"""Edits to a converted checkpoint, with every digest made right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantrecipe.checkpoint import file_sha256, read_header, xxh3_128
from quantrecipe.schema.canonical import document_bytes, lock_digest
from quantrecipe.schema.lock import LOCK_NAME


def edit_lock(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a lock, and write it as ``convert`` would have, with its digest."""
    lock = json.loads((out / LOCK_NAME).read_text("utf-8"))
    change(lock)
    lock["sha256"] = lock_digest(lock)
    (out / LOCK_NAME).write_bytes(document_bytes(lock))


def edit_tensor(out: Path, name: str, change: Callable[[bytearray], None]) -> Path:
    """Change a tensor's bytes, and the digests in the lock to match."""
    (path,) = [path for path in out.rglob("*.safetensors") if name in read_header(path).tensors]
    info = read_header(path).tensors[name]
    content = bytearray(path.read_bytes())
    payload = content[info.offset : info.offset + info.nbytes]
    change(payload)
    content[info.offset : info.offset + info.nbytes] = payload
    path.write_bytes(content)
    edit_lock(out, lambda lock: _redigest(out, lock))
    return path


def _redigest(out: Path, lock: dict[str, Any]) -> None:
    for output in lock["outputs"]:
        path = out / output["path"]
        output["sha256"] = file_sha256(path)
        content = path.read_bytes()
        for tensor in tensors_of(lock):
            if tensor["file"] == output["path"]:
                payload = content[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
                tensor["xxh3_128"] = xxh3_128(payload)


def tensors_of(lock: dict[str, Any]) -> list[dict[str, Any]]:
    """Every tensor of a lock."""
    found = [tensor for module in lock["modules"] for tensor in module["tensors"].values()]
    return found + [other["tensor"] for other in lock["others"]]
