"""Many methods on the demo task at equal rollouts and steps: one student, one teacher, 16 x 8 responses a step.

python benchmarks/method_table.py tune     # rates on the development split, seed 100, 100 steps: two for each method
python benchmarks/method_table.py run      # seeds 0, 1, 2 at the chosen rates, 150 steps, held-out evaluation
Two processes of one thread each. Writes benchmarks/results/method-table-{tuning.json,runs.json,.md}. Names may follow.
 Methods that read fixed text read the teacher's (written once, stored), so that all know the same; `sft` on
the task's own worked solutions is the exception and the ceiling. Held-out problems are never looked at by `tune`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OUT = Path("runs/method-table")
RESULTS = Path("benchmarks/results")
EQUAL = ["rollout.prompts=16", "rollout.group=8", "rollout.max_new_tokens=48", "deviations={}"]
TEXT = ["source=teacher", "objective.distill.on=[teacher]"]
SOLVED = "task.solution=chain_sum"
RATES = {"kd": ("1.5e-4", "4e-4"), "rl": ("2e-5", "5e-5")}

# Family of rates, and what must differ from the published recipe for equal work on this task.
METHODS: dict[str, tuple[str, list[str]]] = {
    "grpo": ("rl", []),
    "luffy": ("rl", ["objective.policy_gradient.reduce={constant: 48}", "objective.entropy.reduce={constant: 48}"]),
    "sft": ("kd", ["source=gold", SOLVED, "rollout.prompts=128", "rollout.group=1"]),
    "seqkd": ("kd", []),
    "kd": ("kd", ["source=teacher", "objective.distill.on=[teacher]", "objective.cross_entropy.on=[teacher]"]),
    "taid": ("kd", TEXT),
    "akl": ("kd", TEXT),
    "abkd": ("kd", [*TEXT, "objective.cross_entropy.on=[teacher]"]),
    "csd": ("kd", TEXT),
    "adakd": ("kd", TEXT),
    "gkd": ("kd", ["source={mixture: {share: 0.5, other: teacher}}"]),
    "distillm": ("kd", ["source.buffer.other=teacher", "objective.distill.on=[student, buffer, teacher]", SOLVED]),
    "distillm-2": ("kd", ["rollout.temperature=1.0"]),
    "skd": ("kd", ["source={speculative: 3}"]),
    "minillm": ("kd", ["optimizer.epochs=1"]),
    "opd": ("kd", []),
    "opd-exact": ("kd", []),
    "eopd": ("kd", []),
    "kdrl": ("kd", ["objective.distill.weight=1.0", "objective.policy_gradient.weight=0.3"]),
}


def train(method: str, rate: str, seed: int, steps: int, out: Path, more: list[str]) -> dict[str, float]:
    """One run; returns the numbers of its last step and of its held-out evaluation, where there is one."""
    if not (out / "report.html").exists():
        command = [sys.executable, "-m", "kdrl", "train", "recipes/demo.yaml", f"method={method}", f"steps={steps}"]
        command += [f"seed={seed}", f"optimizer.lr={rate}", "checkpoint.every=0", "log.progress=off", *EQUAL]
        subprocess.run(["rm", "-rf", str(out)], check=True)
        done = subprocess.run(
            [*command, *METHODS[method][1], *more, "--output", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{method}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {"responses": rows[-1]["responses"], "seconds": sum(row["time/step"] for row in rows)}
    found["written"] = sum(row["tokens"] * row["batch_responses"] for row in rows)
    found["development"] = max((row["eval/accuracy"] for row in rows[-1:] if "eval/accuracy" in row), default=None)
    held = out / "evaluation.json"
    if held.exists():
        final = json.loads(held.read_text())["final"]["metrics"]
        found |= {"accuracy": final["accuracy"], "tokens": final["tokens"]}
    print(json.dumps({"method": method, "rate": rate, "seed": seed} | found), flush=True)
    return found


def tune(names: list[str]) -> None:
    """The better of two rates per method by development accuracy after 100 steps."""
    jobs = [(name, rate) for name in names for rate in RATES[METHODS[name][0]]]
    more = ["evaluate.every=25", "evaluate.problems=512", "evaluate.final_problems=0"]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda j: train(j[0], j[1], 100, 100, OUT / "tune" / f"{j[0]}-{j[1]}", more), jobs))
    path = RESULTS / "method-table-tuning.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for (name, rate), found in zip(jobs, done, strict=True):
        table.setdefault(name, {})[rate] = found["development"]
    path.write_text(json.dumps(table, indent=1) + "\n")


def run(names: list[str]) -> None:
    """Three seeds of each method at its best rate."""
    tuned = json.loads((RESULTS / "method-table-tuning.json").read_text())
    best = {name: max(tuned[name], key=tuned[name].get) for name in names}
    jobs = [(name, seed) for seed in (0, 1, 2) for name in names]
    more = ["evaluate.every=0", "evaluate.final_problems=512", "evaluate.baselines=false"]
    rest = ["evaluate.every=25"]  # a replay share that follows the development loss must see it

    def one(job: tuple[str, int]) -> dict[str, float]:
        name, seed = job
        extra = more + (rest if name == "distillm" else [])
        return train(name, best[name], seed, 150, OUT / f"{name}-seed{seed}", extra)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(one, jobs))
    path = RESULTS / "method-table-runs.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    for (name, seed), found in zip(jobs, done, strict=True):
        runs.setdefault(name, {})[str(seed)] = found | {"rate": best[name]}
    path.write_text(json.dumps(runs, indent=1) + "\n")
    (RESULTS / "method-table.md").write_text(written(runs))


def written(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table, best first: mean and standard deviation over seeds."""
    lines = [
        "| method | rate | accuracy | tokens a response | tokens written in training | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def mean(name: str, key: str) -> float:
        return statistics.mean(r[key] for r in runs[name].values())

    for name in sorted(runs, key=lambda n: -mean(n, "accuracy")):
        spread = statistics.stdev(r["accuracy"] for r in runs[name].values()) if len(runs[name]) > 1 else 0.0
        rate = next(iter(runs[name].values()))["rate"]
        lines.append(
            f"| `{name}` | {rate} | {100 * mean(name, 'accuracy'):.1f} ± {100 * spread:.1f} | "
            f"{mean(name, 'tokens'):.1f} | {mean(name, 'written') / 1000:.0f}k | {mean(name, 'seconds'):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """`tune` or `run`, for all methods or those named."""
    what, *names = sys.argv[1:] or [""]
    if what not in ("tune", "run") or (unknown := [n for n in names if n not in METHODS]):
        raise SystemExit(__doc__ if what not in ("tune", "run") else f"not in the table: {', '.join(unknown)}")
    {"tune": tune, "run": run}[what](names or list(METHODS))


if __name__ == "__main__":
    main()
