"""The real client of the Hub, pointed at a server on this machine and at an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.hub_server import TOKEN, HubServer, environment

__all__ = ["environment", "hub"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub, which this process talks to with a token; whoever waits for it does not wait long."""
    with serving(tmp_path / "hf-home", monkeypatch) as server:
        yield server


@contextmanager
def serving(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """What ``hub`` is, while the ``with`` block runs; its cache is in ``home``."""
    # Only tests that ask for it wait for these imports.
    import huggingface_hub
    from huggingface_hub import constants

    from quantrecipe.checkpoint.hub import client

    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        quick = client.Patience(first_wait=0.01, longest_wait=0.05, longest_told=2.0, silence=5.0)
        monkeypatch.setattr(client, "PATIENCE", quick)
        yield server
        huggingface_hub.close_session()
