"""The factors that a conversion folded, read from the file that it left of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader, read_header
from quantrecipe.evaluate.locked import AGAIN, locked_sites
from quantrecipe.formats.folding import FoldedFactors
from quantrecipe.formats.memory import as_memory
from quantrecipe.schema.folds import FOLDED_NAME, FoldSite
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.problems import InvalidInput, Problem


def read_folded(folder: Path, lock: Lock) -> FoldedFactors:
    """The factors of every place where a recipe folds some.

    Args:
        folder: what ``convert`` wrote.
        lock: of it.

    Raises:
        InvalidInput: the file is not of these places.
    """
    sites = locked_sites(lock)
    if not sites:
        return FoldedFactors()
    path = folder / FOLDED_NAME
    if not path.is_file():
        raise InvalidInput(
            Problem("missing-file", "holds the factors that were folded", AGAIN, file=str(path))
        )
    header = read_header(path)
    problems: list[Problem] = []
    folded: list[tuple[FoldSite, Tensor]] = []
    with SourceReader([header]) as reader:
        for site in sites:
            info, size = header.tensors.get(site.key), site.stop - site.start
            if info is None or (info.dtype, info.shape) != ("float32", (size,)):
                message = f"holds no float32 [{size}] for it"
                problems.append(
                    Problem("folded-differs", message, AGAIN, file=str(path), tensor=site.key)
                )
                continue
            values = torch.empty(size)
            reader.read_into(info, 0, as_memory(values))
            if not bool((values.isfinite() & (values > 0)).all()):
                message = "a factor is not positive and finite"
                problems.append(
                    Problem("folded-differs", message, AGAIN, file=str(path), tensor=site.key)
                )
            folded.append((site, values))
    if problems:
        raise InvalidInput(problems)
    return FoldedFactors(tuple(folded))
