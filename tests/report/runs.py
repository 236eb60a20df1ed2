"""Run directories of invented numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from kdrl.results import EvaluationResult, Record, Response


def evaluation(
    model: str, accuracy: float, *, problems: int = 60, seed: int = 0, prefix: str = "p"
) -> EvaluationResult:
    rng = random.Random(f"{model}{seed}")
    records = []
    for i in range(problems):
        right = rng.random() < accuracy
        tokens = rng.randint(15, 40)
        text = f"4+{i}=<b>{4 + i}</b>"
        answer = Response(text, tokens, right, tokens > 38, str(i) if right else "0", float(right))
        records.append(Record(f"{prefix}{i}", f"4 + {i} =", (answer,)))
    return EvaluationResult.from_records(records, model=model)


def rows(steps: int, *, seed: int = 0, top: float = 0.5, every: int = 10) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    out = []
    for step in range(1, steps + 1):
        t = step / steps
        reward = 0.25 + (top - 0.25) * t + 0.06 * rng.gauss(0, 1)
        row: dict[str, Any] = {"step": step, "reward": reward, "accuracy": reward, "loss": 0.5 - 0.2 * t, "lr": 5e-4}
        row |= {"entropy": 0.6 * math.exp(-t), "tokens": 30 - 4 * t, "truncated": 0.05 * (1 - t), "grad_norm": 1.2}
        row |= {"log_ratio_mean": -0.4 + 0.3 * t, "log_ratio_beyond_clamp": 0.02, "kl_teacher": 0.4 - 0.3 * t}
        row |= {"masked_share": 0.3 * t, "zero_advantage_share": 0.4, "teacher_calls": 90 * step}
        row |= {
            "teacher_calls_saved": 38 * step,
            "weight/distill": 1 - t,
            "loss/distill": 0.3,
            "loss/policy_gradient": 0.1,
        }
        row |= {
            "time/rollout": 0.3,
            "time/update": 0.4,
            "time/step": 0.75,
            "tokens_per_second": 8000 + 900 * rng.random(),
        }
        row |= {"verifier/timeout": 0, "responses": 128 * step}
        if step % 10 == 0:
            row |= {"kd_rl_norm_ratio": 3 - t, "kd_rl_cosine": 0.2 * t}
        if step % every == 0:
            row |= {"eval/accuracy": 0.28 + (top - 0.28) * t + 0.02 * rng.gauss(0, 1), "eval/tokens": 29 - t}
        out.append(row)
    return out


def write_run(
    folder: Path, *, method: str = "kdrl", seed: int = 1, steps: int = 40, final: float | None = 0.5, **more: Any
) -> Path:
    folder.mkdir(parents=True)
    recipe = {"method": method, "seed": seed, "steps": steps, "student": {"model": "models/student"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {"kdrl": "0.1.0", "python": "3.12.1", "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = rows(steps, seed=seed, top=final or 0.4, **more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    sample = {"prompt": "4+5-3=", "response": "4+5=9;9-3=6#6 <script>alert(1)</script>", "reward": 1.0, "correct": True}
    rollouts = [{"step": step, **sample, "tokens": 14} for step in range(1, steps, 10) for _ in range(2)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    if final is not None:
        results = {
            "final": evaluation(f"{folder.name}/final", final, seed=seed).to_dict(),
            "teacher": evaluation("models/teacher", 0.75).to_dict(),
            "start": evaluation("models/student", 0.3).to_dict(),
        }
        (folder / "evaluation.json").write_text(json.dumps(results))
    return folder
