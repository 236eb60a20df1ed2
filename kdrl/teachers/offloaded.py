"""A local teacher whose weights lie in main memory but while it scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from kdrl.errors import UserError
from kdrl.models import LoadedModel
from kdrl.objectives.head import Head
from kdrl.teachers.local import LocalTeacher


class OffloadedTeacher(LocalTeacher):
    """Moves to the device for a step's scoring and back; the head's weights stay until the update is done."""

    def __init__(self, loaded: LoadedModel, budget: int, home: str | torch.device = "cpu") -> None:
        super().__init__(loaded, budget)
        self.work, self.home = loaded.device, torch.device(home)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        self._move(self.work)
        try:
            yield
        finally:
            self._move(self.home)

    def _move(self, device: torch.device) -> None:
        self.loaded.model.to(device)

    def _keep(self, head: Head) -> Head:
        # A tensor of its own on the same memory, for moving a module replaces what its parameters hold.
        return head.map(Tensor.detach)


def check_offload(device: str | torch.device, compressed: bool, where: str = "teacher") -> None:
    """Raise UserError where there is nowhere else for the weights to go, or where they cannot be moved."""
    if torch.device(device).type != "cuda":
        raise UserError(
            f"{where}.offload moves weights between a GPU and main memory, and the device is {device}; leave it out."
        )
    if compressed:
        raise UserError(f"{where}.offload cannot move weights that {where}.load has compressed; leave one of them out.")
