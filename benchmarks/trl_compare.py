"""Seconds a step of kdrl's `grpo` and `opd` and of TRL's trainers, in one run, in turns, on equal work.

    python benchmarks/trl_compare.py [--budget 1800] [--threads 2] [--only "1M, "] [--quick]

Equal: weights, tokenizer, prompts (their token counts are asserted), completions of exactly so many tokens (no token
ends one; asserted on both sides in every step), whole vocabulary at temperature 1, AdamW at a learning rate that
changes next to nothing, clipping at 1, one update per batch, no reference model, the same verifier, whose pattern about
half of the completions hold (kdrl leaves groups of equal rewards out of the update; `equal_rewards` is their share).
`float32`: all of it. `each at its best`: TRL has bf16=True (a teacher in bfloat16 makes it no faster), kdrl
student.autocast=bfloat16 and a bfloat16 teacher; both keep float32 weights of the student. A block is a trainer that is
made, runs `--warm` steps that are not counted and `--steps` that are; blocks take turns. A step's time is from the end
of one step to the end of the next, so data, verifying, logging and metrics are in it. Phases: seconds of each, and the
step's written tokens a second of it; TRL's are `generation`, its own method that writes, and the rest. Peak memory: how
far the process rose while a block trained above what was resident before its models were loaded (Linux alone tells;
kdrl's verifier processes are not in it). A block of each side with next to no work goes first, so that libraries are
in neither. `DistillationTrainer` and
`GKDTrainer` compare whole distributions, and so does `opd with support full`; `opd` compares the sampled token, as its
source does.

Needs trl, which is no part of kdrl: `pip install -e '.[bench]'`, best in an environment of its own. Writes
benchmarks/results/trl_compare.json after every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beside_trl.job import Block, Job, by_phase
from beside_trl.kdrl_side import kdrl_block
from beside_trl.trl_side import TRAINERS, trl_block
from common import begin, chosen, make_folder, mib, parser, save, shares, sized, smollm, times

from kdrl.bench.turns import ratios, summary, turns

# size, prompts x completions x new tokens, prompt lengths; larger models write less, so that all fits in minutes.
_WORK = {"1M": (16, 8, 64, (8, 15)), "5M": (8, 8, 64, (8, 15)), "20M": (4, 8, 64, (8, 15))}
_TEACHERS = {"1M": "5M", "5M": "5M", "20M": "20M"}
JOBS = [
    Job(size, vocabulary, best, *_WORK[size]) for size in _WORK for vocabulary in (55, 4096) for best in (False, True)
]
JOBS += [Job("SmolLM2-135M", 49152, best, 4, 8, 32, (60, 66)) for best in (True, False)]
# Which of kdrl's methods stand against which trainer.
GROUPS = {
    "GRPOTrainer": ("grpo",),
    "DistillationTrainer": ("opd with support full", "opd"),
    "GKDTrainer": ("opd with support full", "opd"),
}


def make_models(job: Job, folder: Path) -> bool:
    """Student and teacher as folders; False where SmolLM2 is not there. Its teacher has its own weights."""
    if job.size == "SmolLM2-135M":
        config = smollm(dtype="float32")
        configs = (config, config)
    else:
        configs = (sized(job.size, job.vocabulary), sized(_TEACHERS[job.size], job.vocabulary))
    for name, config in zip(("student", "teacher"), configs, strict=True):
        if config is None:
            return False
        make_folder(config, folder / name)
    job.write_texts(folder)
    return True


def sides_of(job: Job, folder: Path, trainers: Sequence[str], warm: int, steps: int) -> dict[str, Callable[[], Block]]:
    """A call that runs a block, for each trainer and for kdrl's methods beside it."""
    sides: dict[str, Callable[[], Block]] = {}
    for trainer in trainers:
        sides[trainer] = lambda trainer=trainer: trl_block(folder, job, trainer, warm, steps)
        for method in GROUPS[trainer]:
            sides[method] = lambda method=method: kdrl_block(folder, job, method, warm, steps)
    return sides


def wake(trainers: Sequence[str]) -> None:
    """Have both sides load their libraries."""
    job = Job("1M", 55, True, 2, 2, 4, (8, 9))
    with tempfile.TemporaryDirectory() as folder:
        make_models(job, Path(folder))
        for side in sides_of(job, Path(folder), trainers, 1, 1).values():
            side()


