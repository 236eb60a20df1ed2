"""What both sides are asked for, and what each gives back."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import SEED, characters

from kdrl.bench.turns import summary

LEARNING_RATE = 1e-8
WORDS = "add number seven to this small sum and then write what you think it is in one short line please"


@dataclass(frozen=True)
class Job:
    """One case: `best` lets each side use bfloat16 as it has it; without it all is float32."""

    size: str
    vocabulary: int
    best: bool
    prompts: int
    completions: int
    new_tokens: int
    prompt_length: tuple[int, int]

    @property
    def name(self) -> str:
        """What it is called in the results."""
        vocabulary = "" if self.size == "SmolLM2-135M" else f", vocabulary {self.vocabulary:,}"
        work = f"{self.prompts} x {self.completions} x {self.new_tokens}"
        return f"{self.size}{vocabulary}, {work}, {'each at its best' if self.best else 'float32'}"

    @property
    def reward(self) -> str:
        """A pattern that about half of the completions hold, so that few groups have equal rewards."""
        if self.size == "SmolLM2-135M":
            return "[kqz]"
        return "7[ -?]" if self.vocabulary < 100 else "[0-9A-Za-i]"

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.completions

    @property
    def tokens(self) -> int:
        """Tokens written in a step."""
        return self.rows * self.new_tokens

    def texts(self) -> list[str]:
        """Prompts: words for SmolLM2, characters for a character tokenizer; lengths from least to most."""
        rng, (least, most) = random.Random(SEED), self.prompt_length
        lengths = [least + (most - least) * n // max(1, self.prompts - 1) for n in range(self.prompts)]
        if self.size == "SmolLM2-135M":
            words = WORDS.split()
            return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]
        known = characters(self.vocabulary)[1:]
        return ["".join(rng.choice(known) for _ in range(length)) for length in lengths]

    def write_texts(self, folder: Path) -> Path:
        """The same as a data file."""
        path = folder / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in self.texts()))
        return path


@dataclass
class Block:
    """Seconds of a block's counted steps, in all and by phase, and the tokens that they wrote and had as prompts.

    `peak_bytes` is how far the process rose, while it trained, above what was resident before the block; None where the
    system does not tell. `equal_rewards` is the share of groups that have no advantage, whose update kdrl's `grpo`
    leaves out.
    """

    seconds: list[float]
    tokens: set[int]
    prompt_tokens: set[int]
    phases: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    equal_rewards: float = 0.0


def by_phase(blocks: Sequence[Block], tokens: int, rest: str) -> dict[str, dict[str, Any]]:
    """Seconds of each phase over all counted steps, and the step's written tokens a second of it.

    `rest` is what is left of a step's time; a phase that takes next to none of it has no rate.
    """
    whole = [s for block in blocks for s in block.seconds]
    seconds = {name: [s for block in blocks for s in block.phases[name]] for name in blocks[0].phases}
    seconds[rest] = [max(0.0, s - sum(each)) for s, *each in zip(whole, *seconds.values(), strict=True)]
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        found[name] = {"seconds": summary(values)}
        if statistics.median(values) > 1e-2 * statistics.median(whole):
            found[name]["tokens_per_s"] = float(f"{tokens / statistics.median(values):.4g}")
    return found
