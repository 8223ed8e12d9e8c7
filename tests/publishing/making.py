"""What tests of publishing share: a repository on the loopback Hub, converted into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