def measure(job: Job, folder: Path, options: argparse.Namespace, budget_s: float) -> list[dict[str, Any]]:
    """Blocks of all sides in turns; each of kdrl's methods against the trainers that it stands beside."""
    sides = sides_of(job, folder, options.trainers, options.warm, options.steps)
    found: dict[str, list[Block]] = {side: [] for side in sides}
    for turn, side in turns(list(sides), options.rounds, budget_s):
        block = sides[side]()
        assert block.tokens == {job.tokens}, (side, block.tokens, job.tokens)
        found[side].append(block)
        peak = "" if block.peak_bytes is None else f", {mib(block.peak_bytes):,.0f} MiB"
        print(f"  round {turn + 1}, {side}: {statistics.median(block.seconds):.3f} s a step{peak}", flush=True)
    lengths = {side: blocks[0].prompt_tokens for side, blocks in found.items()}
    assert len({tuple(each) for each in lengths.values()}) == 1, lengths
    return [
        compared(job, method, found[method], trainer, found[trainer]) | {"steps": options.steps, "warm": options.warm}
        for trainer in options.trainers
        for method in GROUPS[trainer]
    ]


def compared(job: Job, method: str, mine: list[Block], trainer: str, theirs: list[Block]) -> dict[str, Any]:
    """Medians over all steps, and the ratio of each round's medians."""
    medians = [[statistics.median(block.seconds) for block in blocks] for blocks in (mine, theirs)]
    result = {
        "case": f"{method} against {trainer}, {job.name}",
        "tokens_a_step": job.tokens,
        "prompt_tokens_a_step": next(iter(mine[0].prompt_tokens)),
        "rounds": len(mine),
        "kdrl_s": summary([s for block in mine for s in block.seconds]),
        "trl_s": summary([s for block in theirs for s in block.seconds]),
        "kdrl_over_trl": ratios(*medians),
        "times_faster": ratios(medians[1], medians[0]),
        "equal_rewards": round(statistics.mean(block.equal_rewards for block in mine), 3),
        "kdrl_phases": by_phase(mine, job.tokens, "other"),
        "trl_phases": by_phase(theirs, job.tokens, "rest"),
        **peaks(mine, theirs),
    }
    over = result["kdrl_peak_over_trl"]
    memory = "" if over is None else f", {times(over)} of the peak memory"
    print(f"{result['case']}: {times(result['times_faster'])} times faster{memory}", flush=True)
    return result


def peaks(mine: list[Block], theirs: list[Block]) -> dict[str, Any]:
    """Medians of the blocks' peaks, and the ratio of each round's; None where the system does not tell."""
    sizes = [[block.peak_bytes for block in blocks if block.peak_bytes] for blocks in (mine, theirs)]
    if any(len(each) < len(mine) for each in sizes):
        return dict.fromkeys(("kdrl_peak_mib", "trl_peak_mib", "kdrl_peak_over_trl"))
    kdrl, trl = (summary([mib(size) for size in each]) for each in sizes)
    return {"kdrl_peak_mib": kdrl, "trl_peak_mib": trl, "kdrl_peak_over_trl": ratios(*sizes)}


def main() -> None:
    """Measure, print a line for each comparison and write the JSON."""
    made = parser(__doc__, "trl_compare.json")
    made.add_argument("--rounds", type=int, default=3, help="blocks of each side, fewer where the budget is spent")
    made.add_argument("--steps", type=int, default=3, help="counted steps of a block")
    made.add_argument("--warm", type=int, default=1, help="steps of a block that are not counted")
    made.add_argument("--trainers", default=",".join(TRAINERS), help="of TRL, with commas")
    made.set_defaults(budget=1800.0)
    options = made.parse_args()
    options.trainers = options.trainers.split(",")
    if unknown := set(options.trainers) - set(TRAINERS):
        made.error(f"--trainers: {', '.join(sorted(unknown))} is none of {', '.join(TRAINERS)}")
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed; this comparison needs it: pip install -e '.[bench]' (best in its own venv)")
    if options.warm < 1 or options.steps < 1:
        made.error("--warm and --steps must be at least 1")
    if options.quick:
        options.rounds, options.steps = 1, 1
    begin(options)
    jobs, results = {job.name: job for job in JOBS}, []
    wake(options.trainers)
    for name, budget_s in shares(chosen(list(jobs), options, quick=1), options):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if make_models(jobs[name], Path(folder)):
                results += measure(jobs[name], Path(folder), options, budget_s)
                save(options, results)


if __name__ == "__main__":
    main()
