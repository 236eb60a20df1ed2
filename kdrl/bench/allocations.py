"""Bytes of tensors that are alive at once, counted op by op, for the CPU, whose allocator keeps no peak."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While inside, `live` and `peak` are the bytes of storages made since entering, now and at most.

    Storages that were there before count nothing, views nothing again, and those of a size in `beside` nothing at all,
    such as gradients of weights. Left out: memory that an operation takes and gives back before it returns (packed
    matrices, workspaces), and storages that another process holds.
    """

    def __init__(self, beside: Collection[int] = ()) -> None:
        super().__init__()
        self.beside = beside
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._meet(storage, 0)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._meet(storage, 0 if storage.nbytes() in self.beside else storage.nbytes())
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


def _storages(tree: Any) -> list[UntypedStorage]:
    leaves = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]
    return [x.untyped_storage() for x in leaves]
