"""Run alone, as ``python -I using_script.py JOBS``: runs published programs without this package.

JOBS is a JSON list; each entry says which program to run, in this one process since importing
diffusers takes seconds. What becomes of each is written beside it (see ``Job``).
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

NOT_NEEDED = ("accelerate", "peft", "torchao", "bitsandbytes", "scipy", "sklearn")
"""What diffusers and transformers import if it is there; it takes seconds, and shall not matter."""


class Job(TypedDict):
    """One call of one program: ``usage`` or ``download_deps``, in a folder, with its arguments."""

    folder: str
    program: str
    arguments: list[str]


class Outcome(TypedDict):
    """What it printed, what it ended with, and which stages were entered."""

    stdout: str
    ended: str | None
    stages: list[str | None]


class _NotInstalled:
    """Finds no quantrecipe, wherever it lies."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "quantrecipe":
            raise ModuleNotFoundError(f"No module named {name!r}")


def program_of(job: Job) -> Any:
    """A program, and those beside it, as modules that no other folder shares."""
    for name in ("usage", "download_deps", "safetensors_loader"):
        sys.modules.pop(name, None)
    sys.path[0] = job["folder"]
    return import_module(job["program"])


def run(job: Job) -> Outcome:
    """Run it, as its command line would."""
    program = program_of(job)
    entered: list[str | None] = []
    if hasattr(program, "Stages"):
        enter = program.Stages.enter

        def spy(stages: Any, stage: str | None) -> None:
            if stage != stages.stage:
                entered.append(stage)
            enter(stages, stage)

        program.Stages.enter = spy
    sys.argv = [job["program"], *job["arguments"]]
    stdout, ended = io.StringIO(), None
    with redirect_stdout(stdout), redirect_stderr(io.StringIO()):
        try:
            program.main()
        except SystemExit as error:
            ended = str(error)
    return {"stdout": stdout.getvalue(), "ended": ended, "stages": entered}


def main() -> None:
    """Run every job."""
    sys.meta_path.insert(0, _NotInstalled())
    for name in NOT_NEEDED:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.path.insert(0, "")
    path = Path(sys.argv[1])
    outcomes = [run(job) for job in json.loads(path.read_text("utf-8"))]
    path.with_suffix(".done.json").write_text(json.dumps(outcomes))
    assert not [name for name in sys.modules if name.partition(".")[0] == "quantrecipe"]
    os._exit(0)  # not waiting for threads of libraries


if __name__ == "__main__":
    main()
