"""Teachers that are fitted to the student: loss and gradient by hand, what moves and what stays, the memory plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import made_responses, parts_of, plain_logp, raw_recipe, rows_of, run, toy, with_teacher
from torch import Tensor
from torch.nn import Parameter

from kdrl.batch import Response, Rollouts
from kdrl.errors import UserError
from kdrl.memory import ModelShape
from kdrl.models import LoadedModel
from kdrl.objectives.schedules import Moment
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe
from kdrl.teachers import LocalTeacher, Preparation, PreparedTeacher, Views, register_preparation
from kdrl.teachers.beside import Beside
from kdrl.teachers.prepare import read_prepare
from kdrl.trainer import Trainer
from kdrl.watch import Watch

KINDS: dict[str, dict[str, Any]] = {
    "soft_prompt": {"tokens": 3, "lr": 1e-2, "weight": 0.7, "clip": None},
    "output_adapter": {"rank": 2, "lr": 1e-2, "weight": 0.7, "clip": None},
}
MOMENT = Moment(1, 4)


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return toy(1)


@pytest.fixture
def teacher() -> LoadedModel:
    return toy(2)


def prepared(kind: str, teacher: LoadedModel, student: LoadedModel, budget: int = 4096, **more: Any) -> PreparedTeacher:
    preparation = read_prepare({kind: KINDS[kind] | more}).build(teacher, seed=3)
    for parameter in preparation.parameters.values():
        parameter.data = parameter.data.double()
        if not parameter.any():  # a factor that starts at zero has no gradient in the other one
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return PreparedTeacher(teacher, budget, preparation, student)


def adapted_logp(one: PreparedTeacher, r: Response) -> Tensor:
    """Log-probs `[T, V]` of the adapted teacher by the model's own forward, one row, no chunks."""
    model: Any = one.loaded.model
    preparation: Any = one.preparation
    ids = torch.tensor([r.prompt_ids + r.token_ids])
    if hasattr(preparation, "vectors_PD"):
        embedded = model.get_input_embeddings()(ids)
        soft = preparation.vectors_PD[None]
        logits = model(inputs_embeds=torch.cat([soft, embedded], 1), use_cache=False).logits[:, soft.shape[1] :]
    else:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden + hidden @ preparation.down_DR @ preparation.up_RD)
    logits = logits[0, len(r.prompt_ids) - 1 : -1, : one.loaded.vocab_size]
    return torch.log_softmax(logits, -1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def loss_by_hand(kind: str, one: PreparedTeacher, responses: list[Response], keep_N: Tensor) -> Tensor:
    columns = []
    for r in responses:
        adapted = adapted_logp(one, r)
        bare, own = (plain_logp(m, r.prompt_ids, r.token_ids).detach() for m in (one.loaded, one.student))
        if kind == "soft_prompt":  # step 1 of 4
            columns.append(kl(adapted, own) + (1 - 1 / 4) * 0.7 * kl(adapted, bare))
        else:
            gap = -(adapted.exp() * adapted).sum(-1) + (own.exp() * own).sum(-1)
            columns.append(gap**2 + 0.7 * kl(adapted, bare))
    return torch.cat(columns)[keep_N].mean()


@pytest.mark.parametrize("budget", [1, 4096])
@pytest.mark.parametrize("kind", list(KINDS))
def test_loss_gradient_and_step_by_hand(kind: str, budget: int, student: LoadedModel, teacher: LoadedModel):
    responses = made_responses()
    rollouts = Rollouts.of(responses)
    keep = torch.arange(rollouts.tokens) % 3 != 1
    one = prepared(kind, teacher, student, budget)
    want = loss_by_hand(kind, one, responses, keep)
    gradients = torch.autograd.grad(want, list(one.preparation.parameters.values()))
    before = {name: p.detach().clone() for name, p in one.preparation.parameters.items()}
    told = one.prepare(rollouts, keep, 1.0, MOMENT)
    assert told["prepare/loss"] == pytest.approx(float(want.detach()), rel=1e-5)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert told["prepare/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert norm > 1e-6
    for (name, parameter), gradient in zip(one.preparation.parameters.items(), gradients, strict=True):
        # AdamW's first step is lr times the gradient's sign.
        want_step = before[name] - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), want_step, atol=1e-5, rtol=1e-4)
        assert parameter.grad is None


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_learned_changes_the_teacher_and_lowers_its_loss(kind: str, student: LoadedModel):
    teacher = toy(2)
    responses = made_responses()
    rollouts = Rollouts.of(responses)
    one = prepared(kind, teacher, student, lr=0.05)
    weights = {name: p.detach().clone() for name, p in teacher.model.named_parameters()}
    seen = [one.prepare(rollouts, rollouts.trained_N, 1.0, MOMENT)["prepare/loss"] for _ in range(25)]
    assert seen[-1] < 0.95 * seen[0]
    for model in (teacher.model, student.model):
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in teacher.model.named_parameters())
    found = one.score(rollouts, rollouts.trained_N, "distribution", 1.0)
    want = torch.cat(
        [adapted_logp(one, r).gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0] for r in responses]
    ).detach()
    torch.testing.assert_close(found.logp_N.double(), want, atol=1e-5, rtol=1e-5)
    bare = LocalTeacher(teacher, 4096).score(rollouts, rollouts.trained_N, "token", 1.0).logp_N
    assert (bare - found.logp_N).abs().max() > 1e-2
    assert found.hidden_MD is not None
    assert not found.hidden_MD.requires_grad


