"""Write a JSONL file of problems, `{"prompt": ..., "answer": ...}` a line, as `task.path` reads it.

    python examples/make_jsonl.py data.jsonl [--task chain_sum] [--size 2000] [--seed 0] [--settings '{"max_terms": 4}']

Sums of 2 to 4 terms of at most two digits unless told otherwise. No prompt is written twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import reasoning_gym

SUMS = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}


def write_problems(path: Path, task: str, size: int, seed: int, settings: Mapping[str, Any]) -> int:
    """Write `size` drawn problems, less those whose prompt came before; returns how many lines there are."""
    answers = {
        item["question"]: item["answer"]
        for item in reasoning_gym.create_dataset(task, seed=seed, size=size, **settings)
    }
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in answers.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--task", default="chain_sum")
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, help="reasoning-gym settings as JSON")
    options = parser.parse_args()
    settings = options.settings or (SUMS if options.task == "chain_sum" else {})
    print(
        f"{write_problems(options.path, options.task, options.size, options.seed, settings)} problems: {options.path}"
    )


if __name__ == "__main__":
    main()
