"""KDRL from a teacher of another tokenizer: SmolLM2-135M (49k BPE) teaches a small model with a 4k byte-level BPE.

    make smollm && python benchmarks/cross_tokenizer.py [--seeds 0 1 2] [--steps 60]

Sums of 3 to 4 one-digit numbers, checked by their verifier. The tokenizer is trained here (on this repository's texts
and the task's), the teacher is recipes/smollm-teacher.yaml, the student starts from a short SFT. Then, from that one
student: GRPO alone, the chunk signal alone, and both (kdrl-chunk), at equal prompts, responses and steps. Weights and
rates are the demo's, chosen there for a teacher with the student's tokenizer. Writes
benchmarks/results/cross-tokenizer.json; finished runs under runs/cross-tokenizer are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import reasoning_gym
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdrl.bench.machine import machine, write_results

OUT = Path("runs/cross-tokenizer")
RESULT = Path("benchmarks/results/cross-tokenizer.json")
TASK: dict[str, Any] = {
    "name": "reasoning_gym",
    "dataset": "chain_sum",
    "settings": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    "solution": "chain_sum_spoken",
    "extract": "last_number",
}
SHAPE = {"architecture": "qwen3", "hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32}
LOG = {"progress": "off", "gradients_every": 10}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "optimizer": {"lr": 2.0e-5}},
    "chunk_kl": {"method": "kdrl-chunk", "optimizer": {"lr": 1.5e-4}, "objective": [{"chunk_kl": {"weight": 1.0}}]},
    "kdrl-chunk": {
        "method": "kdrl-chunk",
        "optimizer": {"lr": 2.0e-4},
        "objective": [{"policy_gradient": {"advantage": "grpo", "weight": 0.3}}, {"chunk_kl": {"weight": 1.0}}],
    },
}


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 4,096 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [AddedToken(text, special=True) for text in ("<|end|>", "<|pad|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md"))]
    texts += [item["question"] for item in reasoning_gym.create_dataset("chain_sum", size=2000, seed=1)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)


def train(name: str, recipe: dict[str, Any]) -> Path:
    """`kdrl train` of a recipe given as JSON, in a process of its own, unless it is finished; its run folder."""
    out = OUT / name
    if not (out / "report.html").exists():
        subprocess.run(["rm", "-rf", str(out)], check=True)
        path = OUT / f"{name}.yaml"
        path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        command = [sys.executable, "-m", "kdrl", "train", str(path), "--output", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return out


def student(steps: int) -> Path:
    """The student before distillation."""
    recipe = {
        "method": "sft",
        "steps": steps,
        "student": {"model": {**SHAPE, "intermediate_size": 352, "max_positions": 512}, "tokenizer": str(OUT / "bpe")},
        "task": TASK,
        "rollout": {"prompts": 48, "max_new_tokens": 48},
        "optimizer": {"lr": 1.5e-3, "warmup": 10},
        "evaluate": {"every": 100, "problems": 128, "final_problems": 0},
        "checkpoint": {"every": 0},
        "log": LOG,
    }
    return train("student", recipe) / "final"


def arm(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One run from the student; its held-out accuracy and what its last rows say of the vocabularies."""
    recipe = {
        **ARMS[name],
        "seed": seed,
        "steps": steps,
        "student": {"model": str(OUT / "student" / "final")},
        "task": TASK,
        "rollout": {"prompts": 8, "group": 4, "max_new_tokens": 48},
        "evaluate": {"every": 0, "final_problems": 512, "baselines": name == "chunk_kl" and seed == 0},
        "checkpoint": {"every": 0},
        "log": LOG,
    }
    if name != "grpo":
        recipe["teacher"] = {"model": str(OUT / "teacher" / "final"), "autocast": "bfloat16"}
    out = train(f"{name}-seed{seed}", recipe)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held = json.loads((out / "evaluation.json").read_text())
    found: dict[str, Any] = {which: part["metrics"]["accuracy"] for which, part in held.items() if part}
    for key in sorted(rows[-1]):
        if key.startswith("vocabulary/") or key in ("kl_teacher", "kd_norm", "rl_norm"):
            numbers = [row[key] for row in rows if row.get(key) is not None]
            if numbers:
                found[key] = statistics.mean(numbers)
    for phase in ("time/rollout", "time/teacher", "time/update"):
        found[phase] = statistics.median(row[phase] for row in rows)
    print(json.dumps({"arm": name, "seed": seed, **found}), flush=True)
    return found


def main() -> None:
    """All arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sft-steps", type=int, default=300)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if not (OUT / "bpe").exists():
        make_tokenizer(OUT / "bpe")
    if not (OUT / "teacher" / "final").exists():
        command = [sys.executable, "-m", "kdrl", "train", "recipes/smollm-teacher.yaml", "evaluate.every=0"]
        subprocess.run([*command, "--output", str(OUT / "teacher")], check=True)
    student(options.sft_steps)
    found = {f"{name}-seed{seed}": arm(name, seed, options.steps) for seed in options.seeds for name in ARMS}
    write_results(RESULT, {**machine(), "command": "python " + " ".join(sys.argv), "runs": found})


if __name__ == "__main__":
    main()
