"""What `kdrl select --by` can say: which options belong to which selector, and the arithmetic of domains."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.seeds import derive

By = Literal["difference", "ddk", "success", "perplexity", "length", "diversity", "coverage", "ngram"]

# Selector -> (options it takes, groups of which at least one must be given).
_OPTIONS: dict[str, tuple[set[str], tuple[set[str], ...]]] = {
    "difference": ({"keep", "reverse"}, ({"keep"},)),
    "perplexity": ({"keep", "reverse", "low", "high", "of"}, ({"keep", "low", "high"},)),
    "length": ({"keep", "reverse", "low", "high"}, ({"keep", "low", "high"},)),
    "success": ({"low", "high", "traces"}, ({"low", "high"},)),
    "ddk": ({"keep", "domain", "alpha", "probe"}, ()),
    "diversity": ({"keep", "per_prompt"}, ({"keep", "per_prompt"},)),
    "coverage": ({"keep"}, ({"keep"},)),
    "ngram": ({"keep", "target"}, ({"keep"}, {"target"})),
}
_ALWAYS = {"by", "scores", "seed"}


class SelectConfig(Config):
    """Which rows are kept, by what."""

    by: By
    """The selector."""
    keep: float | int | None = None
    """A share (0.5) or a number (1000) of rows."""
    reverse: bool = False
    """Keep the other end of the scores."""
    low: float | None = None
    """Least score that is kept."""
    high: float | None = None
    """Largest score that is kept."""
    of: Literal["teacher", "reference"] = "teacher"
    """perplexity: whose."""
    domain: str = "domain"
    """ddk: the column that names the domain."""
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """ddk: share of the ratio's part; the rest is uniform over domains."""
    probe: int = Field(default=500, ge=1)
    """ddk: rows scored per domain."""
    per_prompt: int | None = Field(default=None, ge=2)
    """diversity: traces kept of each prompt, instead of of the whole set."""
    traces: str | None = None
    """success: file of `kdrl generate --keep all` whose traces say how often a prompt is solved."""
    target: str | None = None
    """ngram: data file that the kept rows should resemble."""
    scores: bool = False
    """Add the scores as columns."""
    seed: int = 0
    """Seed of what is drawn."""

    @model_validator(mode="after")
    def _options_belong(self) -> SelectConfig:
        taken, needed = _OPTIONS[self.by]
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default} - _ALWAYS
        if extra := sorted(given - taken):
            raise ValueError(f"{option(extra[0])} has no effect on --by {self.by}; leave it out")
        for group in needed:
            if not given & group:
                raise ValueError(f"--by {self.by} needs {' or '.join(map(option, sorted(group)))}")
        if self.keep is not None and given & {"low", "high", "per_prompt"}:
            raise ValueError("--keep and bounds (--low, --high, --per-prompt) are two ways; choose one")
        if self.reverse and self.keep is None:
            raise ValueError("--reverse turns --keep round; bounds have no direction")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"--low {self.low:g} is above --high {self.high:g}, so nothing would be kept")
        if self.keep is not None and (self.keep <= 0 or (isinstance(self.keep, float) and self.keep > 1)):
            raise ValueError(f"--keep is a share such as 0.5 or a number of rows such as 1000, not {self.keep}")
        return self


def option(name: str) -> str:
    """A field as the command line writes it."""
    return "--" + name.replace("_", "-")


def parse_keep(text: str | None) -> float | int | None:
    """`0.5` a share, `1000` a number, None for nothing; raises UserError."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--keep is a share such as 0.5 or a number of rows such as 1000, not {text!r}") from None


def kept_count(keep: float | int, total: int) -> int:
    """How many of `total` rows a share or a number keeps: the nearest whole number, at least 1."""
    return max(1, round(keep * total)) if isinstance(keep, float) else keep


def domain_shares(ratios: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Shares alpha softmax(PPL_S / PPL_T) + (1 - alpha) / N of N domains (DDK, arXiv 2407.16154; its first update)."""
    top = max(ratios.values())
    raised = {name: math.exp(ratio - top) for name, ratio in ratios.items()}
    total = math.fsum(raised.values())
    return {name: alpha * value / total + (1 - alpha) / len(ratios) for name, value in raised.items()}


def quotas(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers that add up to `size`, in proportion to the shares; remainders go to the largest first."""
    exact = {name: share * size for name, share in shares.items()}
    out = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: (out[n] - exact[n], n))[: size - sum(out.values())]:
        out[name] += 1
    return out


def resample(members: Mapping[str, Sequence[int]], shares: Mapping[str, float], size: int, seed: int) -> list[int]:
    """Rising indices by the quotas of their domains: a random subset of each, after whole copies where one is short."""
    out: list[int] = []
    for name, count in quotas(shares, size).items():
        order = list(members[name])
        random.Random(derive(seed, "resample", name)).shuffle(order)
        copies, rest = divmod(count, len(order))
        out += order * copies + order[:rest]
    return sorted(out)
