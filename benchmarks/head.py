"""Time and peak memory of kdrl's head with a loss, against the same from full logits, in one run, alternating.

    python benchmarks/head.py [--tokens 1024] [--repeats 5] [--threads 1] [--device cpu] [--vocabularies 1000,4000]

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
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl.bench.allocations import Allocations
from kdrl.objectives.distill import DistillConfig, distribution_loss
from kdrl.objectives.head import Head, chunks, score_tokens
from kdrl.teachers.base import Evidence, Given

RESULT = Path(__file__).parent / "results" / "head.json"
WIDTH = 512
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
        random = torch.Generator().manual_seed(0)

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


def seconds(case: Case, way: Callable[[], Tensor]) -> float:
    """Of one step."""
    if case.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    case.step(way)
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(case: Case, way: Callable[[], Tensor]) -> int:
    """Of tensors alive at once above inputs and weight gradients."""
    gradients = {case.weight.numel() * 4, case.weight.numel() * case.weight.element_size()}
    case.hidden.grad = case.weight.grad = None
    if case.device == "cuda":
        case.step(way)
        torch.cuda.synchronize()
        case.hidden.grad = case.weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.step(way)
        return torch.cuda.max_memory_allocated() - before - max(gradients)
    with Allocations(beside=gradients) as seen:
        case.step(way)
    return seen.peak


def resident_bytes(case: Case, way: Callable[[], Tensor]) -> int | None:
    """How far the resident memory of the process rises, weight gradient included; Linux on the CPU alone."""
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if case.device != "cpu" or not marks.exists():
        return None
    case.hidden.grad = case.weight.grad = None
    gc.collect()

    def read(name: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(name))

    before = read("VmRSS")
    marks.write_text("5")
    case.step(way)
    return read("VmHWM") - before


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One comparison: medians of alternating runs, peaks of single ones, and how far the results lie apart."""
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
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in sorted(ways, reverse=bool(turn % 2)):
            times[name].append(seconds(case, ways[name]))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "loss": case.loss,
        "dtype": str(case.dtype).removeprefix("torch."),
        "vocabulary": case.vocabulary,
        "tokens": case.tokens,
        "chunk_tokens": max(part.stop - part.start for part in chunks(case.tokens, case.vocabulary)),
        "time_ratio": round(medians["kdrl"] / medians["full"], 3),
        "time_ratio_of_each_turn": [round(a / b, 3) for a, b in zip(times["kdrl"], times["full"], strict=True)],
        "peak_ratio": round(peaks["kdrl"] / peaks["full"], 4),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "peak_mib": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        "resident_mib": {name: value and round(value / 2**20, 1) for name, value in resident.items()},
        "relative_difference": dict(zip(("loss", "hidden_gradient", "weight_gradient"), apart, strict=True)),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabularies", default=",".join(map(str, VOCABULARIES)))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = options.tokens or (4096 if options.device == "cuda" else 1024)
    machine = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        machine = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    rows: list[dict[str, Any]] = []
    result = {
        "command": " ".join(["python", "benchmarks/head.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else machine.split(":")[-1].strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "width": WIDTH,
        "repeats": options.repeats,
        "rows": rows,
    }
    for vocabulary in map(int, options.vocabularies.split(",")):
        for dtype in options.dtypes.split(","):
            for loss in ("reverse_kl", "sampled"):
                rows.append(
                    measure(Case(loss, vocabulary, tokens, getattr(torch, dtype), options.device), options.repeats)
                )
                print(json.dumps(rows[-1]), flush=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
