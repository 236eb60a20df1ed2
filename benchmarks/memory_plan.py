"""The memory plan against the peaks that the kernel counts: each case a real run of two steps in its own process.

    python benchmarks/memory_plan.py [CASE ...] [--list]

Prints planned and measured megabytes of every phase and writes benchmarks/results/memory-plan.json; the worst
phase of a case is what the run needs, and that is to be within 15 %. Linux only (VmHWM, reset at every phase).
`--tensors` counts the bytes of live tensors in place of resident ones: what the formulas should say, without the heap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SMOLLM = HERE.parent / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 0.15
CHARACTERS = "0123456789+-*/=;#()., abcdefghijklmnopqrstuvwxyz"
JUDGE = "def judge(response, problem):\n    return sum(map(ord, response)) % 3 == 0\n"


def _model(width: int, layers: int, heads: int, vocabulary: int = 50, **more: Any) -> dict[str, Any]:
    wide = "".join(chr(0x10000 + i) for i in range(max(0, vocabulary - 50)))
    model = {
        "architecture": "qwen3",
        "hidden_size": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads // 2,
        "intermediate_size": 3 * width,
        "max_positions": 1024,
    }
    return {"model": model, "tokenizer": {"characters": CHARACTERS + wide}} | more


# With so many tokens few responses end early; a plan takes none to.
ONE = (128, 5, 4, 1024)
TWENTY = (512, 6, 8, 4096)
GGUF: dict[str, Any] = {"model": str(SMOLLM), "autocast": "bfloat16"}
TRAIN: dict[str, Any] = {"optimizer": {"micro_batch_tokens": 2048, "lr": 1.0e-4}}
SMALL: dict[str, Any] = {"optimizer": {"micro_batch_tokens": 1024, "lr": 1.0e-4}}
SHORT: dict[str, Any] = {"rollout": {"prompts": 2, "group": 4, "max_new_tokens": 48}}
LOW: dict[str, Any] = {"dtype": "bfloat16"}
WIDE: dict[str, Any] = {"rollout": {"prompts": 4, "group": 4, "max_new_tokens": 32}}

CASES: dict[str, dict[str, Any]] = {
    "demo, KDRL": {"demo": True},
    "1M, GRPO": {"method": "grpo", "student": _model(*ONE)} | TRAIN,
    "1M, GRPO, large micro-batch": {
        "method": "grpo",
        "student": _model(*ONE),
        "optimizer": {"micro_batch_tokens": 8192},
    },
    "1M, GRPO, autocast": {"method": "grpo", "student": _model(*ONE, autocast="bfloat16")} | TRAIN,
    "1M, KDRL": {"method": "kdrl", "student": _model(*ONE), "teacher": _model(*ONE)} | TRAIN,
    "20M, GRPO": {"method": "grpo", "student": _model(*TWENTY)} | TRAIN,
    "20M, GRPO, autocast": {"method": "grpo", "student": _model(*TWENTY, autocast="bfloat16")} | TRAIN,
    "20M, GRPO, bfloat16": {"method": "grpo", "student": _model(*TWENTY, dtype="bfloat16")} | TRAIN,
    "20M, GRPO, LoRA": {"method": "grpo", "student": _model(*TWENTY, lora={"rank": 8})} | TRAIN,
    "20M, GRPO, checkpointing": {"method": "grpo", "student": _model(*TWENTY, gradient_checkpointing=True)} | TRAIN,
    "20M, on-policy distillation": {"method": "opd", "student": _model(*TWENTY), "teacher": _model(*TWENTY)} | TRAIN,
    "20M, GKD": {"method": "gkd", "student": _model(*TWENTY), "teacher": _model(*TWENTY)} | TRAIN,
    "20M, KDRL, reference": {
        "objective": [{"policy_gradient": {}}, {"distill": {}}, {"reference_kl": {}}],
        "student": _model(*TWENTY),
        "teacher": _model(*TWENTY),
    }
    | TRAIN,
    "20M, on-policy distillation, LoRA": {
        "method": "opd",
        "student": _model(*TWENTY, lora={"rank": 8}),
        "teacher": _model(*TWENTY),
    }
    | TRAIN,
    "20M, GKD, bfloat16": {"method": "gkd", "student": _model(*TWENTY, **LOW), "teacher": _model(*TWENTY, **LOW)}
    | TRAIN,
    "20M, GRPO, minibatches, epochs": {
        "method": "grpo",
        "student": _model(*TWENTY),
        "optimizer": {"micro_batch_tokens": 1024, "minibatches": 2, "epochs": 2},
    },
    "20M, GRPO, long prompts": {"method": "grpo", "student": _model(*TWENTY), "prompt": 512} | TRAIN,
    "vocabulary of 152k, GRPO": {"method": "grpo", "student": _model(128, 2, 4, 151936)} | TRAIN | WIDE,
    "20M, long rollouts": {
        "method": "grpo",
        "student": _model(*TWENTY),
        "rollout": {"prompts": 16, "group": 8, "max_new_tokens": 96},
        "optimizer": {"micro_batch_tokens": 256},
        "steps": 1,
    },
    "135M, SFT": {"method": "sft", "student": GGUF, "rollout": {"prompts": 16, "max_new_tokens": 56}} | SMALL,
    "135M, KDRL": {"method": "kdrl", "student": GGUF, "teacher": GGUF} | SMALL | SHORT,
}


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    """A case as a recipe whose data and verifier lie in `folder`."""
    case = dict(CASES[name])
    common = {"steps": 2, "device": "cpu", "evaluate": {"final_problems": 0}, "checkpoint": {"every": 0}}
    common["log"] = {"progress": "off", "gradients_every": 0}
    if case.pop("demo", False):
        from kdrl.recipe import load_recipe, plain

        return plain(load_recipe(HERE.parent / "recipes" / "demo.yaml")) | common
    length = case.pop("prompt", 45)
    prompts = ["+".join(str((i * j) % 97) for j in range(1, 1 + length // 3)) for i in range(1, 65)]
    rows = [{"prompt": text.ljust(length, "="), "answer": "1", "solution": "1+2;" * 12} for text in prompts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)
    task = {"path": str(folder / "data.jsonl"), "verifier": {"name": f"{folder / 'judge.py'}:judge", "workers": 1}}
    # A chat template adds its own.
    task["max_prompt_tokens"] = 80 if case["student"] is GGUF else length
    return {"task": task, "rollout": {"prompts": 8, "group": 8, "max_new_tokens": 64}} | common | case


class Marks:
    """The most that was resident, or alive in tensors, between one mark and the next, by phase."""

    def __init__(self, tensors: Any) -> None:
        self.most: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.tensors, self.now = tensors, "start"

    def to(self, name: str) -> str:
        """End a phase and begin another; returns the one that ended."""
        if self.tensors is not None:
            found, self.tensors.peak = self.tensors.peak, self.tensors.live
        else:
            line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
            found = 1024 * int(line.split()[1])
            Path("/proc/self/clear_refs").write_text("5")
        self.first.setdefault(self.now, found)
        self.most[self.now] = max(self.most.get(self.now, 0), found)
        before, self.now = self.now, name
        return before


def instrument(marks: Marks) -> None:
    """Have a run's phases mark their begin and end."""
    from kdrl.metrics import Phases
    from kdrl.update import Updater

    of, step = Phases.of, Updater.step

    @contextmanager
    def marked(self: Phases, name: str) -> Any:
        before = marks.to("update" if name == "verify" else name)
        with of(self, name):
            yield
        marks.to(before)

    def stepping(*given: Any) -> Any:
        before = marks.to("optimizer step")
        done = step(*given)
        marks.to(before)
        return done

    Phases.of, Updater.step = marked, stepping  # type: ignore[method-assign, assignment]


