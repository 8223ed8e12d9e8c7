"""Folders of outputs, scored file by file.

A file is called after its prompt; one of several seeds ends in ``seed`` and its number, after a
dot, a dash or an underscore: ``p17.png``, ``p17-seed3.png``. Without one the seed is 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantrecipe.checkpoint import SourceError
from quantrecipe.evaluate.metrics.protocol import Scorer
from quantrecipe.schema.document import read_parsed
from quantrecipe.schema.parsed import describe
from quantrecipe.schema.problems import InvalidInput, Problem

_SEED: Final = re.compile(r"(.+?)[._-]seed([0-9]{1,15})")
_NAMED: Final = 3

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one output, as a line of a file of scores has it."""

    prompt: str
    seed: int
    metric: str
    value: float
    variant: str

    def line(self) -> str:
        """JSON Lines."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields, ensure_ascii=False)


def outputs_in(folder: Path, suffixes: Sequence[str]) -> dict[Key, Path]:
    """The files of a folder that have one of these suffixes, by prompt and seed.

    Raises:
        InvalidInput: there is none, or two are of the same prompt and seed.
        SourceError: the folder cannot be read.
    """
    found: dict[Key, Path] = {}
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise SourceError(folder, error) from error
    for path in files:
        match = _SEED.fullmatch(path.stem)
        key = (match[1], int(match[2])) if match else (path.stem, 0)
        if key in found:
            message = f"prompt {key[0]!r} with seed {key[1]} is there already: {found[key].name}"
            raise InvalidInput(Problem("duplicate-output", message, file=str(path)))
        found[key] = path
    if not found:
        message = f"no file in it ends in {', '.join(suffixes)}"
        raise InvalidInput(Problem("no-outputs", message, file=str(folder)))
    return found


def read_prompts(path: Path) -> dict[str, str]:
    """Texts of prompts: a JSON or YAML object of the prompt's name and its text.

    Raises:
        InvalidInput: it is no such document.
    """
    parsed = read_parsed(path)
    if parsed.problems:
        raise InvalidInput(parsed.problems)
    value: Any = parsed.value
    if not isinstance(value, dict):
        message = f"expected an object of names and texts, found {describe(value)}"
        raise InvalidInput(Problem("wrong-type", message, file=str(path)))
    for name, text in value.items():
        if not isinstance(text, str):
            message = f"the text of prompt {name!r} is {describe(text)}"
            raise InvalidInput(Problem("wrong-type", message, file=str(path)))
    return value


def score_folder(
    scorer: Scorer,
    folder: Path,
    variant: str,
    *,
    reference: Path | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Iterator[Scored]:
    """Score every output of a variant, in the order of their names.

    Args:
        scorer: the metric.
        folder: the outputs.
        variant: what produced them.
        reference: the folder of the outputs to hold them against.
        prompts: the texts to hold them against.

    Raises:
        InvalidInput: an output has no partner, or cannot be scored.
        SourceError: a folder cannot be read.
    """
    outputs = outputs_in(folder, scorer.suffixes)
    against = _against(scorer, folder, outputs, reference, prompts)
    for (prompt, seed), path in outputs.items():
        value = float(scorer.score(path, against[prompt, seed]))
        if not math.isfinite(value):
            message = f"the {scorer.name} of this output is {value}, which is no score"
            raise InvalidInput(Problem("not-finite", message, file=str(path)))
        yield Scored(prompt, seed, scorer.name, value, variant)


def _against(
    scorer: Scorer,
    folder: Path,
    outputs: Mapping[Key, Path],
    reference: Path | None,
    prompts: Mapping[str, str] | None,
) -> Mapping[Key, Path | str]:
    if scorer.against == "prompt":
        if prompts is None:
            raise InvalidInput(
                Problem(
                    "no-prompts",
                    f"{scorer.name} holds outputs against the text of their prompts",
                    "Give --prompts a file of them.",
                )
            )
        _check(folder, [key for key in outputs if key[0] not in prompts], "a text of its prompt")
        return {key: prompts[key[0]] for key in outputs}
    if reference is None:
        raise InvalidInput(
            Problem(
                "no-reference",
                f"{scorer.name} holds outputs against those of a reference",
                "Give --reference a folder of them.",
            )
        )
    wanted = outputs_in(reference, scorer.suffixes)
    _check(folder, [key for key in outputs if key not in wanted], f"a partner in {reference}")
    _check(reference, [key for key in wanted if key not in outputs], f"a partner in {folder}")
    return wanted


def _check(folder: Path, alone: Sequence[Key], what: str) -> None:
    if alone:
        named = ", ".join(f"{prompt!r} (seed {seed})" for prompt, seed in alone[:_NAMED])
        more = f" and {len(alone) - _NAMED:,} more" if len(alone) > _NAMED else ""
        message = f"{len(alone):,} of its outputs have not {what}: {named}{more}"
        raise InvalidInput(Problem("missing-output", message, file=str(folder)))
