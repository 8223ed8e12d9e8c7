"""Folders as repositories of a Hub on this machine, for the real client in other processes.

``python -m tests.support.serve owner/name=folder`` prints what to export there, and serves until
Ctrl-C or SIGTERM. Folders are only read: what is pushed lives in memory, and goes with the server.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event

from tests.support.hub_server import HubServer, environment


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    given = parse(arguments)
    with ExitStack() as stack:
        home: Path = given.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(HubServer())
        for name, folder in given.repositories:
            server.add(name, folder)
        for name, value in environment(server, home.resolve()).items():
            print(f"export {name}={shlex.quote(value)}")
        print(flush=True)
        # Shells have those that they start in the background ignore Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        print("serving until Ctrl-C", file=sys.stderr)
        try:
            Event().wait()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.serve", description=__doc__)
    parser.add_argument(
        "repositories",
        nargs="*",
        type=_repository,
        metavar="OWNER/NAME=FOLDER",
        help="what to serve",
    )
    parser.add_argument(
        "--home", type=Path, metavar="DIR", help="the clients' HF_HOME; a temporary one if left out"
    )
    return parser.parse_args(arguments)


def _repository(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name.count("/") != 1 or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: give OWNER/NAME=FOLDER")
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{folder!r} is no folder")
    return name, Path(folder)


if __name__ == "__main__":
    main()
