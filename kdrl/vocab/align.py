"""Two tokenizations of one text as groups of tokens that cover the same bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# A response of at least this many tokens on both sides that makes a single group is taken as a failed alignment.
COLLAPSE = 8
# Shares of the trained tokens that stand for the teacher's: one below HALF is too small, one below MOST worth a look.
HALF, MOST = 0.5, 0.9


@dataclass(frozen=True)
class Group:
    """Tokens `[start, stop)` of the student and of the teacher that stand for the same bytes, as few as possible."""

    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def single(self) -> bool:
        """Whether it is one token on both sides."""
        return all(stop - start == 1 for start, stop in (self.student, self.teacher))


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Group]:
    """Groups closed at every byte boundary that both sides share, in order, up to where their texts differ.

    A token of no bytes joins the group after it, or the last one at the end of the text.
    """
    sides = [list(accumulate(map(len, pieces))) for pieces in (student, teacher)]
    texts = [b"".join(student), b"".join(teacher)]
    common = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    shared = sorted(end for end in set(sides[0]) & set(sides[1]) if 0 < end <= common)
    groups: list[Group] = []
    begins = [0, 0]
    for boundary in shared:
        stops = [
            bisect_right(ends, boundary) if boundary == shared[-1] == ends[-1] else bisect_left(ends, boundary) + 1
            for ends in sides
        ]
        groups.append(Group((begins[0], stops[0]), (begins[1], stops[1])))
        begins = stops
    return groups


def collapsed(groups: Sequence[Group], student: int, teacher: int) -> bool:
    """Whether a response of this many tokens became one group alone, as when bytes are read wrongly throughout."""
    return len(groups) == 1 and min(student, teacher) >= COLLAPSE
