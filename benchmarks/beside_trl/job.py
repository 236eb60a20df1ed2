"""What both sides are asked for, and what each gives back."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from common import SEED, characters

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
    """Seconds of the counted steps of one block, and the tokens that its steps wrote and had as prompts.

    `equal_rewards` is the share of groups that have no advantage, whose update kdrl's `grpo` leaves out.
    """

    seconds: list[float]
    tokens: set[int]
    prompt_tokens: set[int]
    phases: dict[str, float] = field(default_factory=dict)
    equal_rewards: float = 0.0
