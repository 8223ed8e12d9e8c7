"""Which device each tensor of a model goes to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from quantrecipe.schema.problems import Problem, closest

DeviceLike = torch.device | str | int
"""A device, its name, or the number of a GPU."""


class Placement:
    """Devices by the names of modules.

    Args:
        device: one device for everything; or module names to devices, where the longest name that
            a tensor's name begins with wins and ``""`` is for the rest; or ``None``: each stays
            where the model has it, on the CPU if that is the meta device.

    Attributes:
        problems: devices that are unknown or not there.
    """

    def __init__(self, device: DeviceLike | Mapping[str, DeviceLike] | None) -> None:
        self.problems: list[Problem] = []
        self._devices: dict[str, torch.device] | None = None
        self._used: set[str] = set()
        if device is not None:
            by_name = device if isinstance(device, Mapping) else {"": device}
            found = {name: self._resolve(name, each) for name, each in by_name.items()}
            self._devices = {name: each for name, each in found.items() if each is not None}

    def of(self, name: str, tensor: Tensor) -> torch.device | None:
        """Where the tensor of this dotted name goes; ``None``: nothing says, or not well."""
        if self._devices is None:
            return torch.device("cpu") if tensor.is_meta else tensor.device
        prefix = name
        while prefix and prefix not in self._devices:
            prefix = prefix.rpartition(".")[0]
        self._used.add(prefix)
        return self._devices.get(prefix)

    def unused(self, names: Iterable[str]) -> Iterator[Problem]:
        """Entries that nothing was placed by, once all was: ``names`` are what the model has."""
        known = list(names)
        for prefix in (self._devices or {}).keys() - self._used - {""}:
            # Where each child has an entry of its own, nothing is left for the module's.
            if any(name == prefix or name.startswith(f"{prefix}.") for name in known):
                continue
            near = closest(prefix, known)
            yield Problem(
                "unknown-module",
                f"device is given for {prefix!r}, which the model does not have",
                hint=None if near is None else f"Did you mean {near!r}?",
            )

    def _resolve(self, name: str, wanted: DeviceLike) -> torch.device | None:
        entry = f" of {name!r}" if name else ""
        if wanted == "disk":
            self._refuse(f"device{entry}: tensors are not left on the disk", "Use cpu.")
            return None
        try:
            device = torch.device("cuda", wanted) if isinstance(wanted, int) else wanted
            device = torch.device(device)
        except RuntimeError:
            self._refuse(f"device{entry} {str(wanted)!r} is not known", "Use cpu, or cuda:N.")
            return None
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (device.index or 0) >= count:
                what = f"there are {count}, counted from 0" if count else "there is no CUDA device"
                self._refuse(f"device{entry} {str(wanted)!r}: {what}", "Use cpu.")
                return None
            if str(device) == "cuda":
                return torch.device("cuda", torch.cuda.current_device())
        return device

    def _refuse(self, message: str, hint: str) -> None:
        self.problems.append(Problem("no-device", message, hint=hint))
