"""kdrl's engine and head against the plain way, in turns, at a recipe's own sizes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl.bench.steps import undisturbed
from kdrl.bench.turns import in_turns, ratios, summary
from kdrl.bench.writing import Writing, compare_writing, engine_side, generate_side
from kdrl.build import Builder
from kdrl.models import LoadedModel, encode_prompt, head_of
from kdrl.objectives.head import score_tokens
from kdrl.recipe import Recipe
from kdrl.tasks.base import take

REPEATS = 5
# Full logits and their gradient beyond this many elements are not tried: 4 GiB each in float32.
_MOST_LOGITS = 1 << 30


def measure_parts(recipe: Recipe, budget_s: float | None = None) -> dict[str, Any]:
    """Tokens a second of the engine against `generate`, and seconds of the head against full logits.

    Responses have the recipe's greatest length, and no token ends one. The head's hidden states are random; both sides
    take the written token's log-prob, forward and backward.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        builder = Builder(undisturbed(recipe, 1), Path(folder), stack)
        student, rollout = builder.student, recipe.rollout
        problems = take(builder.stream, rollout.prompts)
        prompts = [encode_prompt(student, problem.prompt) for problem in problems]
        what = Writing(prompts, rollout.group, rollout.max_new_tokens, recipe.seed)
        rows = min(what.rows, rollout.rows)
        sides = {"engine": engine_side(student, what, rows), "generate": generate_side(student, what, rows)}
        written = compare_writing(sides, what.tokens, REPEATS, budget_s)
        tokens = min(recipe.optimizer.micro_batch_tokens, what.tokens)
        return {"engine": {"rows": rows, "new_tokens": what.new_tokens, **written}, "head": head(student, tokens)}


def head(loaded: LoadedModel, tokens: int) -> dict[str, Any]:
    """The chunked head against full logits: seconds of both, log-prob of random targets, forward and backward.

    As the recipe trains it: adapters on the head are its own, and what is frozen has no gradient.
    """
    head_ = head_of(loaded).map(lambda x: x.detach().clone().requires_grad_(x.requires_grad))
    given, vocabulary = head_.weight_VD, head_.vocab_size
    tokens = max(1, min(tokens, _MOST_LOGITS // vocabulary))
    hidden_ND = torch.randn(tokens, given.shape[1], device=given.device, dtype=given.dtype, requires_grad=True)
    targets_N = torch.randint(vocabulary, (tokens,), device=given.device)

    def backward(logp_N: Tensor) -> None:
        for leaf in (hidden_ND, *head_.tensors):
            leaf.grad = None
        (-logp_N.mean()).backward()

    def chunked() -> None:
        backward(score_tokens(head_, hidden_ND, targets_N).logp_N)

    def full() -> None:
        backward(head_.logp(hidden_ND).gather(-1, targets_N[:, None])[:, 0])

    seconds = in_turns({"chunked": chunked, "full": full}, REPEATS)
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "chunked_s": summary(seconds["chunked"]),
        "full_s": summary(seconds["full"]),
        "chunked_over_full": ratios(seconds["chunked"], seconds["full"]),
    }


def part_lines(parts: dict[str, Any]) -> list[str]:
    """A sentence for each."""
    engine, head_ = parts["engine"], parts["head"]
    rates = {name: f"{engine[f'{name}_tokens_per_s']['median']:,.0f}" for name in ("engine", "generate")}
    return [
        f"engine: {rates['engine']} tokens/s against {rates['generate']} of transformers' generate, "
        f"{_times(engine['engine_over_generate'])} ({engine['rows']} rows, {engine['new_tokens']} new tokens)",
        f"head: {head_['chunked_s']['median']:.4f} s against {head_['full_s']['median']:.4f} s of full logits, "
        f"{_times(head_['chunked_over_full'])} the time ({head_['tokens']:,} tokens, {head_['vocabulary']:,} rows)",
    ]


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} times ({ratio['min']:.2f} to {ratio['max']:.2f})"
