"""Random numbers as a function of (seed, purpose, step), so that a resumed run needs no generator state."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. derive(seed, "rollout", step); independent of call order."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
