"""Names that users can add to: terms, masks, schedules, verifiers, tasks, solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from kdrl.errors import UserError, nearest

T = TypeVar("T")
S = TypeVar("S")


class Registry(Generic[T]):
    """A mapping from a name in a recipe to the thing that implements it; `kind` names it in errors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._homes: dict[str, str] = {}

    def add(self, name: str, of: object | None = None) -> Callable[[S], S]:
        """Decorator that registers under `name`; one's own entry can be replaced, a built-in one raises UserError.

        `of` is the user's function where the thing registered is a wrapper around it.
        """

        def register(thing: S) -> S:
            home = getattr(thing if of is None else of, "__module__", "")
            if self._homes.get(name, "").split(".")[0] == "kdrl" and home != self._homes[name]:
                raise UserError(f"{self.kind} {name!r} is built in; choose another name.")
            self._entries[name], self._homes[name] = cast(T, thing), home
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
