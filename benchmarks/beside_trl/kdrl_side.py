"""kdrl's side: its own training loop, with verifier processes and metrics."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common import SEED, settle

from beside_trl.job import LEARNING_RATE, Block, Job
from kdrl.bench.steps import run_steps
from kdrl.build import Builder
from kdrl.models import encode_prompt
from kdrl.recipe import load_recipe

METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo"},
    "opd": {"method": "opd"},
    "opd with support full": {
        "method": "opd",
        "objective": [{"distill": {"divergence": "reverse_kl", "support": "full"}}],
    },
}


def kdrl_block(folder: Path, job: Job, method: str, warm: int, steps: int) -> Block:
    """Steps of kdrl."""
    before, prompts = settle(), list[int]()

    def prepare(builder: Builder) -> None:
        builder.student.eos_ids = (-1,)  # no token ends a response
        prompts.append(sum(len(encode_prompt(builder.student, text)) for text in job.texts()))

    found = run_steps(load_recipe(_recipe(folder, job, method, warm + steps)), steps, warm=warm, prepare=prepare)
    names = ("rollout", "verify", "teacher", "update")
    phases = {name: found.phase(name) for name in names}
    peak = None if before is None or found.peak_bytes is None else found.peak_bytes - before
    flat = statistics.mean(row["zero_advantage_share"] for row in found.rows)
    return Block(found.seconds, set(found.tokens), set(prompts), phases, peak, flat)


def _recipe(folder: Path, job: Job, method: str, steps: int) -> dict[str, Any]:
    student: dict[str, Any] = {"model": str(folder / "student"), "chat_template": "none"}
    teacher: dict[str, Any] = {"model": str(folder / "teacher"), "chat_template": "none"}
    if job.best:
        student["autocast"], teacher["dtype"] = "bfloat16", "bfloat16"
    return {
        **METHODS[method],
        **({} if method == "grpo" else {"teacher": teacher}),
        "steps": steps,
        "seed": SEED,
        "device": "cpu",
        "student": student,
        "task": {
            "path": str(folder / "prompts.jsonl"),
            "verifier": {"name": "regex", "settings": {"pattern": job.reward}},
        },
        "rollout": {"prompts": job.prompts, "group": job.completions, "max_new_tokens": job.new_tokens},
        "optimizer": {"lr": LEARNING_RATE, "clip": 1.0},
        "evaluate": {"baselines": False},
    }
