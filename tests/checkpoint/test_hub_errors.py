"""What is said when the Hub does not give what it is asked for, and what to do about it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from quantrecipe.checkpoint import open_parts
from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.checkpoint.hub.opening import open_address
from quantrecipe.schema.address import parse_address
from quantrecipe.schema.problems import InvalidInput
from tests.support.hub_server import TOKEN, Fault, HubServer

FILES = {"model.safetensors": save({"a": np.zeros(9)}), "config.json": b"{}"}


@dataclass(frozen=True)
class Case:
    """A state of the Hub, and what has to be said of it."""

    kind: str
    said: tuple[str, ...]
    address: str = "hf://o/n"
    token: str | None = TOKEN
    options: dict[str, object] = field(default_factory=dict)
    faults: Callable[[], list[Fault]] = list
    invalid: bool = False
    """Whether the recipe or the command line is wrong, rather than the world."""


CASES = {
    "gated, nobody": Case(
        "gated",
        ("only for those who have accepted its terms", "/o/n, then log in with 'hf auth login'"),
        token=None,
        options={"gated": True},
    ),
    "gated, somebody else": Case(
        "gated", ("/o/n, with the account that your token is of",), options={"gated": True}
    ),
    "private, nobody": Case(
        "no-repository",
        ("no such repository", "If it is private, log in with 'hf auth login'"),
        token=None,
        options={"private": True},
        invalid=True,
    ),
    "a token of nobody": Case(
        "bad-token", ("token that was sent is not valid", "hf auth login"), token="hf_wrong"
    ),
    "no repository": Case(
        "no-repository",
        ("no such repository", "Check its name."),
        address="hf://o/m",
        invalid=True,
    ),
    "no revision": Case(
        "no-revision",
        ("no such revision", "/o/n/commits"),
        address="hf://o/n@" + "0" * 40,
        invalid=True,
    ),
    "a revision misspelt": Case(
        "no-revision", ("Did you mean 'main'?",), address="hf://o/n@mian", invalid=True
    ),
    "a file misspelt": Case(
        "missing-source",
        ("Did you mean 'model.safetensors'?",),
        address="hf://o/n/modle.safetensors",
        invalid=True,
    ),
    "a file that vanished": Case(
        "missing-file",
        ("no such file any more",),
        faults=lambda: [
            Fault("/resolve/", times=99, status=404, headers={"X-Error-Code": "EntryNotFound"})
        ],
    ),
    "a token asked for": Case(
        "no-token",
        ("asks for a token", "First log in"),
        token=None,
        faults=lambda: [Fault("/blobs/", times=99, status=401)],
    ),
    "not allowed": Case(
        "forbidden",
        ("is not allowed: Not yours", "/settings/tokens"),
        faults=lambda: [
            Fault("/resolve/", times=99, status=403, headers={"X-Error-Message": "Not yours"})
        ],
    ),
    "too many requests": Case(
        "rate-limit",
        ("too many requests", "in some minutes. Who has a token may send more"),
        token=None,
        faults=lambda: [Fault("", times=99, status=429, headers={"Retry-After": "0"})],
    ),
    "failing": Case(
        "hub-failing",
        ("the Hub answers 503",),
        faults=lambda: [Fault("/resolve/", times=99, status=503)],
    ),
    "lost": Case(
        "no-connection",
        ("cannot be reached", "Check the network", "run the same command again"),
        faults=lambda: [Fault("/resolve/", times=99, drop_after=-1)],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    hub.add("o/n", FILES, **case.options)
    hub.faults = case.faults()
    if case.token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", case.token)
    with pytest.raises(InvalidInput if case.invalid else HubError) as caught:
        open_parts(open_address(parse_address(case.address)).root, {"m": "."})
    error = caught.value
    kind = error.problems[0].kind if isinstance(error, InvalidInput) else error.kind
    assert kind == case.kind
    for text in case.said:
        assert text in str(error)
    assert "hf://o/" in str(error)
    assert case.token is None or case.token not in str(error)
    assert error.exit_code == (1 if case.invalid else 3)


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.raises(HubError, match=url) as caught:
        open_address(parse_address("hf://o/n"))
    assert caught.value.kind == "no-connection"


def test_offline_mode_is_kept_to_once_it_is_on(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", FILES)
    root = open_address(parse_address("hf://o/n")).root
    assert root.is_dir()
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE") as caught:
        open_parts(root, {"m": "."})
    assert caught.value.kind == "offline"
    assert not hub.requests


def test_the_client_is_imported_by_who_needs_it_only() -> None:
    code = (
        "import sys, quantrecipe.checkpoint, quantrecipe.cli.convert, quantrecipe.cli.pull\n"
        "import quantrecipe.checkpoint.hub.pulling\n"
        "assert not {'huggingface_hub', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