def measure(name: str, tensors: bool) -> dict[str, Any]:
    """Plan and peaks of one case, in this process."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        from kdrl.bench.allocations import Allocations
        from kdrl.planning import memory_plan
        from kdrl.recipe import load_recipe
        from kdrl.run import train

        raw = recipe_of(name, Path(folder))
        planned = memory_plan(load_recipe(raw))
        marks = Marks(stack.enter_context(Allocations()) if tensors else None)
        instrument(marks)
        train(raw, output=Path(folder) / "run", say=lambda text: None)
        marks.to("end")
    totals = planned.to_dict()["totals"]
    items = {f"{item.phase}: {item.name}": item.bytes for item in planned.items}
    return {"planned": totals, "measured": marks.most, "first": marks.first, "items": items}


def outside(name: str, more: list[str]) -> dict[str, Any]:
    """The same in a fresh process, so that no case sees the heap of another."""
    command = [sys.executable, __file__, "--inside", name, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    planned, measured = max(found["planned"].values()), max(found["measured"][p] for p in found["planned"])
    return found | {"peak": {"planned": planned, "measured": measured, "error": planned / measured - 1.0}}


def show(name: str, found: dict[str, Any], write: Callable[[str], None] = print) -> None:
    """One line a case: the error of the peak, and planned/measured MB of each phase."""
    # Later rollouts find the heap as updates left it.
    measured = found["measured"] | {"rollout": found["first"]["rollout"]}
    parts = [f"{p} {v / 1e6:.0f}/{measured[p] / 1e6:.0f}" for p, v in found["planned"].items()]
    start = f"start {found['first']['start'] / 1e6:.0f}"
    write(f"{name:<34} {found['peak']['error']:+7.1%}  {', '.join(parts)}, {start}")


def main() -> None:
    """Measure the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases, or the beginnings of names")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    parser.add_argument("--tensors", action="store_true", help="count live tensors in place of resident memory")
    parser.add_argument("--items", action="store_true", help="print the plan's parts too")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(measure(given.inside, given.tensors)))
        return
    chosen = [n for n in CASES if not given.cases or any(n.startswith(c) for c in given.cases)]
    if given.list:
        print("\n".join(chosen))
        return
    results = {}
    for name in chosen:
        if str(SMOLLM) in str(CASES[name]) and not SMOLLM.exists():
            print(f"{name}: left out, {SMOLLM} is not there (make smollm)")
            continue
        results[name] = outside(name, ["--tensors"] if given.tensors else [])
        show(name, results[name])
        if given.items:
            print("\n".join(f"    {n:<40} {v / 1e6:9.1f}" for n, v in results[name]["items"].items()))
    if not given.cases and not given.tensors:
        from kdrl.environment import environment

        path = HERE / "results" / "memory-plan.json"
        path.write_text(json.dumps({"environment": environment(HERE), "cases": results}, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
