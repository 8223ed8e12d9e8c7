"""The programs that ``peers.py`` runs: what each is made of, how it is installed and called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from _measure import attempt, console_script

DRIVERS = Path(__file__).resolve().parent / "peer_drivers"
BFLOAT16, FP8 = "bfloat16", "float8_e4m3fn"
PART = "transformer"
# Installed first and alone, so that no program's own range chooses another build.
TORCH = "torch==2.13.0"
BASE = ("numpy==2.4.6", "safetensors==0.8.0")


@dataclass(frozen=True, slots=True)
class Program:
    """A program to run.

    Attributes:
        name: as the table has it.
        environment: folder of its environment, empty for ours.
        requirements: what ``--setup`` installs there, beside ``TORCH`` and ``BASE``.
        driver: a script of ``peer_drivers``, run as ``driver SOURCE_FOLDER OUT_FOLDER ARGUMENTS``.
        arguments: the driver's arguments.
        convention: how its output is read, see ``peer_check.py``.
        sources: dtypes of the sources that it is tried on.
        dequantized_by_driver: its FP8 source is turned into bfloat16 before it sees it.
    """

    name: str
    environment: str = ""
    requirements: tuple[str, ...] = ()
    driver: str = ""
    arguments: tuple[str, ...] = ()
    convention: str = "scaled"
    sources: tuple[str, ...] = (BFLOAT16, FP8)
    dequantized_by_driver: bool = False


OURS = Program("quantrecipe")
_CONVERT_TO_QUANT = Program(
    "convert-to-quant 1.3.4",
    environment="convert-to-quant",
    # It names one of its requirements and imports these as well; its INT8 needs triton.
    requirements=("convert-to-quant==1.3.4", "scipy==1.17.1", "tqdm==4.70.1", "triton==3.9.0"),
    driver="with_convert_to_quant.py",
)
_LLMCOMPRESSOR = Program(
    "llmcompressor 0.14.0.1, model_free_ptq",
    environment="llmcompressor",
    requirements=(
        "llmcompressor==0.14.0.1",
        "compressed-tensors==0.19.0",
        "transformers==5.17.0",
    ),
    driver="with_llmcompressor.py",
)
PROGRAMS = (
    OURS,
    _CONVERT_TO_QUANT,
    replace(
        _CONVERT_TO_QUANT,
        name=f"{_CONVERT_TO_QUANT.name}, --low-memory",
        arguments=("--low-memory",),
    ),
    _LLMCOMPRESSOR,
    replace(
        _LLMCOMPRESSOR,
        name=f"{_LLMCOMPRESSOR.name} after its dequantizer",
        arguments=("--dequantizer",),
        sources=(FP8,),
    ),
    Program(
        "torchao 0.18.0",
        environment="torchao",
        requirements=("torchao==0.18.0",),
        driver="with_torchao.py",
        convention="torchao",
        dequantized_by_driver=True,
    ),
    Program(
        "optimum-quanto 0.2.7",
        environment="optimum-quanto",
        requirements=("optimum-quanto==0.2.7",),
        driver="with_quanto.py",
        convention="quanto",
        dequantized_by_driver=True,
    ),
)


def set_up(programs: Iterable[Program], envs: Path) -> None:
    """Make the environments that are not there yet; a failure is kept for the table."""
    for program in {each.environment: each for each in programs if each.environment}.values():
        folder = envs / program.environment
        if ready(folder).exists():
            continue
        print(f"{program.environment}: {' '.join(program.requirements)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        log = folder / "setup.log"
        for requirements in ((TORCH,), (*BASE, *program.requirements)):
            if attempt([*pip, *requirements], log).exit_status:
                print(f"  failed: {last_error(log)}", flush=True)
                break
        else:
            ready(folder).touch()


def ready(folder: Path) -> Path:
    """The file that says that an environment is whole."""
    return folder / ".ready"


def why_not(program: Program, envs: Path) -> str | None:
    """Why a program cannot be run, if so."""
    folder = envs / program.environment
    if not program.environment or ready(folder).exists():
        return None
    log = folder / "setup.log"
    return f"not installed: {last_error(log)}" if log.exists() else "not installed: no --setup yet"


def command(program: Program, source: Path, out: Path, envs: Path) -> list[str | Path]:
    """The command that makes ``out`` of ``source``."""
    if program is OURS:
        return [console_script("convert"), source, "--recipe", source / "recipe.json", "--out", out]
    python = envs / program.environment / "bin" / "python"
    return [python, DRIVERS / program.driver, source / PART, out, *program.arguments]


def environment(program: Program) -> dict[str, str]:
    """Its environment variables: ours, without what would lead it to another Python's packages."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if program is not OURS:
        variables.pop("PYTHONPATH", None)
    return variables


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong, fit for a table."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace"))]
    lines = [line for line in lines if line]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)\b|ERROR)", line)]
    line = (errors or lines or ["no output"])[-1].replace("|", "/").replace("`", "'")
    return line if len(line) <= 160 else f"{line[:157]}..."