def test_the_pull_to_the_bare_teacher_ends_with_the_run(student: LoadedModel, teacher: LoadedModel):
    rollouts = Rollouts.of(made_responses())
    one = prepared("soft_prompt", teacher, student, lr=0.0)
    losses = [one.prepare(rollouts, rollouts.trained_N, 1.0, Moment(s, 4))["prepare/loss"] for s in (0, 2, 4)]
    free = prepared("soft_prompt", teacher, student, lr=0.0, weight=0.0)
    alone = free.prepare(rollouts, rollouts.trained_N, 1.0, Moment(0, 4))["prepare/loss"]
    assert losses[2] == pytest.approx(alone, rel=1e-6)
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-6)
    assert losses[0] > losses[2]


def test_a_soft_prompt_starts_from_words(student: LoadedModel, teacher: LoadedModel):
    preparation: Any = read_prepare({"soft_prompt": {"tokens": 5, "init": "1+2"}}).build(teacher, seed=0)
    ids = teacher.tokenizer("1+2")["input_ids"]
    want = teacher.model.get_input_embeddings().weight[[*ids, *ids[:2]]]
    torch.testing.assert_close(preparation.vectors_PD.detach(), want.detach())
    drawn = [read_prepare("soft_prompt").build(teacher, seed=s).parameters["vectors"] for s in (0, 0, 1)]
    assert drawn[0].shape == (7, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_nothing_asked_is_nothing_fitted(student: LoadedModel, teacher: LoadedModel):
    rollouts = Rollouts.of(made_responses())
    one = prepared("soft_prompt", teacher, student)
    before = one.preparation.parameters["vectors"].detach().clone()
    assert one.prepare(rollouts, rollouts.trained_N & False, 1.0, MOMENT) == {}
    assert torch.equal(one.preparation.parameters["vectors"], before)


def test_the_vectors_count_towards_the_teachers_context(student: LoadedModel, teacher: LoadedModel):
    rollouts = Rollouts.of([Response(made_responses()[0].problem, 0, [5] * 100, [6] * 27, "student", False, "")])
    LocalTeacher(teacher, 4096).score(rollouts, rollouts.trained_N, "token", 1.0)
    with pytest.raises(UserError, match="the teacher reads at most 128 tokens"):
        prepared("soft_prompt", teacher, student).score(rollouts, rollouts.trained_N, "token", 1.0)


def recipe(world: Path, prepare: Any, **change: Any) -> dict[str, Any]:
    raw = raw_recipe(world, "opd", optimizer={"lr": 1e-2}, **with_teacher(world), **change)
    raw["teacher"]["prepare"] = prepare
    return raw


def test_the_teacher_is_fitted_before_every_update_and_the_student_learns_from_it(world: Path, tmp_path: Path):
    raw = recipe(world, {"soft_prompt": {"tokens": 7, "lr": 5e-2, "weight": 1.0}}, steps=3)
    with parts_of(raw, tmp_path / "run") as parts:
        one = Beside(parts.teachers).prepared["teacher"]
        order: list[tuple[str, float]] = []
        prepare, score = one.prepare, one.score

        def mark(what: str) -> None:
            order.append((what, float(one.preparation.parameters["vectors"].detach().sum())))

        def spied_prepare(*args: Any) -> Any:
            mark("before")
            told = prepare(*args)
            mark("fitted")
            return told

        def spied_score(*args: Any) -> Any:
            mark("asked")
            return score(*args)

        one.prepare, one.score = spied_prepare, spied_score  # type: ignore[method-assign]
        with Watch(parts.run_dir, parts.recipe.log, 3) as watch:
            Trainer(parts).run(watch)
    assert [what for what, _ in order] == ["before", "fitted", "asked"] * 3
    sums = [value for _, value in order]
    assert sums[0] != sums[1] == sums[2] == sums[3] != sums[4]
    rows = rows_of(tmp_path / "run")
    assert all(row["prepare/loss"] > 0 and row["prepare/grad_norm"] > 0 for row in rows)


def test_a_preparation_of_ones_own(world: Path, tmp_path: Path):
    @register_preparation("test-temperature")
    class Sharper(Preparation[Any]):
        """The teacher's hidden states times a learned number."""

        through_teacher: ClassVar[bool] = False

        def __init__(self, config: Any, teacher: LoadedModel, seed: int) -> None:
            super().__init__(config, teacher, seed)
            self.factor = Parameter(torch.ones(1))

        @property
        def parameters(self) -> dict[str, Parameter]:
            return {"factor": self.factor}

        def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
            from kdrl.models import hidden_states

            return self.factor * hidden_states(self.teacher, input_ids_BL, attention_mask_BL)

        def loss(self, views: Views) -> Tensor:
            return kl(views.student_CV, views.adapted_CV)

    run(recipe(world, {"test-temperature": {"lr": 0.1}}, steps=2), tmp_path / "run")
    first, second = (row["prepare/loss"] for row in rows_of(tmp_path / "run"))
    assert first > second


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("soft_promt", "no preparation is called 'soft_promt'; did you mean 'soft_prompt'"),
        ({"soft_prompt": {"token": 3}}, "soft_prompt.token is no recipe key; did you mean 'tokens'"),
        ({"soft_prompt": {"tokens": 0}}, "soft_prompt.tokens: Input should be greater than or equal to 1"),
        ({"soft_prompt": {}, "output_adapter": {}}, "prepare is one preparation with its settings"),
    ],
)
def test_a_mistake_has_its_sentence(prepare: Any, words: str, world: Path):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe(world, prepare))
    assert words in str(caught.value)


