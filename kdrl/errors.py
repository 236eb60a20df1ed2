"""Errors that are told as one sentence: what the person at the keyboard can mend, and what stops a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a recipe, a file or an option; the text says what, where and what to do. Exit status 2."""


class RunError(Exception):
    """The run cannot go on, through no mistake in the recipe; the text says what was saved. Exit status 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, else the list of what is known."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
