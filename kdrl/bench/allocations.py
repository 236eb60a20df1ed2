"""Bytes of tensors that are alive at once, counted op by op, for the CPU, whose allocator keeps no peak."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While inside, `live` and `peak` are the bytes of storages made since entering, now and at most.

    Storages that were there before count nothing, views nothing again. Left out: memory that an operation takes and
    gives back before it returns (packed matrices, workspaces), and storages that another process holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._meet(storage, 0)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._meet(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _meet(self, storage: UntypedStorage, size: int) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Recorded(Allocations):
    """The same, which also knows what the peak is above some of the tensors that were made."""

    def __init__(self) -> None:
        super().__init__()
        # Changes of the live bytes, each with the number of its storage; numbers of those that live, by their address.
        self._changes: list[tuple[int, int]] = []
        self._numbers: dict[int, int] = {}
        self._sources: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _COPIES:
            for made, source in zip(_storages(out), _storages(args[:1]), strict=False):
                if made._cdata != source._cdata:
                    self._sources[self._numbers[made._cdata]] = self._numbers[source._cdata]
        return out

    def _meet(self, storage: UntypedStorage, size: int) -> None:
        if storage._cdata not in self._known:
            self._numbers[storage._cdata] = self._count
            self._changes.append((self._count, size))
            self._count += 1
        super()._meet(storage, size)

    def _forget(self, key: int, size: int) -> None:
        super()._forget(key, size)
        self._changes.append((self._numbers.pop(key), -size))

    def peak_above(self, *tensors: Tensor) -> int:
        """The peak had these tensors, which must still live, and what each was copied from not been made.

        Such as gradients of weights, and the float32 sums that were rounded to them.
        """
        without = {self._numbers[storage._cdata] for storage in _storages(tensors)}
        while more := {self._sources[number] for number in without if number in self._sources} - without:
            without |= more
        live = peak = 0
        for number, size in self._changes:
            live += 0 if number in without else size
            peak = max(peak, live)
        return peak


_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}


def _storages(tree: Any) -> list[UntypedStorage]:
    leaves = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]
    return [x.untyped_storage() for x in leaves]
