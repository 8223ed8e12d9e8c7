"""A loader over one case."""

from __future__ import annotations

from pathlib import Path

from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.loaders import Loader, open_checkpoint
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.testing.conformance.cases import Case, Load
from quantrecipe.testing.conformance.comparing import Deviation, refusal_of, same_tensors
from quantrecipe.testing.conformance.files import make_checkpoint


def check_loader(loader: Loader, case: Case, folder: Path) -> None:
    """Load every part of the case's checkpoint.

    Raises:
        Deviation: what was loaded or refused is not what the case says.
    """
    path = make_checkpoint(case, folder)
    if case.refused:
        differences = list(refusal_of(_refusal(loader, path), case.refused))
    else:
        differences = [line for load in case.loads for line in _load(loader, path, load)]
    if differences:
        raise Deviation(differences)


def _refusal(loader: Loader, path: Path) -> InvalidInput | None:
    try:
        with open_checkpoint(path) as checkpoint:
            loader.load_state_dict(checkpoint)
    except InvalidInput as error:
        return error
    return None


def _load(loader: Loader, path: Path, load: Load) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        found = loader.load_state_dict(
            checkpoint, part=load.part, names=load.names, dtype=TORCH_DTYPES[load.dtype]
        )
    return list(same_tensors(found, load.tensors, f"part {load.part} in {load.dtype}"))
