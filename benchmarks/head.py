"""Time and peak memory of kdrl's head with a loss, against the same from full logits, in one run, alternating.

    python benchmarks/head.py [--tokens 1024] [--repeats 5] [--threads 2] [--device cpu] [--vocabularies 1000,4000]

Student and teacher hidden states and heads in, a loss out, forward and backward. `reverse_kl` is the full-vocabulary
KL(q||p) a token; `sampled` the written token's log-prob and the entropy. kdrl gives log-prob, entropy and covered mass
beside the KL, which full logits are not asked for. Full logits are float32: of bfloat16 weights both sides are exact in
their sums (`rounded` is the cheap form, whose bfloat16 logits carry an error of 2^-9). Peaks are bytes of tensors alive
at once above inputs and weight gradients (their float32 sums too); `resident` is how far the process's memory rose.
Writes benchmarks/results/head.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl.bench import machine
from kdrl.bench.allocations import Recorded
from kdrl.bench.turns import in_turns, ratios, summary, synchronize
from kdrl.objectives.distill import DistillConfig, distribution_loss
from kdrl.objectives.head import Head, score_tokens
from kdrl.teachers.base import Evidence, Given

RESULT = Path(__file__).parent / "results" / "head.json"
WIDTH = 512
SEED = 0
VOCABULARIES = (1_000, 4_000, 32_000, 151_936)


@dataclass
class Case:
    """Inputs of one comparison; every call leaves the gradients of hidden states and weights."""

    loss: str
    vocabulary: int
    tokens: int
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(SEED)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(self.device, self.dtype)

        self.hidden, self.teacher_hidden = draw(self.tokens, WIDTH), draw(self.tokens, WIDTH)
        self.weight, self.teacher_weight = draw(self.vocabulary, WIDTH) / 16, draw(self.vocabulary, WIDTH) / 16
        self.targets = torch.randint(self.vocabulary, (self.tokens,), generator=random).to(self.device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def kdrl(self) -> Tensor:
        """The chunked head, through the evidence that a local teacher gives."""
        config, comparisons = DistillConfig.model_validate({"divergence": "reverse_kl"}), []
        every = torch.arange(self.tokens, device=self.device)
        if self.loss == "reverse_kl":
            zeros = torch.zeros(self.tokens, device=self.device)
            evidence = Evidence(zeros, every, 0, self.teacher_hidden, Head(self.teacher_weight))

            def compare(tokens: Any, logq_CV: Tensor) -> Tensor:
                return distribution_loss(config, tokens, logq_CV)

            comparisons = [evidence.comparison(compare, every, Given(self.targets, {}))]
        scores = score_tokens(Head(self.weight), self.hidden, self.targets, entropy=True, comparisons=comparisons)
        if comparisons:
            return scores.losses_N[0][:, 0].mean()
        assert scores.entropy_N is not None
        return (scores.logp_N + 0.01 * scores.entropy_N).mean()

    def full(self) -> Tensor:
        """Full float32 logits."""
        return self._loss(lambda h, w: h.float() @ w.float().T)

    def rounded(self) -> Tensor:
        """Full logits in the format of the weights, widened afterwards."""
        return self._loss(lambda h, w: (h @ w.T).float())

    def _loss(self, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        logq = product(self.hidden, self.weight).log_softmax(-1)
        if self.loss == "sampled":
            entropy = -(logq.exp() * logq).sum(-1)
            return (logq.gather(-1, self.targets[:, None])[:, 0] + 0.01 * entropy).mean()
        with torch.no_grad():
            logp = product(self.teacher_hidden, self.teacher_weight).log_softmax(-1)
        return (logq.exp() * (logq - logp)).sum(-1).mean()

    def step(self, way: Callable[[], Tensor]) -> list[Tensor]:
        """Loss and gradients of one forward and backward pass."""
        self.hidden.grad = self.weight.grad = None
        loss = way()
        loss.backward()
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return [loss.detach(), self.hidden.grad, self.weight.grad]


def peak_bytes(case: Case, way: Callable[[], Tensor]) -> int:
    """Of tensors alive at once above inputs and weight gradients."""
    case.hidden.grad = case.weight.grad = None
    if case.device == "cpu":
        with Recorded() as seen:
            gradient = case.step(way)[2]
        return seen.peak_above(gradient)
    synchronize()
    before = torch.cuda.memory_allocated()
    machine.reset_peak(case.device)
    case.step(way)
    return torch.cuda.max_memory_allocated() - before - 4 * case.weight.numel()


def resident_bytes(case: Case, way: Callable[[], Tensor]) -> int | None:
    """How far the resident memory of the process rises, weight gradient included; None on a GPU."""
    if case.device != "cpu":
        return None
    case.hidden.grad = case.weight.grad = None
    gc.collect()
    machine.reset_peak("cpu")
    before = machine.peak_bytes("cpu")
    case.step(way)
    after = machine.peak_bytes("cpu")
    return None if before is None or after is None else after - before


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One comparison: alternating runs, peaks of single ones, and how far the results lie apart."""
    ways = {"kdrl": case.kdrl, "full": case.full}
    if case.dtype != torch.float32:
        ways["rounded"] = case.rounded
    results = {name: [x.float() for x in case.step(way)] for name, way in ways.items()}
    apart = [
        float((one - other).norm() / other.norm()) for one, other in zip(results["kdrl"], results["full"], strict=True)
    ]
    del results
    peaks = {name: peak_bytes(case, way) for name, way in ways.items()}
    resident = {name: resident_bytes(case, way) for name, way in ways.items()}
    seconds = in_turns({name: lambda way=way: case.step(way) for name, way in ways.items()}, repeats, warm=0)
    return {
        "loss": case.loss,
        "dtype": str(case.dtype).removeprefix("torch."),
        "vocabulary": case.vocabulary,
        "tokens": case.tokens,
        "time_ratio": ratios(seconds["kdrl"], seconds["full"]),
        "peak_ratio": round(peaks["kdrl"] / peaks["full"], 4),
        "seconds": {name: summary(found) for name, found in seconds.items()},
        "peak_mib": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        "resident_mib": {name: value if value is None else round(value / 2**20, 1) for name, value in resident.items()},
        "relative_difference": dict(zip(("loss", "hidden_gradient", "weight_gradient"), apart, strict=True)),
    }


def main() -> None:
    """Measure and write, after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="1024 on a CPU, 4096 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabularies", default=",".join(map(str, VOCABULARIES)))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = options.tokens or (4096 if options.device == "cuda" else 1024)
    rows: list[dict[str, Any]] = []
    command = " ".join(["python", "benchmarks/head.py", *sys.argv[1:]])
    result = {"command": command, **machine.machine(), "seed": SEED, "width": WIDTH, "rows": rows}
    for vocabulary in map(int, options.vocabularies.split(",")):
        for dtype in options.dtypes.split(","):
            for loss in ("reverse_kl", "sampled"):
                case = Case(loss, vocabulary, tokens, getattr(torch, dtype), options.device)
                rows.append(measure(case, options.repeats))
                print(rows[-1], flush=True)
                machine.write_results(options.json, result)


if __name__ == "__main__":
    main()
