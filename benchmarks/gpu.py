"""What is measured on a GPU: utilisation of the update, the engine against `generate`, the head's memory and time.

    python benchmarks/gpu.py [--budget 500] [--only update] [--tiny]

Random weights in bfloat16, vocabulary 151,936. `update`: steps of `grpo` with 0.5B and 1.7B parameters, and the
update's model-flops utilisation by the device's data sheet (see kdrl.bench.flops for what counts). `engine`: 0.5B, 256
rows, 64 prompt tokens and 128 new ones, kdrl against transformers `generate` with its default and with a static cache.
`head`: head and full-vocabulary loss at 4,096 tokens against full float32 logits, time and allocated memory (head.py
alone has more). `--tiny` runs the same on a CPU with tiny models, to see that it runs. Writes
benchmarks/results/gpu.json.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import SEED, begin, chosen, make, parser, repeats, save, shares, sized, times, token_prompts
from made_step import Size, plain, task_of

from kdrl.bench.recipe import compute_dtype, phases, update
from kdrl.bench.steps import run_steps
from kdrl.bench.writing import Writing, compare_writing, engine_side, generate_side
from kdrl.build import Builder
from kdrl.recipe import load_recipe


@dataclass(frozen=True)
class Scale:
    """Where it runs and how large everything is."""

    device: str
    vocabulary: int
    sizes: tuple[str, ...]
    step: Size
    micro_batch_tokens: int
    rows: int
    new_tokens: int
    head_tokens: int


LARGE = Scale("cuda", 151_936, ("0.5B", "1.7B"), Size(16, 8, 128, 512), 16_384, 256, 128, 4096)
TINY = Scale("cpu", 50, ("0.3M", "1M"), Size(2, 4, 8, 16), 512, 8, 8, 64)


def measure_update(size: str, scale: Scale, budget_s: float, options: Namespace) -> dict[str, Any]:
    """Steps of `grpo`; the learning rate changes next to nothing."""

    def prepare(builder: Builder) -> None:
        builder.student.eos_ids = (-1,)

    with tempfile.TemporaryDirectory() as folder:
        step = scale.step
        recipe = load_recipe(
            {
                "method": "grpo",
                "steps": 9,
                "seed": SEED,
                "device": scale.device,
                "student": plain(sized(size, scale.vocabulary, dtype="bfloat16")),
                "task": task_of(Path(folder), step, 8 * step.prompts, scale.vocabulary),
                "rollout": {"prompts": step.prompts, "group": step.group, "max_new_tokens": step.new_tokens},
                "optimizer": {"lr": 1e-8, "micro_batch_tokens": scale.micro_batch_tokens},
                "evaluate": {"baselines": False},
            }
        )
        found = run_steps(recipe, 1 if options.quick else 4, prepare=prepare)
    result = {"phases": phases(found), "update": update(found, compute_dtype(recipe)), "peak_bytes": found.peak_bytes}
    about = result["update"]
    share = (
        f"{about['mfu']:.1%} of the data sheet" if "mfu" in about else f"{about['of_matmul']:.1%} of a large product"
    )
    print(f"update, {size}: {about['flops_per_s']['median'] / 1e12:.3g} TFLOP/s, {share}", flush=True)
    return result


def measure_engine(size: str, scale: Scale, budget_s: float, options: Namespace) -> dict[str, Any]:
    """Rollouts of a group of eight a prompt."""
    loaded = make(sized(size, scale.vocabulary, dtype="bfloat16"), device=scale.device)
    prompts = token_prompts(loaded, scale.rows // 8, 64, 64)
    what = Writing(prompts, 8, scale.new_tokens, SEED)
    sides = {
        "kdrl": engine_side(loaded, what),
        "generate": generate_side(loaded, what),
        "generate_static": generate_side(loaded, what, cache_implementation="static"),
    }
    found = compare_writing(sides, what.tokens, repeats(options, 3), budget_s)
    rate = found["kdrl_tokens_per_s"]["median"]
    print(f"engine, {size}: {rate:,.0f} tokens/s, {times(found['kdrl_over_generate'])} times generate", flush=True)
    return found


def measure_head(size: str, scale: Scale, budget_s: float, options: Namespace) -> dict[str, Any]:
    """head.py's comparison in both formats."""
    import head

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        case = head.Case("reverse_kl", scale.vocabulary, scale.head_tokens, dtype, scale.device)
        row = head.measure(case, repeats(options, 3))
        found[str(dtype).removeprefix("torch.")] = row
        print(
            f"head, {row['dtype']}: {times(row['time_ratio'])} of the time, {row['peak_ratio']} of the memory",
            flush=True,
        )
    return found


PARTS = {"update": measure_update, "engine": measure_engine, "head": measure_head}


def main() -> None:
    """Run the cases and write the JSON after each."""
    made = parser(__doc__, "gpu.json")
    made.add_argument("--tiny", action="store_true", help="tiny models on the CPU; shows nothing but that it runs")
    options = made.parse_args()
    scale = TINY if options.tiny else LARGE
    if scale.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no CUDA device; --tiny runs the same on a CPU")
    if options.tiny and options.json == made.get_default("json"):
        made.error("--tiny measures nothing worth keeping; give --json a file of your own")
    begin(options)
    small = scale.sizes[0]
    cases = {f"update, {size}": ("update", size) for size in scale.sizes}
    cases |= {f"engine, {small}, {scale.rows} rows": ("engine", small), "head": ("head", small)}
    results = []
    for name, budget_s in shares(chosen(list(cases), options, quick=len(cases)), options):
        part, size = cases[name]
        results.append({"case": name, "dtype": "bfloat16", **PARTS[part](size, scale, budget_s, options)})
        save(options, results, vocabulary=scale.vocabulary)


if __name__ == "__main__":
    main()
