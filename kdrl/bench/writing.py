"""Two ways to write the same number of tokens with the same weights: kdrl's engine and transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdrl.bench.turns import in_turns, ratios, summary
from kdrl.engines import TorchEngine
from kdrl.models import LoadedModel
from kdrl.models.quick import library_layers


@dataclass(frozen=True)
class Writing:
    """What is to be written: rows = prompts x samples, each of exactly `new_tokens`, from the whole vocabulary."""

    prompts: Sequence[Sequence[int]]
    samples: int
    new_tokens: int
    seed: int = 0

    @property
    def rows(self) -> int:
        """Responses."""
        return len(self.prompts) * self.samples

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return self.rows * self.new_tokens


def engine_side(loaded: LoadedModel, what: Writing, max_rows: int | None = None) -> Callable[[], int]:
    """A call that writes with kdrl's engine, which gives log-probs too, and returns how many tokens."""
    endless = replace(loaded, eos_ids=(-1,))
    engine = TorchEngine(endless, max_rows or what.rows)

    def run() -> int:
        out = engine.generate(what.prompts, samples=what.samples, max_new_tokens=what.new_tokens, seed=what.seed)
        return sum(len(sample.token_ids) for samples in out for sample in samples)

    return run


def generate_side(loaded: LoadedModel, what: Writing, max_rows: int | None = None, **options: Any) -> Callable[[], int]:
    """A call that writes with transformers on its own layers, prompts padded on the left, and returns how many tokens.

    `options` are more of `generate`'s, such as `cache_implementation`.
    """
    rows = [list(prompt) for prompt in what.prompts for _ in range(what.samples)]
    size = max_rows or len(rows)
    pieces = [_padded(rows[start : start + size], loaded) for start in range(0, len(rows), size)]

    def run() -> int:
        torch.manual_seed(what.seed)
        loaded.model.eval()
        written = 0
        with torch.inference_mode(), loaded.autocast(), library_layers(loaded.model):
            for given in pieces:
                out = loaded.model.generate(
                    **given,
                    max_new_tokens=what.new_tokens,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    eos_token_id=None,
                    pad_token_id=loaded.pad_id,
                    **options,
                )
                written += out.shape[0] * (out.shape[1] - given["input_ids"].shape[1])
        return written

    return run


def _padded(rows: Sequence[list[int]], loaded: LoadedModel) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[loaded.pad_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    device = loaded.device
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def compare_writing(
    sides: dict[str, Callable[[], int]], tokens: int, repeats: int, budget_s: float | None = None
) -> dict[str, Any]:
    """Tokens a second of each side, and of the first over each other in the same turn; all must write `tokens`."""

    def checked(name: str) -> Callable[[], None]:
        def run() -> None:
            written = sides[name]()
            assert written == tokens, (name, written, tokens)

        return run

    seconds = in_turns({name: checked(name) for name in sides}, repeats, budget_s=budget_s)
    first, *others = sides
    return {
        "tokens": tokens,
        "repeats": len(seconds[first]),
        **{f"{name}_tokens_per_s": summary([tokens / s for s in each]) for name, each in seconds.items()},
        **{f"{first}_over_{name}": ratios(seconds[name], seconds[first]) for name in others},
    }
