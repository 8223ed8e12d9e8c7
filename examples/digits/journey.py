"""Run the commands of "From the Hub and back" in the README, one after the other.

They are taken from there, and run in a folder of their own, ``demo-output/journey``, against a Hub
on this machine that serves ``weights`` as the repository ``digits/bf16``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "demo-output" / "journey"
README = HERE / "README.md"
REPOSITORY = "digits/bf16"
FEW = "27"


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve, run, and end with the code of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--few", action="store_true", help=f"draw every {FEW}th prompt only, to try it"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the folder; emptied first")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    with served(given.out / "hf-home") as hub:
        more = {"DIGITS_EVERY": FEW} if given.few else {}
        sys.exit(run(commands(), given.out, {**os.environ, **hub, **here(), **more}))


def commands(readme: Path = README) -> list[str]:
    """The lines that begin with ``$`` in its blocks ``console journey``, each as one line."""
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"^```console journey\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def here() -> dict[str, str]:
    """What the commands take for granted: this folder, its modules, and this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"DIGITS": str(HERE), "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "PATH": path}


def run(lines: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Say each command and run it; the exit code of the last one that ran."""
    for line in lines:
        print(f"\n$ {line}", flush=True)
        code = subprocess.run(line, shell=True, cwd=folder, env=environment, check=False).returncode
        if code:
            print(f"exit code {code}", file=sys.stderr)
            return code
    return 0


@contextmanager
def served(home: Path) -> Iterator[dict[str, str]]:
    """A Hub of the weights while the block runs; what its clients have to know."""
    command = [sys.executable, "-m", "tests.support.serve", "--home", str(home)]
    weights = f"{REPOSITORY}={HERE / 'weights'}"
    server = subprocess.Popen([*command, weights], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with server:
        try:
            assert server.stdout is not None
            told = exported(server.stdout)
            if "HF_ENDPOINT" not in told:
                sys.exit("the Hub on this machine did not start")
            yield told
        finally:
            server.terminate()


def exported(lines: Iterator[str]) -> dict[str, str]:
    """What lines ``export NAME=value`` say, up to the first that is empty."""
    found = {}
    for line in lines:
        words = shlex.split(line)
        if not words:
            break
        name, _, value = words[1].partition("=")
        found[name] = value
    return found


if __name__ == "__main__":
    main()
