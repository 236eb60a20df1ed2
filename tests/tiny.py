"""A run small enough to be made many times in a test: model, data, verifier, recipe, and rollouts made by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Origin, Response, Rollouts
from kdrl.build import Builder
from kdrl.measuring import measure_scores
from kdrl.models import LoadedModel, ModelConfig, NewModel, NewTokenizer, load_model, save_final
from kdrl.objectives.blocks import block_ids
from kdrl.objectives.objective import Objective, token_data
from kdrl.objectives.schedules import Moment
from kdrl.objectives.terms import TERMS
from kdrl.recipe import Recipe, load_recipe, merge
from kdrl.run import RunResult, train
from kdrl.tasks import Problem
from kdrl.teachers import LocalTeacher, SelfTeacher
from kdrl.trainer import Parts, Trainer
from kdrl.update import Scored, Tally, Updater
from kdrl.watch import Watch

CHARACTERS = "0123456789+-=;#abcdefghijklmnopqrstuvwxyz ."
MODEL = {
    "architecture": "qwen3",
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "intermediate_size": 24,
    "max_positions": 128,
}
# Not a function of the answer: an untrained model must get some responses right and some wrong.
JUDGE = """
def even(response, problem):
    return sum(map(ord, response)) % 2 == 0


def never(response, problem):
    return False


def breaks(response, problem):
    if sum(map(ord, response)) % 3 == 0:
        raise ValueError(response)
    return len(response) % 2 == 0
"""


def section(**change: Any) -> dict[str, Any]:
    """A recipe's `student` or `teacher` section for a new tiny model."""
    return {"model": MODEL | change, "tokenizer": {"characters": CHARACTERS}}


def toy(seed: int, *, trainable: bool = False, sharp: float = 10.0, **change: Any) -> LoadedModel:
    """A random model in float64 whose distributions are far from uniform, so that a wrong position shows."""
    config = ModelConfig(model=NewModel(**(MODEL | change)), tokenizer=NewTokenizer(characters=CHARACTERS))
    loaded = load_model(config, "cpu", trainable=trainable, seed=seed)
    sharpen(loaded, sharp)
    loaded.model.double()
    return loaded


def sharpen(loaded: LoadedModel, by: float) -> None:
    with torch.no_grad():
        for weight in loaded.model.parameters():
            if weight.ndim == 2:
                weight.mul_(by)


def make_world(folder: Path) -> Path:
    """Data, verifier and a saved teacher in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"{a}+{b}" + "+1" * (a % 3) + "=", "answer": str(a + b + a % 3), "solution": f"{a}+{b};{a + b}#"}
        for a in range(1, 8)
        for b in range(1, 8)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)
    teacher = load_model(
        ModelConfig(model=NewModel(**MODEL), tokenizer=NewTokenizer(characters=CHARACTERS)),
        "cpu",
        trainable=False,
        seed=77,
    )
    sharpen(teacher, 8.0)
    save_final(teacher, folder / "teacher")
    return folder


def raw_recipe(world: Path, method: str | None = "grpo", **change: Any) -> dict[str, Any]:
    """A recipe mapping over the folder of `make_world`; `change` is merged into it."""
    base: dict[str, Any] = {
        "steps": 2,
        "seed": 3,
        "device": "cpu",
        "student": section(),
        "task": {
            "path": str(world / "data.jsonl"),
            "holdout": {"development": 0.2, "test": 0.2},
            "verifier": {"name": f"{world / 'judge.py'}:even", "workers": 1},
        },
        "rollout": {"prompts": 3, "group": 4, "max_new_tokens": 6},
        "optimizer": {"lr": 1.0e-3},
        "evaluate": {"final_problems": 0},
        "log": {"progress": "off", "gradients_every": 0},
    }
    if method is not None:
        base["method"] = method
    return merge(base, change)


def with_teacher(world: Path) -> dict[str, Any]:
    return {"teacher": {"model": str(world / "teacher")}}


def run(raw: dict[str, Any] | Recipe, output: Path) -> RunResult:
    return train(raw, output=output, say=lambda text: None)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def parts_of(raw: dict[str, Any], run_dir: Path, *overrides: str) -> Iterator[Parts]:
    """The live objects of a run, without running it."""
    with ExitStack() as stack:
        parts = Builder(load_recipe(raw, overrides), run_dir, stack).parts()
        stack.callback(parts.checkpoints.close)
        yield parts


def go(parts: Parts) -> Trainer:
    """Run the steps of a recipe."""
    trainer = Trainer(parts)
    with Watch(parts.run_dir, parts.recipe.log, parts.recipe.steps) as watch:
        trainer.run(watch)
    return trainer


@dataclass
class Seen:
    """One update as it stood before the optimizer: what was scored, for which rows, the gradient, the log-probs."""

    scored: Scored
    rows: list[int]
    gradient: Tensor
    logp_N: Tensor


class SpyUpdater(Updater):
    """An updater that keeps what every update looked like."""

    def __init__(self, student: LoadedModel, budget: int = 4096) -> None:
        super().__init__(student, budget)
        self.seen: list[Seen] = []

    def accumulate(self, scored: Scored, rows: Sequence[int], tally: Tally | None = None) -> float:
        loss = super().accumulate(scored, rows, tally)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        logp_N, _ = self.score_policy(scored.rollouts, scored.temperature)
        self.seen.append(Seen(scored, list(rows), torch.cat([g.flatten() for g in grads]).clone(), logp_N))
        return loss


def problem(name: str = "p", prompt: str = "1+2=", **more: Any) -> Problem:
    return Problem(name, prompt, more.pop("answer", "3"), **more)


def made_responses(seed: int = 0, groups: int = 3, size: int = 3, origin: Origin = "student") -> list[Response]:
    """Responses of very different lengths with mixed rewards; the last group has no right one.

    `logp` holds a disturbance that `score` adds to the present log-probs to make old ones.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 30, (count,), generator=draw).tolist()

    out = []
    for group in range(groups):
        prompt = ids(1 + 5 * group)
        for i in range(size):
            tokens = ids([1, 7, 23][(i + group) % 3])
            right = i == 0 and group < groups - 1
            response = Response(problem(f"p{group}"), group, prompt, tokens, origin, i % 2 == 0, "")
            response.reward, response.correct = float(right), right
            response.logp = (torch.randn(len(tokens), generator=draw) * 0.3).tolist()
            response.privileged_ids = prompt + ids(4) if origin == "privileged" else None
            out.append(response)
    return out


