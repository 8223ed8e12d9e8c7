"""What tests of publishing share: a repository on the loopback Hub, converted into a folder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from quantrecipe.cli.publish import publish
from quantrecipe.converter import convert
from tests.converter.making import recipe
from tests.support.hub_server import HubServer

BASE = "owner/base"
CARD = """---
license: other
license_name: my-own
license_link: LICENSE.md
pipeline_tag: feature-extraction
library_name: my-library
language: [en, de]
tags: [custom]
---
# Base
"""


def base_files(seed: int = 0, card: str | None = CARD) -> dict[str, bytes]:
    """The files of a small model of two linears and a norm."""
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": torch.randn(8, 12, generator=generator),
        "a.bias": torch.randn(8, generator=generator),
        "b.weight": torch.randn(5, 8, generator=generator),
        "norm.weight": torch.ones(8),
    }
    found = {
        "net/model.safetensors": save(tensors),
        "net/config.json": b'{"size": 8}',
        "LICENSE.md": b"Do as you like.\n",
    }
    return found if card is None else found | {"README.md": card.encode()}


def converted(hub: HubServer, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """The base, put on the Hub unless it is there, and converted from there."""
    if BASE not in hub.repositories:
        hub.add(BASE, base_files(seed))
    document = recipe(**fields)
    document["source"] = {"layout": "plain", "parts": {"model": "net"}}
    path = folder.with_name(f"{folder.name}.json")
    path.write_text(json.dumps(document), "utf-8")
    return convert(path, f"hf://{BASE}", folder).out


def run(*arguments: object) -> Result:
    """``quantrecipe publish``, in this process."""
    return CliRunner().invoke(publish, [str(argument) for argument in arguments])


def program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A published ``usage.py`` as a module of this process, whatever else is called so."""
    monkeypatch.syspath_prepend(folder)
    for name in ("safetensors_loader", "download_deps"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("published_usage", folder / "usage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
