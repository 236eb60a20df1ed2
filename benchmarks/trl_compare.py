"""Seconds a step of kdrl's `grpo` and `opd` and of TRL's GRPOTrainer and DistillationTrainer, in one run, in turns.

    python benchmarks/trl_compare.py [--rounds 4] [--steps 5] [--threads 2] [--json FILE]

Equal work: the same random 1M Qwen3 student (and 5M teacher), 55 tokens of vocabulary, the same 16 prompts each step,
8 completions each, exactly 64 new tokens (no token ends a completion), whole vocabulary at temperature 1, float32,
AdamW at a learning rate that changes next to nothing, clipping at 1, one update per batch, no reference model. A round
runs a block of each, first one order, then the other; the first steps of a block are not counted. A step's time is
from the end of one step to the end of the next, so data, verifying, logging and metrics are in it. Beside them stand
the bare parts of such a step, written plainly, so that the numbers can be judged.

Needs trl, which is no part of kdrl: `pip install -e '.[bench]'`, best in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

from kdrl.build import Builder
from kdrl.models import ModelConfig, NewModel, NewTokenizer, load_model, save_final
from kdrl.recipe import load_recipe
from kdrl.trainer import Trainer
from kdrl.watch import Watch

HERE = Path(__file__).parent
CHARACTERS = "0123456789+-*/=;#()., abcdefghijklmnopqrstuvwxyzABCDE"
STUDENT: dict[str, Any] = {
    "hidden_size": 128,
    "layers": 5,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
}
TEACHER: dict[str, Any] = {
    "hidden_size": 256,
    "layers": 6,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 32,
    "intermediate_size": 704,
}
REWARD = "7.*7"
LEARNING_RATE = 1e-8


@dataclass(frozen=True)
class Settings:
    """What both sides are asked for."""

    prompts: int = 16
    completions: int = 8
    new_tokens: int = 64
    seed: int = 0

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.completions

    @property
    def tokens(self) -> int:
        """Tokens written in a step."""
        return self.rows * self.new_tokens


@dataclass
class Block:
    """Seconds of the counted steps of one block, and how many tokens each step of it wrote."""

    seconds: list[float]
    tokens: set[int]
    phases: dict[str, float] = field(default_factory=dict)


@dataclass
class Clock:
    """Collects the times between ends of steps."""

    marks: list[float] = field(default_factory=list)

    def mark(self) -> None:
        """A step has ended."""
        self.marks.append(time.perf_counter())

    def after(self, warm: int) -> list[float]:
        """Durations of all steps but the first `warm` (at least one: what comes before it is no step)."""
        gaps = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return gaps[max(0, warm - 1) :]


def make_models(folder: Path, settings: Settings) -> None:
    """Random student and teacher with one tokenizer, as Hugging Face folders."""
    for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
        new = NewModel(architecture="qwen3", max_positions=256, **shape)
        config = ModelConfig(model=new, tokenizer=NewTokenizer(characters=CHARACTERS))
        save_final(load_model(config, "cpu", trainable=True, seed=settings.seed), folder / name)


def make_prompts(folder: Path, settings: Settings) -> list[str]:
    """Prompts of 8 to 15 characters, also as a data file."""
    rng = random.Random(settings.seed)
    lengths = [8 + n % 8 for n in range(settings.prompts)]
    prompts = ["".join(rng.choice(CHARACTERS[:20]) for _ in range(length)) for length in lengths]
    lines = [json.dumps({"prompt": prompt, "answer": "7"}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return prompts


def kdrl_block(folder: Path, settings: Settings, warm: int, steps: int, method: dict[str, Any]) -> Block:
    """Steps of kdrl's own loop, with its verifier processes and metrics."""
    clock = Clock()
    torch.use_deterministic_algorithms(True, warn_only=True)  # as a run does
    with ExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        recipe = load_recipe(
            {
                **method,
                "steps": warm + steps,
                "seed": settings.seed,
                "device": "cpu",
                "student": {"model": str(folder / "student")},
                "task": {
                    "path": str(folder / "prompts.jsonl"),
                    "verifier": {"name": "regex", "settings": {"pattern": REWARD}},
                },
                "rollout": {
                    "prompts": settings.prompts,
                    "group": settings.completions,
                    "max_new_tokens": settings.new_tokens,
                },
                "optimizer": {"lr": LEARNING_RATE, "clip": 1.0},
                "evaluate": {"baselines": False},
                "checkpoint": {"every": 0},
                "log": {"progress": "plain"},
            }
        )
        builder = Builder(recipe, run_dir, stack)
        builder.student.eos_ids = (-1,)  # no token ends a response
        parts = builder.parts()
        stack.callback(parts.checkpoints.close)
        parts.checkpoints.claim()
        watch = stack.enter_context(Watch(run_dir, recipe.log, recipe.steps, console=Console(quiet=True)))
        rows: list[dict[str, Any]] = []
        inner = watch.step

        def step(row: Any, rollouts: Any = ()) -> None:
            inner(row, rollouts)
            rows.append(dict(row))
            clock.mark()

        watch.step = step  # type: ignore[method-assign]
        Trainer(parts).run(watch)
    torch.use_deterministic_algorithms(False)
    counted = rows[warm:]
    phases = {
        key.removeprefix("time/"): statistics.median(row[key] for row in counted)
        for key in rows[0]
        if key.startswith("time/")
    }
    return Block(clock.after(warm), {round(row["tokens"] * row["batch_responses"]) for row in rows}, phases)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """The verifier of both sides."""
    return [float(re.search(REWARD, text) is not None) for text in completions]


