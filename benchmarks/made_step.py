"""One step's responses without training: written once, then scored and trained on as often as wanted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import SEED, characters
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.build import Builder
from kdrl.models import ModelConfig
from kdrl.recipe import load_recipe
from kdrl.trainer import Parts, Trainer
from kdrl.update import Scored


@dataclass(frozen=True)
class Size:
    """How much a step holds: prompts x group responses of exactly `new_tokens`."""

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int


@dataclass
class MadeStep:
    """Live parts and one step's scored responses."""

    parts: Parts
    scored: Scored

    @property
    def rollouts(self) -> Rollouts:
        """The responses."""
        return self.scored.rollouts

    def wanted_N(self, share: float) -> Tensor:
        """Tokens of a share of the responses, spread evenly over the groups, bool `[N]`."""
        rows = self.rollouts.rows
        kept = [int((row + 1) * share) > int(row * share) for row in range(rows)]
        return torch.tensor(kept)[self.rollouts.row_N]

    def teacher(self, wanted_N: Tensor, need: Any) -> Any:
        """The teacher's phase; what it found."""
        return self.parts.teachers["teacher"].score(self.rollouts, wanted_N, need, 1.0)

    def update(self, wanted_N: Tensor | None = None) -> None:
        """Forward and backward of the student, on all tokens or those wanted; the gradient is dropped."""
        scored = self.scored
        if wanted_N is not None:
            scored = replace(scored, active=[replace(a, keep_N=a.keep_N & wanted_N) for a in scored.active])
        self.parts.updater.clear()
        self.parts.updater.accumulate(scored, range(self.rollouts.rows))


def task_of(folder: Path, size: Size, count: int, vocabulary: int) -> dict[str, Any]:
    """A data file of prompts of characters, no two alike, and its recipe section."""
    generator = torch.Generator().manual_seed(SEED)
    known = characters(vocabulary)[1:]
    rows = []
    for _ in range(count):
        chosen = torch.randint(len(known), (size.prompt_tokens,), generator=generator).tolist()
        rows.append(json.dumps({"prompt": "".join(known[n] for n in chosen), "answer": "7"}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"path": str(path), "verifier": {"name": "regex", "settings": {"pattern": "7[ -?]"}}}


def plain(config: ModelConfig) -> dict[str, Any]:
    """A model's section as a recipe has it."""
    return config.model_dump(mode="json", exclude_defaults=True)


@contextmanager
def made_step(recipe: dict[str, Any], size: Size, vocabulary: int) -> Iterator[MadeStep]:
    """A step of the recipe's student, teacher and objective; no token ends a response."""
    with tempfile.TemporaryDirectory() as folder:
        resolved = load_recipe(
            {
                "steps": 1,
                "seed": SEED,
                "device": "cpu",
                **recipe,
                "task": task_of(Path(folder), size, size.prompts, vocabulary),
                "rollout": {"prompts": size.prompts, "group": size.group, "max_new_tokens": size.new_tokens},
                "evaluate": {"baselines": False},
            }
        )
        with ExitStack() as stack:
            builder = Builder(resolved, Path(folder), stack)
            builder.student.eos_ids = (-1,)
            parts = builder.parts()
            yield MadeStep(parts, Trainer(parts).trial(0))
