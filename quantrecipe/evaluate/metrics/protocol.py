"""What a metric is, and what it says when something that it needs is not there."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, Protocol, runtime_checkable

from quantrecipe.schema.problems import InvalidInput, Problem

Against = Literal["reference", "prompt"]
"""What an output is held against: the reference's output of the same prompt and seed, or the text
of the prompt."""

IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEXTS: Final = (".txt",)
TENSORS: Final = (".safetensors",)


@runtime_checkable
class Scorer(Protocol):
    """A metric. What computes it may be made when it is first needed."""

    @property
    def name(self) -> str:
        """What scores are called after: the name that it is registered under."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that it scores, in lower case, with the dot."""

    @property
    def against(self) -> Against:
        """What they are held against."""

    def score(self, output: Path, against: Path | str) -> float:
        """The score of one output.

        Args:
            output: the file.
            against: the reference's file, or the prompt's text.

        Returns:
            A finite number.

        Raises:
            InvalidInput: a file is not what it scores, or something it needs is not installed.
        """


def needs(package: str, metric: str, install: str) -> Any:
    """Import what a metric is computed with.

    Args:
        package: what is imported.
        metric: what needs it.
        install: what to give to ``pip install``.

    Raises:
        InvalidInput: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise InvalidInput(
            Problem(
                "missing-package",
                f"the metric {metric} needs {package}: {error}",
                f"pip install {install}",
            )
        ) from error


def no_weights(metric: str, weights: str, error: Exception) -> InvalidInput:
    """Weights of a learned metric could not be had."""
    reason = str(error).strip().partition("\n")[0]
    return InvalidInput(
        Problem(
            "missing-weights",
            f"the metric {metric} needs the weights {weights}, which cannot be loaded: {reason}",
            "Fetch them on a machine with a network, and put them into the same cache here.",
        )
    )


def unusable(path: Path, kind: str, message: str, hint: str | None = None) -> InvalidInput:
    """An output that cannot be scored."""
    return InvalidInput(Problem(kind, message, hint, file=str(path)))