def trl_block(folder: Path, settings: Settings, warm: int, steps: int, kind: str, prompts: list[str]) -> Block:
    """Steps of a TRL trainer."""
    import trl
    from datasets import Dataset

    clock, tokens = Clock(), set()

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.mark()

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "max_steps": warm + steps,
        "per_device_train_batch_size": settings.rows,
        "max_completion_length": settings.new_tokens,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": settings.seed,
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    student, teacher = (load_float32(folder / name) for name in ("student", "teacher"))
    shared: dict[str, Any] = {"model": student, "processing_class": tokenizer, "callbacks": [Marks()]}
    if kind == "grpo":
        config = trl.GRPOConfig(num_generations=settings.completions, beta=0.0, epsilon=0.2, **common)
        data = Dataset.from_dict({"prompt": prompts})
        trainer: Any = trl.GRPOTrainer(args=config, reward_funcs=reward, train_dataset=data, **shared)
    else:
        repeated = [prompt for prompt in prompts for _ in range(settings.completions)]
        config = trl.DistillationConfig(beta=1.0, **common)
        data = Dataset.from_dict({"prompt": repeated})
        trainer = trl.DistillationTrainer(args=config, teacher_model=teacher, train_dataset=data, **shared)
    trainer.eos_token_ids = [-1]  # no token ends a completion
    trainer.generation_config.eos_token_id = None
    trainer.remove_callback(transformers.PrinterCallback)
    generate = trainer._generate_single_turn

    def counted(*args: Any, **kwargs: Any) -> Any:
        written = generate(*args, **kwargs)
        completions = written[0] if isinstance(written, tuple) else written
        tokens.add(sum(map(len, completions)))
        return written

    trainer._generate_single_turn = counted
    trainer.train()
    return Block(clock.after(warm), tokens)


