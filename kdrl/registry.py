"""Names that users can add to: terms, masks, schedules, verifiers, tasks, solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from kdrl.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from a name in a recipe to the thing that implements it; `kind` names it in errors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that registers under `name`; raises UserError when the name is taken by something else."""

        def register(thing: T) -> T:
            held = self._entries.get(name)
            same = held is None or getattr(held, "__qualname__", held) == getattr(thing, "__qualname__", thing)
            if not same:
                raise UserError(f"{self.kind} {name!r} is already registered; choose another name.")
            self._entries[name] = thing
            return thing

        return register

    def get(self, name: str) -> T:
        """The entry called `name`; raises UserError with the nearest right name."""
        if name not in self._entries:
            raise UserError(f"no {self.kind} is called {name!r}{nearest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
