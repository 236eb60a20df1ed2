"""Seconds of a step against the group size, at as many responses, in turns: what prompts are shared for.

    python benchmarks/group.py [--budget 900] [--threads 2] [--quick] [--only opd]

128 responses of 64 tokens each to prompts of 512, as 32 prompts x 4 up to 4 x 32; 1M student (bfloat16 autocast), and
for `opd` a 5M teacher in bfloat16. `opd` also has 128 x 1: a prompt for every response is what a step without sharing
runs at any group size (`grpo` has no gradient there). `texts_tokens` are the tokens that one pass over the prompts and
responses reads. Steps are kdrl's own loop; verifying and metrics are in it. Writes benchmarks/results/group.json.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import SEED, begin, chosen, parser, save, shares, sized
from made_step import Size, plain, task_of

from kdrl.bench.steps import Steps, run_steps
from kdrl.bench.turns import ratios, summary, turns
from kdrl.build import Builder
from kdrl.recipe import load_recipe

RESPONSES = 128
GROUPS = (4, 8, 16, 32)
NEW_TOKENS = 64
VOCABULARY = 55
CASES = {"grpo": {"method": "grpo"}, "opd": {"method": "opd"}}


def block(recipe: dict[str, Any], group: int, options: Namespace) -> Steps:
    """Steps at one group size; no token ends a response."""
    size = Size(options.responses // group, group, options.prompt_tokens, NEW_TOKENS)

    def prepare(builder: Builder) -> None:
        builder.student.eos_ids = (-1,)

    with tempfile.TemporaryDirectory() as folder:
        task = task_of(Path(folder), size, 4 * size.prompts, VOCABULARY)
        rollout = {"prompts": size.prompts, "group": group, "max_new_tokens": size.new_tokens}
        full = {"steps": 9, "seed": SEED, "device": "cpu", **recipe, "task": task, "rollout": rollout}
        full |= {"optimizer": {"lr": 1e-8}, "evaluate": {"baselines": False}}
        return run_steps(load_recipe(full), options.steps, prepare=prepare)


def measure(recipe: dict[str, Any], groups: tuple[int, ...], options: Namespace, budget_s: float) -> dict[str, Any]:
    """All group sizes in turns."""
    found: dict[str, list[Steps]] = {str(group): [] for group in groups}
    for _, group in turns(list(found), 1 if options.quick else 3, budget_s):
        found[group].append(block(recipe, int(group), options))
        assert set(found[group][-1].tokens) == {options.responses * NEW_TOKENS}
    medians = {group: [statistics.median(each.seconds) for each in blocks] for group, blocks in found.items()}
    first = str(GROUPS[0])
    return {
        "texts_tokens": {
            group: options.responses // int(group) * options.prompt_tokens + options.responses * NEW_TOKENS
            for group in found
        },
        "step_s": {group: summary([s for each in blocks for s in each.seconds]) for group, blocks in found.items()},
        f"over_group_{first}": {group: ratios(each, medians[first]) for group, each in medians.items()},
        "phases_s": {
            group: {
                name: float(f"{statistics.median(s for each in blocks for s in each.phase(name)):.4g}")
                for name in ("rollout", "teacher", "update")
            }
            for group, blocks in found.items()
        },
    }


def main() -> None:
    """Run the cases and write the JSON."""
    made = parser(__doc__, "group.json")
    made.add_argument("--steps", type=int, default=2, help="counted steps of a block; one goes before")
    options = made.parse_args()
    options.responses, options.prompt_tokens = (32, 64) if options.quick else (RESPONSES, 512)
    options.steps = 1 if options.quick else options.steps
    begin(options)
    results = []
    for name, budget_s in shares(chosen(list(CASES), options), options):
        recipe = CASES[name] | {"student": plain(sized("1M", VOCABULARY, autocast="bfloat16"))}
        if name == "opd":
            recipe["teacher"] = plain(sized("5M", VOCABULARY, dtype="bfloat16"))
        groups = (1, *GROUPS) if name == "opd" else GROUPS
        found = measure(recipe, groups, options, budget_s)
        results.append({"case": name, "responses": options.responses, "prompt_tokens": options.prompt_tokens, **found})
        steps = ", ".join(f"{group}: {each['median']:.2f} s" for group, each in found["step_s"].items())
        last = found[f"over_group_{GROUPS[0]}"][str(GROUPS[-1])]["median"]
        print(f"{name}, seconds a step by group size: {steps}; {GROUPS[-1]} over {GROUPS[0]}: {last:.2f}", flush=True)
    save(options, results)


if __name__ == "__main__":
    main()
