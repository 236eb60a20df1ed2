"""Seconds of the teacher's phase with masks, against the same phase unmasked, in turns.

    python benchmarks/teacher.py [--budget 300] [--threads 2] [--quick]

A 1M student's responses to prompts of 16 tokens; a 5M teacher scores those of wrong answers alone (`mask:
wrong_response`, 70 % are right), the first 30 % of every response, or all. `token` asks for log-probs of the written
tokens, `distribution` also for hidden states. Responses are spread evenly, so every prompt has a wrong one. Writes
benchmarks/results/teacher.json.
"""

from __future__ import annotations

from typing import Any

import torch
from common import begin, chosen, parser, repeats, save, shares, sized, times
from made_step import MadeStep, Size, made_step, plain

from kdrl.bench.turns import in_turns, ratios, summary

RIGHT = 0.7
SIZE = Size(prompts=16, group=8, prompt_tokens=16, new_tokens=64)
CASES = {
    f"{need}, {name}, vocabulary {vocabulary:,}": (need, dtype, vocabulary)
    for vocabulary in (55, 4096)
    for need in ("token", "distribution")
    for name, dtype in (("float32", "float32"), ("bfloat16", "bfloat16"))
}


def measure(step: MadeStep, need: str, turns: int, budget_s: float) -> dict[str, Any]:
    """All three in turns."""
    rollouts = step.rollouts
    everything = rollouts.trained_N
    wrong_N = step.wanted_N(1 - RIGHT)
    starts = torch.tensor(rollouts.offsets[:-1])[rollouts.row_N]
    early_N = torch.arange(rollouts.tokens) - starts < (1 - RIGHT) * SIZE.new_tokens
    masks = {"unmasked": everything, "wrong_response": wrong_N, "first_30_percent": early_N}
    seconds = in_turns(
        {name: lambda mask_N=mask_N: step.teacher(mask_N, need) for name, mask_N in masks.items()},
        turns,
        budget_s=budget_s,
    )
    return {
        "tokens": {name: int(mask_N.sum()) for name, mask_N in masks.items()},
        **{f"{name}_s": summary(each) for name, each in seconds.items()},
        **{f"{name}_over_unmasked": ratios(seconds[name], seconds["unmasked"]) for name in masks if name != "unmasked"},
    }


def main() -> None:
    """Run the cases and write the JSON."""
    options = parser(__doc__, "teacher.json").parse_args()
    begin(options)
    results = []
    for name, budget_s in shares(chosen(list(CASES), options), options):
        need, dtype, vocabulary = CASES[name]
        objective = [{"distill": {"divergence": "reverse_kl", "support": "full"}}]
        recipe = {
            "method": "opd",
            "objective": objective,
            "student": plain(sized("1M", vocabulary)),
            "teacher": plain(sized("5M", vocabulary, dtype=dtype)),
        }
        with made_step(recipe, SIZE, vocabulary) as step:
            found = measure(step, need, repeats(options, 7), budget_s)
        results.append({"case": name, **found})
        masked, early = (times(found[f"{key}_over_unmasked"]) for key in ("wrong_response", "first_30_percent"))
        print(f"{name}: wrong responses alone {masked}, first 30 % of all {early} of the time unmasked", flush=True)
    save(options, results, right=RIGHT)


if __name__ == "__main__":
    main()
