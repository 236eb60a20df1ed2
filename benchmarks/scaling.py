"""Teacher's phase and update against the plainest full-logits step, as vocabulary, length and mask grow, in turns.

    python benchmarks/scaling.py [--budget 900] [--threads 2] [--quick] [--only vocabulary]

Full-vocabulary reverse KL of a 1M student to a 5M teacher, float32, on responses that the student wrote before. `kdrl`
is its teacher's phase and update; `naive` pads all rows into one batch, keeps float32 logits of both models at every
position, and masks at the end. Neither steps the optimizer. Peaks are bytes of tensors alive at once above both models,
gradients included, from a run of each that is not timed. Vocabulary: 16 rows of 64 tokens; length: 2,048 response
tokens in all; mask: the share of 64 responses that the loss is on. A naive case whose logits would take more than a
third of the memory is left out. The head alone, with its memory, is in head.py; group sizes are in group.py. Writes
benchmarks/results/scaling.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import begin, chosen, mib, parser, repeats, save, shares, sized, times
from made_step import MadeStep, Size, made_step, plain
from torch import Tensor

from kdrl.available import available_bytes
from kdrl.bench.allocations import Allocations
from kdrl.bench.turns import in_turns, ratios, summary
from kdrl.models.quick import library_layers

# Arrays of all logits that live at once: logits and log-probs of both, their product, two gradients.
_NAIVE_ARRAYS = 7


@dataclass(frozen=True)
class Case:
    """A size, a vocabulary and the share of responses that the loss is on."""

    size: Size
    vocabulary: int
    share: float = 1.0


CASES = {
    **{f"vocabulary {v:,}": Case(Size(4, 4, 16, 64), v) for v in (1_000, 4_096, 32_000, 151_936)},
    **{f"length {n}": Case(Size(2048 // n // 4, 4, 16, n), 4_096) for n in (32, 128, 512)},
    **{f"mask keeps {share:.0%}": Case(Size(8, 8, 16, 64), 4_096, share) for share in (1.0, 0.5, 0.3, 0.1)},
}


class Naive:
    """The same loss from one padded batch and full logits."""

    def __init__(self, step: MadeStep, wanted_N: Tensor) -> None:
        rollouts = step.rollouts
        texts = [r.prompt_ids + r.token_ids for r in rollouts.responses]
        width = max(map(len, texts))
        self.ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        self.mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        self.keep = torch.zeros(self.ids.shape, dtype=torch.bool)
        for row, response in enumerate(rollouts.responses):
            start, end = rollouts.span(row)
            begin = len(response.prompt_ids) - 1
            self.keep[row, begin : begin + end - start] = wanted_N[start:end]
        self.student = step.parts.student.model
        self.teacher = step.parts.teachers["teacher"].loaded.model  # type: ignore[attr-defined]

    def __call__(self) -> None:
        """Forward of both, loss, backward, with the library's own layers."""
        with library_layers(self.student), library_layers(self.teacher):
            self._step()

    def _step(self) -> None:
        self.student.zero_grad()
        with torch.no_grad():
            logp = self.teacher(input_ids=self.ids, attention_mask=self.mask).logits.log_softmax(-1)
        logq = self.student(input_ids=self.ids, attention_mask=self.mask).logits.log_softmax(-1)
        kl = (logq.exp() * (logq - logp)).sum(-1)
        ((kl * self.keep).sum() / self.keep.sum()).backward()


def measure(step: MadeStep, case: Case, turns: int, budget_s: float) -> dict[str, Any]:
    """Both, or kdrl alone where full logits would not fit."""
    wanted_N = step.wanted_N(case.share)

    def kdrl() -> None:
        evidence = step.teacher(wanted_N, "distribution")
        step.update(wanted_N)
        del evidence  # a step keeps it until its update is done

    naive = Naive(step, wanted_N)
    sides = {"kdrl": kdrl, "naive": naive}
    needed = _NAIVE_ARRAYS * 4 * naive.ids.numel() * case.vocabulary
    if needed > available_bytes(torch.device("cpu")) / 3:
        del sides["naive"]
    seconds = in_turns(sides, turns, budget_s=budget_s)
    found: dict[str, Any] = {f"{name}_s": summary(each) for name, each in seconds.items()}
    found["kdrl_tokens_per_s"] = summary([step.rollouts.tokens / s for s in seconds["kdrl"]])
    sizes = {name: peak_bytes(step, side) for name, side in sides.items()}
    found["peak_mib"] = {name: mib(size) for name, size in sizes.items()}
    if "naive" in seconds:
        found["kdrl_over_naive"] = ratios(seconds["kdrl"], seconds["naive"])
        found["peak_over_naive"] = round(sizes["kdrl"] / sizes["naive"], 4)
    return {"response_tokens": step.rollouts.tokens, "wanted_tokens": int(wanted_N.sum()), **found}


def peak_bytes(step: MadeStep, side: Callable[[], object]) -> int:
    """Of tensors alive at once above what was there before, gradients of weights included."""
    step.parts.updater.clear()
    with Allocations() as seen:
        side()
    return seen.peak


def main() -> None:
    """Run the cases and write the JSON."""
    options = parser(__doc__, "scaling.json").parse_args()
    begin(options)
    results = []
    for name, budget_s in shares(chosen(list(CASES), options, quick=1), options):
        case = CASES[name]
        recipe = {
            "method": "opd",
            "objective": [{"distill": {"divergence": "reverse_kl", "support": "full"}}],
            "student": plain(sized("1M", case.vocabulary)),
            "teacher": plain(sized("5M", case.vocabulary)),
        }
        with made_step(recipe, case.size, case.vocabulary) as step:
            results.append({"case": name, **measure(step, case, repeats(options), budget_s)})
        found = results[-1]
        over = ", naive left out"
        if "naive_s" in found:
            over = f", {times(found['kdrl_over_naive'])} of the naive step's; memory {found['peak_over_naive']:.3f}"
        print(f"{name}: {found['kdrl_s']['median']:.3f} s{over}", flush=True)
        save(options, results)


if __name__ == "__main__":
    main()
