"""TRL's side: GRPOTrainer, DistillationTrainer and the experimental GKDTrainer, on as much work as kdrl's."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import SEED, settle

from beside_trl.job import LEARNING_RATE, Block, Job
from kdrl.bench.machine import peak_bytes, reset_peak

# Methods of the trainers that write completions, and nothing else.
_WRITING = ("_generate_single_turn", "generate_on_policy_outputs")


@dataclass
class Clock:
    """Times of the ends of steps, and the seconds of each that went into writing."""

    marks: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)
    written: float = 0.0

    def end(self) -> None:
        """A step is over."""
        self.marks.append(time.perf_counter())
        self.writing.append(self.written)
        self.written = 0.0

    def after(self, warm: int) -> list[float]:
        """Durations of all steps but the first `warm` (at least one: what comes before it is no step)."""
        gaps = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return gaps[warm - 1 :]


@dataclass
class Counts:
    """Tokens of the steps."""

    tokens: set[int] = field(default_factory=set)
    prompt_tokens: set[int] = field(default_factory=set)


def trl_block(folder: Path, job: Job, trainer: str, warm: int, steps: int) -> Block:
    """Steps of one of TRL's trainers."""
    before, clock, counts = settle(), Clock(), Counts()

    class Marks(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            reset_peak("cpu")  # as kdrl's side does when it has loaded its models

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    logging.getLogger("trl").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        made = TRAINERS[trainer](folder, job, _common(job, output, warm + steps), Marks(), counts)
        made.remove_callback(transformers.PrinterCallback)
        _time_writing(made, clock)
        made.train()
        after = peak_bytes("cpu")
    peak = None if before is None or after is None else after - before
    return Block(clock.after(warm), counts.tokens, counts.prompt_tokens, {"generation": clock.writing[warm:]}, peak)


def _time_writing(trainer: Any, clock: Clock) -> None:
    """From now on the trainer's own method that writes completions is timed; raises where it has none that is known."""
    name = next((name for name in _WRITING if hasattr(trainer, name)), None)
    if name is None:
        raise AttributeError(f"{type(trainer).__name__} writes with none of {', '.join(_WRITING)}")
    write = getattr(trainer, name)

    def timed(*given: Any, **more: Any) -> Any:
        start = time.perf_counter()
        written = write(*given, **more)
        clock.written += time.perf_counter() - start
        return written

    setattr(trainer, name, timed)


def _common(job: Job, output: str, steps: int) -> dict[str, Any]:
    """Training arguments of all trainers: no logging to trackers, no checkpoints, the batch in one piece."""
    return {
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": job.rows,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": job.best,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def _model(path: Path) -> Any:
    """As plain transformers loads it, and without an end token.

    The teacher in float32 too: under TRL's autocast weights in bfloat16 gain nothing at 1M parameters and take a
    quarter more time at 135M.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def _shared(folder: Path, marks: Any) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    return {"model": _model(folder / "student"), "processing_class": tokenizer, "callbacks": [marks]}


def _endless(trainer: Any, counts: Counts, copies: int) -> Any:
    """No token ends a completion, and every call is counted; prompts come `copies` times each."""
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    generate = trainer._generate_single_turn

    def counted(prompt_ids: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        written = generate(prompt_ids, *args, **kwargs)
        completions = written[0] if isinstance(written, tuple) else written
        counts.tokens.add(sum(map(len, completions)))
        counts.prompt_tokens.add(sum(map(len, prompt_ids)) // copies)
        return written

    trainer._generate_single_turn = counted
    return trainer


def _grpo(folder: Path, job: Job, common: dict[str, Any], marks: Any, counts: Counts) -> Any:
    import trl
    from datasets import Dataset

    args = trl.GRPOConfig(
        num_generations=job.completions,
        max_completion_length=job.new_tokens,
        beta=0.0,
        epsilon=0.2,
        shuffle_dataset=False,
        **common,
    )
    data = Dataset.from_dict({"prompt": job.texts()})
    shared = _shared(folder, marks)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(re.search(job.reward, text) is not None) for text in completions]

    made = trl.GRPOTrainer(args=args, reward_funcs=reward, train_dataset=data, **shared)
    return _endless(made, counts, job.completions)


def _distillation(folder: Path, job: Job, common: dict[str, Any], marks: Any, counts: Counts) -> Any:
    import trl
    from datasets import Dataset

    args = trl.DistillationConfig(beta=1.0, max_completion_length=job.new_tokens, shuffle_dataset=False, **common)
    data = Dataset.from_dict({"prompt": [text for text in job.texts() for _ in range(job.completions)]})
    shared, teacher = _shared(folder, marks), _model(folder / "teacher")
    made = trl.DistillationTrainer(args=args, teacher_model=teacher, train_dataset=data, **shared)
    return _endless(made, counts, job.completions)


def _gkd(folder: Path, job: Job, common: dict[str, Any], marks: Any, counts: Counts) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    # With lmbda 1 every batch is written by the student; `counted` below sees it do so.
    args = GKDConfig(lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=job.new_tokens, **common)
    data = Dataset.from_dict({"prompt": [text for text in job.texts() for _ in range(job.completions)]})
    shared, teacher = _shared(folder, marks), _model(folder / "teacher")
    tokenizer = shared["processing_class"]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        given = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
        ids, mask = given["input_ids"], given["attention_mask"]
        counts.prompt_tokens.add(int(mask.sum()) // job.completions)
        # A text of the length that will be written: the trainer counts its labels before it writes.
        text = ids[:, :1].expand(-1, job.new_tokens)
        return {
            "prompts": ids,
            "prompt_attention_mask": mask,
            "input_ids": torch.cat([ids, text], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(text)], 1),
            "labels": torch.cat([torch.full_like(ids, -100), text], 1),
        }

    made = GKDTrainer(args=args, teacher_model=teacher, train_dataset=data, data_collator=collate, **shared)
    made.generation_config.eos_token_id = None
    write = made.generate_on_policy_outputs

    def counted(*given: Any, **more: Any) -> Any:
        written = write(*given, **more)
        counts.tokens.add(int((written[2] != -100).sum()))
        return written

    made.generate_on_policy_outputs = counted
    return made


TRAINERS = {"GRPOTrainer": _grpo, "DistillationTrainer": _distillation, "GKDTrainer": _gkd}
