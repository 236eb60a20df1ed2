"""The commands of the recipes on real weights: SmolLM2-135M-Instruct from a GGUF file (`make smollm` fetches it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl.recipe import load_recipe
from kdrl.tasks import build_task
from kdrl.tasks.splits import split_of, text_key

REPO = Path(__file__).parents[1]
WEIGHTS = REPO / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER, KDRL = REPO / "recipes" / "smollm-teacher.yaml", REPO / "recipes" / "kdrl.yaml"
PEAK = 8e9  # bytes of memory that no command may pass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"{WEIGHTS} is not there; `make smollm` fetches it (93 MB)"),
]


def run(command: Sequence[str | Path]) -> str:
    """What a command says; it must succeed within the memory bound, and no library may put in a word."""
    env = os.environ | {"PYTHONPATH": str(REPO)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *map(str, command)], env=env, **pipes) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    assert not any(word in said for word in ("Warning", "Converting", "it/s]", "Timeout is disabled")), said
    assert used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < PEAK
    return said


def kdrl(*arguments: str | Path) -> str:
    return run(["-m", "kdrl", *arguments])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the teacher's recipe, cut short."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    kdrl("train", TEACHER, f"student.model={WEIGHTS}", "steps=3", "evaluate.every=0", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums that the untouched model gets right now and then, so that groups differ in reward."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    easy = json.dumps({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    run([REPO / "examples" / "make_jsonl.py", path, "--size", "400", "--settings", easy])
    return path


def test_problem_texts_decide_the_splits_also_between_recipe_and_file(tmp_path: Path) -> None:
    recipe = load_recipe(TEACHER, [f"student.model={WEIGHTS}"])
    holdout = {"development": 0.1, "test": 0.1}
    texts = {}
    for seed in (0, 1):
        task = build_task(recipe.task, seed)
        for split in ("train", "development", "test"):
            stream = task.problems(split)
            found = [str(stream[i].prompt) for i in range(300)]
            assert {split_of(text_key(text), **holdout) for text in found} == {split}
            texts.setdefault(split, set()).update(found)
    assert not texts["train"] & (texts["development"] | texts["test"])
    # What a file of such problems keeps for its own test, with smaller shares, no teacher has seen.
    path = tmp_path / "data.jsonl"
    run([REPO / "examples" / "make_jsonl.py", path])
    options = [f"student.model={WEIGHTS}", f"teacher.model={WEIGHTS}", f"task.path={path}"]
    options += ["task.holdout.development=0.05", "task.holdout.test=0.05"]
    task = build_task(load_recipe(KDRL, options).task, 0)
    for split in ("development", "test"):
        stream = task.problems(split)
        kept = [str(stream[i].prompt) for i in range(stream.size or 0)]
        assert kept
        assert {split_of(text_key(text), **holdout) for text in kept} == {split}


def test_sft_makes_a_teacher_that_plain_transformers_loads(teacher: Path) -> None:
    losses = [row["loss"] for row in rows(teacher)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(row["truncated"] == 0 for row in rows(teacher))
    model = AutoModelForCausalLM.from_pretrained(teacher / "final")
    tokenizer = AutoTokenizer.from_pretrained(teacher / "final")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"


WAYS = {
    "full": [],
    "lora": ["student.lora.rank=8", "optimizer.lr=1e-4"],
    "bfloat16": ["student.dtype=bfloat16", "student.autocast=null", "optimizer.lr=1e-4"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_advertised_command_trains_by_both_terms(way: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    sizes = ["steps=2", "rollout.prompts=6", "rollout.group=4", "rollout.max_new_tokens=24"]
    rest = ["task.verifier=numeric", "evaluate.every=0", "log.gradients_every=1", "optimizer.micro_batch_tokens=1024"]
    named = [f"student.model={WEIGHTS}", f"teacher.model={teacher / 'final'}", f"task.path={data}"]
    kdrl("train", KDRL, *named, *sizes, *rest, *WAYS[way], "--output", tmp_path / "run")
    found = rows(tmp_path / "run")
    assert len(found) == 2
    assert all(row["kd_norm"] > 0 for row in found)
    assert any(row["rl_norm"] > 0 for row in found)
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in found)
    assert found[-1]["teacher_calls"] == 2 * 24
    final = tmp_path / "run" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == (torch.bfloat16 if way == "bfloat16" else torch.float32)
    assert (final / "adapter" / "adapter_config.json").is_file() == (way == "lora")
    assert (tmp_path / "run" / "report.html").is_file()


def test_eval_of_the_gguf_file_against_the_teacher(teacher: Path, tmp_path: Path) -> None:
    options = ["--task", TEACHER, "--problems", "16", "--max-new-tokens", "48", "--json", tmp_path / "eval.json"]
    said = kdrl("eval", WEIGHTS, *options, "--against", teacher / "final")
    assert "accuracy" in said
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["split"] == "test"
    assert len(result["records"]) == 16
    for record in result["records"]:
        assert split_of(text_key(record["prompt"]), 0.1, 0.1) == "test"
