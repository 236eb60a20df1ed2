"""Many methods on the demo task at equal rollouts and steps: one student, one teacher, 16 x 8 responses a step.

python benchmarks/method_table.py          # seeds 0, 1, 2 of every method, 150 steps; names may follow to do some
Two processes of one thread each. Writes benchmarks/results/method-table.json and .md. Rates are the demo's, chosen on
the development split for three arms (benchmarks/tune_demo.py) and shared by family, not tuned per method: opd's for
what distils, grpo's for what is led by rewards, kdrl's for itself. Methods that read fixed text read the teacher's
(written once, stored), so that all know the same; `sft` on the task's own worked solutions is the exception.
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
RATES = {"kd": "1.5e-4", "rl": "2e-5", "joint": "2e-4"}

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
    "kdrl": ("joint", ["objective.distill.weight=1.0", "objective.policy_gradient.weight=0.3"]),
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
    held = out / "evaluation.json"
    if held.exists():
        final = json.loads(held.read_text())["final"]["metrics"]
        found |= {"accuracy": final["accuracy"], "tokens": final["tokens"]}
    print(json.dumps({"method": method, "rate": rate, "seed": seed} | found), flush=True)
    return found


def run(names: list[str]) -> None:
    """Three seeds of each method; what is finished under runs/method-table is kept."""
    jobs = [(name, seed) for seed in (0, 1, 2) for name in names]
    more = ["evaluate.every=0", "evaluate.final_problems=512", "evaluate.baselines=false"]
    watched = ["evaluate.every=25"]  # a replay share that follows the development loss must see it

    def one(job: tuple[str, int]) -> dict[str, float]:
        name, seed = job
        extra = more + (watched if name == "distillm" else [])
        return train(name, RATES[METHODS[name][0]], seed, 150, OUT / f"{name}-seed{seed}", extra)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(one, jobs))
    path = RESULTS / "method-table.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    for (name, seed), found in zip(jobs, done, strict=True):
        runs.setdefault(name, {})[str(seed)] = found
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
        rate = RATES[METHODS[name][0]]
        lines.append(
            f"| `{name}` | {rate} | {100 * mean(name, 'accuracy'):.1f} ± {100 * spread:.1f} | "
            f"{mean(name, 'tokens'):.1f} | {mean(name, 'written') / 1000:.0f}k | {mean(name, 'seconds'):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """All methods, or those named."""
    names = sys.argv[1:] or list(METHODS)
    if unknown := [n for n in names if n not in METHODS]:
        raise SystemExit(f"not in the table: {', '.join(unknown)}")
    run(names)


if __name__ == "__main__":
    main()
