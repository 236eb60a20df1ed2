"""Which split a problem belongs to, decided by its text alone.

Seeds, indices and difficulty settings play no part, so no two recipes with the same shares can put one text on both
sides. With different shares they can: shares are intervals of one hash, test from below and development from above.
"""

from __future__ import annotations

import hashlib
import unicodedata


def normalise(text: str) -> str:
    """Text with Unicode forms unified, case folded and all white space removed: what counts as the same problem."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> bytes:
    """The sha256 digest of the normalised text."""
    return hashlib.sha256(normalise(text).encode()).digest()


def split_of(key: bytes, development: float, test: float) -> str:
    """`test`, `development` or `train` for a digest from `text_key`; shares are fractions of all texts."""
    place = int.from_bytes(key[:8], "big") / 2**64
    if place < test:
        return "test"
    return "development" if place >= 1.0 - development else "train"
