"""First-thought prefixes: another model begins each response (agent distillation, arXiv 2505.17612)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from kdrl.engines.base import Engine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.seeds import derive
from kdrl.tasks import Problem

# What a line or a sentence may hold at most.
_LONGEST = 128
_ENDS: dict[str, Callable[[str], int | None]] = {
    "line": lambda text: text.find("\n") + 1 or None,
    "sentence": lambda text: None if (m := re.search(r"[.!?…](?=\s)|\n", text)) is None else m.end(),
}


def parse_first_thought(text: str) -> tuple[str, int | str]:
    """`MODEL/N`, `MODEL/line` or `MODEL/sentence` as (model, how much); raises ValueError."""
    model, slash, amount = text.rpartition("/")
    if slash and model and amount.isdigit() and int(amount) > 0:
        return model, int(amount)
    if slash and model and amount in _ENDS:
        return model, amount
    raise ValueError(f"{text!r} must end with how much is taken: MODEL/N tokens, MODEL/line or MODEL/sentence")


class FirstThought:
    """Writes the beginnings: the first `amount` tokens of the model's own response, or its first line or sentence."""

    def __init__(self, loaded: LoadedModel, engine: Engine, amount: int | str) -> None:
        self.loaded, self.engine, self.amount = loaded, engine, amount
        self.tokens = amount if isinstance(amount, int) else _LONGEST

    def write(self, problems: Sequence[Problem], samples: int, seed: int, temperature: float) -> list[list[str]]:
        """Texts [problem][sample], without the end token; a line or sentence is cut at 128 tokens."""
        written = self.engine.generate(
            [encode_prompt(self.loaded, problem.prompt) for problem in problems],
            samples=samples,
            max_new_tokens=self.tokens,
            temperature=temperature,
            seed=derive(seed, "first thought"),
        )
        return [[self._cut(sample.token_ids) for sample in group] for group in written]

    def _cut(self, token_ids: list[int]) -> str:
        # A character whose bytes were cut apart decodes to "\ufffd".
        text = str(self.loaded.tokenizer.decode(token_ids, skip_special_tokens=True)).rstrip("\ufffd")
        end = None if isinstance(self.amount, int) else _ENDS[self.amount](text)
        return text[:end]


def prefix_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a prefix in the writer's tokenizer; raises UserError for text that it cannot write."""
    try:
        return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    except Exception as error:  # the Rust encoder raises a bare Exception
        raise UserError(f"the writer's tokenizer cannot write the first thought {text[:80]!r}: {error}") from error
