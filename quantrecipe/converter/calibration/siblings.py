"""Which modules were always handed the very same input."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class Siblings:
    """Modules in classes: those of one class were handed the same in every forward so far.

    Attributes:
        classes: a number for each module. Those that were not called at all share one.
    """

    classes: dict[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Nothing is known that would tell them apart."""
        return cls(dict.fromkeys(names, 0))

    @classmethod
    def from_groups(
        cls, names: Iterable[str], groups: Iterable[Iterable[str]], called: Collection[str]
    ) -> Self:
        """As a file's header says it."""
        found = cls.of(names)
        group_of = {name: index for index, group in enumerate(groups) for name in group}
        # A module by itself has a key that no other has.
        found.refine({name: group_of.get(name, name) for name in called})
        return found

    def refine(self, handed: Mapping[str, Hashable]) -> None:
        """Tell apart what was handed different inputs in a forward, or not called in it."""
        numbers: dict[Hashable, int] = {}
        self.classes = {
            name: numbers.setdefault((number, handed.get(name)), len(numbers))
            for name, number in self.classes.items()
        }

    def groups(self, keys: Mapping[str, Hashable]) -> tuple[tuple[str, ...], ...]:
        """Groups of two and more, in the order of the modules.

        Args:
            keys: of those that were called; only those with equal keys can be siblings.
        """
        groups: dict[Hashable, list[str]] = {}
        for name, number in self.classes.items():
            if name in keys:
                groups.setdefault((number, keys[name]), []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)


class Identities:
    """What tells inputs apart while a forward runs, without keeping any of them."""

    def __init__(self) -> None:
        # As long as they are here, no other storage gets the address of one of these.
        self._storages: dict[int, StorageWeakRef] = {}

    def clear(self) -> None:
        """Forget all of them; identities from before mean nothing afterwards."""
        self._storages.clear()

    def of(self, tensor: Tensor) -> Hashable:
        """The identity of a tensor: that of its memory, its place in it and its version."""
        try:
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError):
            return object()  # a subclass without memory of its own
        self._storages.setdefault(storage.cdata, storage)
        whole = tensor.is_contiguous()
        place = (tensor.numel(), tensor.shape[-1]) if whole else (tensor.shape, tensor.stride())
        version = None if tensor.is_inference() else tensor._version
        return (storage.cdata, tensor.storage_offset(), place, tensor.dtype, version)