def objective_of(entries: Sequence[dict[str, Any]]) -> Objective:
    """An objective from its recipe form."""
    pairs = [next(iter(entry.items())) for entry in entries]
    return Objective([TERMS.get(name)(TERMS.get(name).Config.model_validate(given)) for name, given in pairs])


def score(
    student: LoadedModel,
    responses: Sequence[Response],
    entries: Sequence[dict[str, Any]],
    *,
    teacher: LoadedModel | None = None,
    reference: LoadedModel | None = None,
    stale: bool = False,
    step: int = 0,
    temperature: float = 1.0,
) -> Scored:
    """What the trainer would hand to `Updater.accumulate` for these responses, from its public parts."""
    rollouts = Rollouts.of(responses)
    logp_N, entropy_N = Updater(student, 4096).score_policy(rollouts, temperature)
    active = objective_of(entries).activate(rollouts, Moment(step, 100), entropy_N)
    evidence = {}
    for name in {a.teacher for a in active if a.teacher}:
        own = SelfTeacher(student, 4096)
        asked = LocalTeacher(teacher, 4096) if name == "teacher" and teacher else own
        keep_N = rollouts.trained_N & own.reach_N(rollouts) if asked is own else rollouts.trained_N
        evidence[name] = asked.score(rollouts, keep_N, "distribution", temperature)
    anchor = None
    if reference is not None:
        whole = any(a.term.needs.reference == "distribution" for a in active)
        need = "distribution" if whole else "token"
        anchor = LocalTeacher(reference, 4096).score(rollouts, rollouts.trained_N, need, temperature)
    noise_N = torch.tensor([x for r in responses for x in (r.logp or [0.0] * len(r.token_ids))])
    scored = Scored(
        rollouts,
        active,
        evidence,
        anchor,
        logp_N + noise_N if stale else None,
        None,
        temperature,
        token_data(rollouts),
        {a.name: torch.rand(rollouts.tokens, a.term.draws, generator=draw_from(step)) for a in active if a.term.draws},
        blocks={a.name: block_ids(a.keep_N, rollouts.row_N, a.term.block) for a in active if a.term.block},
    )
    return replace(scored, measured=measure_scores(Updater(student, 4096), scored))


def draw_from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(student: LoadedModel, scored: Scored, *, budget: int = 4096, rows: Sequence[int] | None = None) -> Tensor:
    """The gradient that one optimizer step would see, as one vector."""
    updater = Updater(student, budget)
    updater.clear()
    updater.accumulate(scored, list(range(scored.rollouts.rows)) if rows is None else rows)
    return flat(updater)


def flat(updater: Updater) -> Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in updater.parameters]
    out = torch.cat([g.flatten() for g in grads]).clone()
    updater.clear()
    return out


def plain_logp(loaded: LoadedModel, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs `[T, V]` at a response's positions from the model's own logits, one row, no padding, no chunks."""
    logits = loaded.model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits[:, : loaded.vocab_size] / temperature, -1)


def plain_gradient(student: LoadedModel, loss: Callable[[], Tensor]) -> Tensor:
    """The gradient of any loss on the student, as `gradient` gives it."""
    updater = Updater(student, 1)
    updater.clear()
    loss().backward()
    return flat(updater)


def copied(loaded: LoadedModel) -> LoadedModel:
    twin = copy.copy(loaded)
    twin.model = copy.deepcopy(loaded.model).requires_grad_(False)
    return twin


def assert_near(found: Tensor, want: Tensor) -> None:
    """Equal gradients, to the rounding of the model's own float32 norms."""
    assert want.norm() > 1e-9, "a test on a gradient of zero proves nothing"
    assert (found - want).norm() <= 1e-5 * want.norm()