def load_float32(path: Path) -> Any:
    """A model as plain transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def bare_parts(folder: Path, settings: Settings, prompts: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """The parts of a step in their plainest form: `generate`, a teacher's forward pass, forward and backward pass."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    student, teacher = (load_float32(folder / name) for name in ("student", "teacher"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    rows = [prompt for prompt in prompts for _ in range(settings.completions)]
    given = dict(tokenizer(rows, padding=True, return_tensors="pt", return_token_type_ids=False))
    width = given["input_ids"].shape[1]
    text: dict[str, Tensor] = {}

    def write() -> None:
        with torch.no_grad():
            out = student.generate(
                **given,
                max_new_tokens=settings.new_tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        assert out.shape == (settings.rows, width + settings.new_tokens)
        more = given["attention_mask"].new_ones(settings.rows, settings.new_tokens)
        text.update(input_ids=out, attention_mask=torch.cat([given["attention_mask"], more], 1))

    def score() -> None:
        with torch.no_grad():
            teacher(**text)

    def update() -> None:
        logits = student(**text).logits[:, width - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(-1, text["input_ids"][:, width:, None])
        (-chosen.mean()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {part.__name__: summary(timed(part, repeats)) for part in (write, score, update)}


def timed(part: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each call after the first."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {name: round(f(values), 4) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def compare(name: str, blocks: dict[str, Callable[[], Block]], settings: Settings, rounds: int) -> list[dict[str, Any]]:
    """Run blocks in turns; each of kdrl's against TRL's, by medians over all steps and by the ratio of each round."""
    found: dict[str, list[Block]] = {side: [] for side in blocks}
    for turn in range(rounds):
        for side in list(blocks) if turn % 2 == 0 else list(blocks)[::-1]:
            block = blocks[side]()
            assert block.tokens == {settings.tokens}, (side, block.tokens, settings.tokens)
            found[side].append(block)
            label, median = (name if side == "trl" else side), statistics.median(block.seconds)
            print(f"  round {turn + 1}, {label}: {median:.3f} s a step", flush=True)
    theirs = found.pop("trl")
    results = []
    for side, mine in found.items():
        ratios = [
            statistics.median(t.seconds) / statistics.median(m.seconds) for t, m in zip(theirs, mine, strict=True)
        ]
        results.append(
            {
                "kdrl": side,
                "peer": name,
                "kdrl_s": summary([s for block in mine for s in block.seconds]),
                "trl_s": summary([s for block in theirs for s in block.seconds]),
                "times_faster": summary(ratios),
                "tokens_a_step": settings.tokens,
                "kdrl_phases_s": {k: round(v, 4) for k, v in mine[-1].phases.items()},
            }
        )
        r = results[-1]
        print(
            f"{side} against {name}: {r['kdrl_s']['median']:.3f} and {r['trl_s']['median']:.3f} s a step, "
            f"{r['times_faster']['median']:.2f} times faster ({r['times_faster']['min']:.2f} to "
            f"{r['times_faster']['max']:.2f})",
            flush=True,
        )
    return results


def measure(folder: Path, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """All comparisons and the bare parts."""
    make_models(folder, settings)
    prompts = make_prompts(folder, settings)
    block = (folder, settings, options.warm, options.steps)
    full = {"divergence": "reverse_kl", "support": "full"}
    teacher = {"model": str(folder / "teacher")}
    grpo: dict[str, Callable[[], Block]] = {
        "trl": lambda: trl_block(*block, "grpo", prompts),
        "grpo": lambda: kdrl_block(*block, {"method": "grpo"}),
    }
    opd: dict[str, Callable[[], Block]] = {
        "trl": lambda: trl_block(*block, "opd", prompts),
        "opd with support full": lambda: kdrl_block(
            *block, {"method": "opd", "teacher": teacher, "objective": [{"distill": full}]}
        ),
        "opd": lambda: kdrl_block(*block, {"method": "opd", "teacher": teacher}),
    }
    results = compare("TRL's GRPOTrainer", grpo, settings, options.rounds)
    results += compare("TRL's DistillationTrainer", opd, settings, options.rounds)
    return {"results": results, "bare_parts_s": bare_parts(folder, settings, prompts, max(2, options.steps))}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured on, and with which versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("torch", "transformers", "trl", "accelerate", "kdrl")
    return {
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": options.threads,
            "load_at_start": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def main() -> None:
    """Measure, print a line for each comparison and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="blocks of each side")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a block")
    parser.add_argument("--warm", type=int, default=2, help="steps of a block that are not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=HERE / "results" / "trl_compare.json")
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed; this comparison needs it: pip install -e '.[bench]' (best in its own venv)")
    if options.warm < 1 or options.steps < 1:
        parser.error("--warm and --steps must be at least 1")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings()
    content = machine(options)
    with tempfile.TemporaryDirectory() as folder:
        content |= {"settings": asdict(settings), "options": {k: v for k, v in vars(options).items() if k != "json"}}
        content |= measure(Path(folder), settings, options)
    for part, seconds in content["bare_parts_s"].items():
        print(f"bare {part}: {seconds['median']:.3f} s")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
