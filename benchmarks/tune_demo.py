"""Choose the demo's rates and weights per arm, six settings each, on the development split only.

python benchmarks/tune_demo.py            # about 20 minutes on two cores, two runs at a time
Writes benchmarks/results/demo-tuning.json. The held-out split is never looked at: evaluate.final_problems=0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PG, KD = "objective.policy_gradient.weight", "objective.distill.weight"
WRONG = "objective.distill.mask=wrong_response"
SEED = 100  # not one of the seeds that are reported


def falling(start: float, end: float) -> str:
    """A linear schedule as a recipe value."""
    return f"{{linear: {{from: {start}, to: {end}}}}}"


ARMS: dict[str, list[list[str]]] = {
    "grpo": [[f"optimizer.lr={lr}"] for lr in ("1e-5", "2e-5", "5e-5", "1e-4", "2e-4", "4e-4")],
    "opd": [[f"optimizer.lr={lr}"] for lr in ("1e-4", "1.5e-4", "2e-4", "2.5e-4", "3e-4", "5e-4")],
    "kdrl": [
        [f"optimizer.lr={lr}", f"{PG}={pg}", f"{KD}=1.0"]
        for lr, pg in (("1e-4", 1.0), ("1e-4", 0.3), ("1.5e-4", 0.3), ("2e-4", 1.0), ("2e-4", 0.3), ("3e-4", 0.3))
    ],
    "kdrl-annealed": [
        [f"optimizer.lr={lr}", f"{PG}={pg}", f"{KD}={falling(*ends)}", WRONG]
        for lr, pg, ends in (
            ("1e-4", 1.0, (1.5, 0.5)),
            ("1e-4", 1.0, (1.0, 0.1)),
            ("1e-4", 1.0, (2.0, 1.0)),
            ("2e-4", 1.0, (1.5, 0.5)),
            ("2e-4", 0.3, (1.5, 0.5)),
            ("3e-4", 0.3, (1.5, 0.5)),
        )
    ],
}


def run(arm: str, settings: list[str], folder: Path, steps: int) -> dict[str, object]:
    """Train one setting; returns its development accuracy after the last step."""
    out = folder / f"{arm}-{abs(hash(tuple(settings)))}"
    fixed = [f"steps={steps}", f"seed={SEED}", f"evaluate.every={steps}", "evaluate.problems=512"]
    fixed += ["evaluate.final_problems=0", "checkpoint.every=0", "log.progress=off"]
    command = [sys.executable, "-m", "kdrl", "train", "recipes/demo.yaml", f"method={arm}"]
    subprocess.run(
        [*command, *fixed, *settings, "--output", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    found = {"arm": arm, "settings": settings, "development": last["eval/accuracy"], "tokens": last["eval/tokens"]}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """All settings of all arms, or of those named, two at a time."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    arms = sys.argv[2].split(",") if len(sys.argv) > 2 else list(ARMS)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, arm, s, Path(folder), steps) for arm in arms for s in ARMS[arm]]
        results = [job.result() for job in jobs]
    path = Path("benchmarks/results/demo-tuning.json")
    path.write_text(json.dumps({"seed": SEED, "steps": steps, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