def test_a_preparation_that_no_term_reads_is_refused(world: Path):
    raw = recipe(world, "soft_prompt") | {"method": "grpo"}
    with pytest.raises(UserError, match=r"teacher.prepare=soft_prompt adapts what the teacher scores, but no term"):
        load_recipe(raw)


def test_a_resolved_recipe_reads_back(world: Path, tmp_path: Path):
    made = load_recipe(recipe(world, {"output_adapter": {"weight": {"linear": {"from": 1.0, "to": 0.0}}}}))
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == made


# ---- memory


def items(raw: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(item.name, item.phase): item.bytes for item in memory_plan(load_recipe(raw)).items}


def test_the_plan_counts_copies(world: Path):
    own = {"objective": [{"distill": {"teacher": "self", "on": ["student"]}}]}
    shape = ModelShape.from_model(toy(1).model)
    for kind, each in (("ema", 4), ("past", 4), ("initial", 4), ("live", 0)):
        settings: dict[str, Any] = {"kind": kind, "context": "{answer}"} | ({"every": 2} if kind == "past" else {})
        found = items(raw_recipe(world, None, self_teacher=settings, **own))
        assert found.get(("self-teacher weights", "always"), 0) == each * shape.parameters
        assert (("self-teacher head", "update") in found) == (kind in ("live", "ema"))
    adapters = raw_recipe(world, None, self_teacher={"kind": "ema"}, student={"lora": {"rank": 2}}, **own)
    assert 0 < items(adapters)["self-teacher weights", "always"] < 4 * shape.parameters


def test_the_plan_counts_rounded_weights_and_the_teachers_activations(world: Path):
    shape = ModelShape.from_model(toy(1).model)
    found = items(raw_recipe(world, "grpo", student={"quantise": {"bits": 4}}))
    linear = shape.parameters - shape.vocabulary * shape.width
    assert found["rounded weights", "rollout"] == found["rounded weights", "update"] == 4 * linear
    through, after = items(recipe(world, "soft_prompt")), items(recipe(world, "output_adapter"))
    assert through["teacher activations", "prepare"] > 0
    assert ("teacher activations", "prepare") not in after
    assert after["logits chunk", "prepare"] > 0
    assert "prepare" in memory_plan(load_recipe(recipe(world, "soft_prompt"))).to_dict()["totals"]
    assert "prepare" not in memory_plan(load_recipe(raw_recipe(world, "grpo"))).to_dict()["totals"]
