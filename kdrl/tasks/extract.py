"""The part of a text that is the answer."""

from __future__ import annotations

import re

from kdrl.tasks.config import ExtractConfig

_NUMBER = re.compile(
    r"""(?<![\w.)\]])[-+]?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/[1-9]\d*(?![\d.]))?
      |(?<![\w.)\]])[-+]?(?:\$\s?)?\.\d+
      |(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?""",
    re.VERBOSE,
)


def last_number(text: str) -> str | None:
    """The last number: sign, thousands commas, decimals, exponent and a/b understood; `$` and commas removed."""
    found = None
    for match in _NUMBER.finditer(text.replace("\u2212", "-")):
        found = match.group()
    return None if found is None else re.sub(r"[$,+\s]", "", found)


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...}, braces balanced."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            escaped = place > 0 and text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def last_match(text: str, pattern: str) -> str | None:
    """The first group of the last match, or the whole match of a pattern without groups."""
    found = None
    for match in re.finditer(pattern, text, re.MULTILINE):
        found = match
    if found is None:
        return None
    part = found.group(1) if found.re.groups else found.group()
    return None if part is None else part.strip()


def after_last(text: str, marker: str) -> str | None:
    """The rest of the line after the last occurrence of `marker`."""
    _, mark, rest = text.rpartition(marker)
    return rest.strip().partition("\n")[0].strip() if mark else None


def in_tag(text: str, tag: str) -> str | None:
    """The content of the last complete <tag>...</tag>."""
    head, close, _ = text.rpartition(f"</{tag}>")
    _, opening, inner = head.rpartition(f"<{tag}>")
    return inner.strip() if close and opening else None


def without_reasoning(text: str, tag: str) -> str:
    """The text after the last </tag>; nothing when a <tag> was opened and never closed."""
    _, close, rest = text.rpartition(f"</{tag}>")
    answer = rest if close else text
    return answer.partition(f"<{tag}>")[0]


def extract(text: str, how: ExtractConfig) -> str | None:
    """The answer in `text`, None when there is none."""
    argument = how.argument or ""
    match how.how:
        case "whole":
            return text.strip()
        case "last_number":
            return last_number(text)
        case "boxed":
            return last_boxed(text)
        case "regex":
            return last_match(text, argument)
        case "after":
            return after_last(text, argument)
        case "tag":
            return in_tag(text, argument)
