"""The student as its own teacher: means and copies against hand-run numbers, contexts as rendered, who is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CHARACTERS,
    assert_near,
    gradient,
    made_responses,
    objective_of,
    parts_of,
    plain_gradient,
    plain_logp,
    problem,
    raw_recipe,
    rows_of,
    run,
    section,
    toy,
)
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, load_model
from kdrl.objectives.objective import token_data
from kdrl.objectives.schedules import Moment
from kdrl.recipe import load_recipe
from kdrl.teachers import SelfTeacher, SelfTeacherConfig
from kdrl.teachers.beside import Beside
from kdrl.teachers.context import feedback_of
from kdrl.teachers.copies import WeightCopy
from kdrl.trainer import Trainer
from kdrl.update import Scored
from kdrl.watch import Watch

OWN: dict[str, Any] = {"teacher": "self", "on": ["student"], "divergence": "forward_kl"}


def own(student: LoadedModel, **settings: Any) -> SelfTeacher:
    return SelfTeacher(student, 4096, SelfTeacherConfig.model_validate(settings))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(loaded: LoadedModel, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype))


def chosen(loaded: LoadedModel, responses: list[Response], *, privileged: bool = False) -> Tensor:
    """Log-probs of the sampled tokens by the model's own logits."""
    out = []
    for r in responses:
        prompt = (r.privileged_ids or []) if privileged else r.prompt_ids
        logp = plain_logp(loaded, prompt, r.token_ids)
        out.append(logp.gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0])
    return torch.cat(out).detach()


def scores(teacher: SelfTeacher, responses: list[Response]) -> Tensor:
    rollouts = Rollouts.of(responses)
    return teacher.score(rollouts, teacher.reach_N(rollouts), "token", 1.0).logp_N.double()


# ---- copies


def test_a_running_mean_by_hand():
    student = toy(1, trainable=True)
    teacher = own(student, kind="ema", rate={"linear": {"from": 0.5, "to": 0.1, "steps": 4}})
    mean = weights(student.model)
    for step in range(4):
        moved(student, step)
        teacher.after_update(Moment(step, 4))
        rate = 0.5 + (0.1 - 0.5) * step / 4
        now = weights(student.model)
        mean = {name: (1 - rate) * m + rate * now[name] for name, m in mean.items()}
    for name, value in mean.items():
        torch.testing.assert_close(teacher.tensors()[name], value, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(teacher.tensors()["model.norm.weight"], student.model.model.norm.weight, atol=1e-3)


def test_the_mean_of_a_run_follows_every_optimizer_step(world: Path, tmp_path: Path):
    raw = raw_recipe(
        world,
        None,
        objective=[{"distill": OWN}],
        self_teacher={"kind": "ema", "rate": 0.25},
        optimizer={"lr": 1e-2, "minibatches": 2},
        steps=3,
    )
    with parts_of(raw, tmp_path) as parts:
        teacher = own_of(parts)
        assert teacher is not None
        mean, seen = weights(parts.student.model), [0]
        follow = teacher.after_update

        def spied(moment: Moment) -> None:
            seen[0] += 1
            for name, p in weights(parts.student.model).items():
                mean[name] = 0.75 * mean[name] + 0.25 * p
            follow(moment)

        teacher.after_update = spied  # type: ignore[method-assign]
        trained(parts)
        assert seen[0] == 6
        for name, value in mean.items():
            torch.testing.assert_close(teacher.tensors()[name], value)


def own_of(parts: Any) -> SelfTeacher | None:
    return Beside(parts.teachers).own


def trained(parts: Any) -> Trainer:
    trainer = Trainer(parts)
    with Watch(parts.run_dir, parts.recipe.log, parts.recipe.steps) as watch:
        trainer.run(watch)
    return trainer


def test_the_past_copy_is_the_student_of_the_last_refresh(world: Path, tmp_path: Path):
    raw = raw_recipe(
        world,
        None,
        objective=[{"policy_gradient": {"advantage": "reinforce"}}, {"distill": OWN}],
        self_teacher={"kind": "past", "every": 2},
        optimizer={"lr": 1e-2},
        steps=5,
    )
    with parts_of(raw, tmp_path) as parts:
        teacher = own_of(parts)
        assert teacher is not None
        states, used = [], []
        score = teacher.score

        def spied(*args: Any) -> Any:
            states.append(weights(parts.student.model))
            used.append({name: t.clone() for name, t in teacher.tensors().items()})
            return score(*args)

        teacher.score = spied  # type: ignore[method-assign]
        trained(parts)
    name = "model.layers.0.mlp.up_proj.weight"
    assert len(used) == 5
    for step, copy in enumerate(used):
        assert torch.equal(copy[name], states[step // 2 * 2][name])
    assert not torch.equal(states[2][name], states[1][name])


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}])
@pytest.mark.parametrize("kind", ["live", "ema", "past", "initial"])
def test_who_is_asked(kind: str, lora: Any):
    """Scores are those of the mean, the copy, the start, or the student itself; the student stays as it was."""
    student = load_model(ModelConfig.model_validate(section() | {"lora": lora}), "cpu", trainable=True, seed=3)
    student.model.double()
    moved(student, 8)  # so that the adapters do something at the start
    responses = made_responses()
    at_start = chosen(student, responses)
    start = weights(student.model)
    teacher = own(student, kind=kind, **{"ema": {"rate": 0.5}, "past": {"every": 1}}.get(kind, {}))
    copies = 0 if kind == "live" or (kind == "initial" and lora) else len(start)
    assert (0 if teacher.copy is None else len(teacher.copy.tensors)) == copies
    teacher.dress(responses)
    moved(student, 9)
    now = weights(student.model)
    teacher.after_update(Moment(0, 1))
    found = scores(teacher, responses)
    assert all(torch.equal(p, now[name]) for name, p in weights(student.model).items())
    assert all(p.requires_grad for name, p in student.model.named_parameters() if name in now)
    if kind == "initial" and lora:
        with student.model.disable_adapter():
            want = chosen(student, responses)
    elif kind == "ema":
        with torch.no_grad():
            for name, p in student.model.named_parameters():
                if name in now:
                    p.copy_((start[name] + now[name]) / 2)
        want = chosen(student, responses)
    else:
        want = chosen(student, responses) if kind == "live" else at_start
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_an_exception_while_a_copy_is_in_place_puts_the_student_back():
    student = toy(1, trainable=True)
    copy = WeightCopy(student.model)
    moved(student, 1)
    before = weights(student.model)

    def broken() -> None:
        with copy.in_place():
            assert not torch.equal(student.model.lm_head.weight, before["model.embed_tokens.weight"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert all(torch.equal(p, before[name]) for name, p in weights(student.model).items())


def test_a_mean_of_bfloat16_weights_is_kept_wide():
    student = toy(1, trainable=True)
    student.model.bfloat16()
    teacher = own(student, kind="ema", rate=0.001)
    moved(student, 1)
    before = teacher.tensors()["model.norm.weight"].clone()
    teacher.after_update(Moment(0, 1))
    after = teacher.tensors()["model.norm.weight"]
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)
    responses = made_responses()
    teacher.dress(responses)
    assert scores(teacher, responses).isfinite().all()


def test_full_precision_teaches_a_quantised_student():
    raw = section() | {"quantise": {"bits": 2, "group": 4}}
    student = load_model(ModelConfig.model_validate(raw), "cpu", trainable=True, seed=3)
    plain = load_model(ModelConfig.model_validate(section()), "cpu", trainable=True, seed=3)
    responses = made_responses()
    teacher, mean = own(student, kind="initial"), own(student, kind="ema")
    teacher.dress(responses)
    moved(student, 4)
    torch.testing.assert_close(scores(teacher, responses), chosen(plain, responses).double(), atol=1e-5, rtol=1e-5)
    with mean.copy.in_place():  # type: ignore[union-attr]
        rounded = chosen(student, responses).double()
    torch.testing.assert_close(scores(mean, responses), rounded, atol=1e-5, rtol=1e-5)
    assert (rounded - chosen(plain, responses)).abs().max() > 1e-3


# ---- contexts


def written(text: str, group: int, *, right: bool, **more: Any) -> Response:
    made = problem("p", "1+2=", answer="3", solution="1+2;3#") if group == 0 else problem("q", "2+2=", answer="4")
    given = {"origin": "student", "ended": True} | {k: more.pop(k) for k in ("origin", "ended") if k in more}
    out = Response(made, group, [5, 6], [7, 8, 1], text=text, **given)
    out.correct, out.reward, out.judged = right, float(right), True
    for key, value in more.items():
        setattr(out, key, value)
    return out


def step_of_two_groups() -> list[Response]:
    return [
        written("a", 0, right=False, feedback="no; too small"),
        written("b", 0, right=True, feedback="good"),
        written("c", 0, right=True, feedback="good"),
        written("d", 1, right=False, judged=False),
        written("e", 1, right=True, feedback="good"),
        written("f", 2, right=False, feedback="no"),
    ]


@pytest.mark.parametrize(
    ("context", "want"),
    [
        (None, ["-", "-", "-", "-", "-", "-"]),
        ("{answer}#{prompt}", ["3#1+2=", "3#1+2=", "3#1+2=", "4#2+2=", "4#2+2=", "4#2+2="]),
        ("{solution} {prompt}", ["1+2;3# 1+2=", "1+2;3# 1+2=", "1+2;3# 1+2=", None, None, None]),
        # The first right one of the group that is not the response itself.
        ("{prompt}{sibling}", ["1+2=b", "1+2=c", "1+2=b", "2+2=e", None, None]),
        ("{feedback};{prompt}", ["no; too small;1+2=", "good;1+2=", "good;1+2=", None, "good;2+2=", "no;2+2="]),
        ("{sibling};{feedback};{prompt}", ["b;no; too small;1+2=", "c;good;1+2=", "b;good;1+2=", None, None, None]),
    ],
)
def test_the_context_is_the_filled_template(context: str | None, want: list[str | None]):
    student = toy(1)
    teacher = own(student, kind="initial", context=context)
    responses = step_of_two_groups()
    assert teacher.dress(responses) == want.count(None)
    assert teacher.reach_N(Rollouts.of(responses)).view(-1, 3).any(1).tolist() == [w is not None for w in want]
    for response, text in zip(responses, want, strict=True):
        ids = response.privileged_ids
        if text == "-":
            assert ids == response.prompt_ids
        else:
            assert (None if ids is None else student.tokenizer.decode(ids)) == text


def test_feedback_is_the_verifiers_or_verdict_and_answer():
    assert feedback_of(written("a", 0, right=False, feedback="too small")) == "too small"
    assert feedback_of(written("a", 0, right=False)) == "This attempt is wrong. The right answer is 3."
    cut = written("a", 0, right=False, ended=False)
    assert feedback_of(cut) == "This attempt was cut at the length limit. The right answer is 3."
    assert feedback_of(written("a", 0, right=True)) == "This attempt is right."
    assert feedback_of(written("a", 0, right=True, judged=False)) is None


def test_a_chat_keeps_its_other_messages():
    student = toy(1)
    student.tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] + ';' }}{% endfor %}"
    teacher = own(student, context="{prompt} is {answer}")
    turns: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "1+2"}]
    response = Response(problem(prompt=turns), 0, [5], [7], "student", True, "x")
    teacher.dress([response])
    assert student.tokenizer.decode(response.privileged_ids or []) == "sbe kind;u1+2 is 3;"


def test_a_privileged_response_keeps_its_own_prompt_and_a_long_context_is_counted():
    teacher = own(toy(1), context="{answer}{prompt}")
    kept = written("a", 0, right=True, origin="privileged", privileged_ids=[9, 9])
    long = written("b", 0, right=True, token_ids=[7] * 125)
    assert teacher.dress([kept, long]) == 1
    assert kept.privileged_ids == [9, 9]
    assert long.privileged_ids is None


@pytest.mark.parametrize("budget", [1, 4096])
def test_the_gradient_is_that_of_the_divergence_to_the_student_with_context(budget: int):
    """Averaged over the tokens of responses that have a context; the others weigh nothing and count nothing."""
    student = toy(1, trainable=True)
    teacher = own(student, context="{prompt}{sibling}")
    responses = step_of_two_groups()
    teacher.dress(responses)
    rollouts = Rollouts.of(responses)
    active = Beside({"self": teacher}).narrowed(objective_of([{"distill": OWN}]).activate(rollouts, Moment()), rollouts)
    evidence = teacher.score(rollouts, active[0].keep_N, "distribution", 1.0)
    assert evidence.calls == 4
    scored = Scored(rollouts, active, {"self": evidence}, None, None, None, 1.0, token_data(rollouts))

    def by_hand() -> Tensor:
        known = [r for r in responses if r.privileged_ids is not None]
        total = torch.zeros((), dtype=torch.float64)
        for r in known:
            logp = plain_logp(student, r.privileged_ids or [], r.token_ids).detach()
            logq = plain_logp(student, r.prompt_ids, r.token_ids)
            total = total + (logp.exp() * (logp - logq)).sum()
        return total / sum(len(r.token_ids) for r in known)

    assert_near(gradient(student, scored, budget=budget), plain_gradient(student, by_hand))


FEEDBACK = """
def judge(response, problem):
    right = sum(map(ord, response)) % 2 == 0
    return float(right), "good" if right else "no; " + str(problem.answer)
"""


def test_a_run_with_the_verifiers_feedback(world: Path, tmp_path: Path):
    (tmp_path / "judge.py").write_text(FEEDBACK)
    raw = raw_recipe(
        world,
        None,
        objective=[{"distill": OWN | {"divergence": {"jsd": 0.5}, "support": {"topk": 4}}}],
        self_teacher={"kind": "ema", "context": "{prompt};{sibling};{feedback}"},
        task={"verifier": {"name": f"{tmp_path / 'judge.py'}:judge", "workers": 1}},
        steps=3,
    )
    raw["student"]["tokenizer"] = {"characters": CHARACTERS + "T"}  # kdrl's own words must be writable too
    with parts_of(raw, tmp_path / "run") as parts:
        teacher, texts = own_of(parts), []
        assert teacher is not None
        score = teacher.score

        def spied(rollouts: Rollouts, keep_N: Tensor, *rest: Any) -> Any:
            evidence = score(rollouts, keep_N, *rest)
            assert torch.equal(evidence.scored_N, teacher.reach_N(rollouts) & rollouts.trained_N)
            for r in rollouts.responses:
                texts.append((r, list(rollouts.responses)))
            return evidence

        teacher.score = spied  # type: ignore[method-assign]
        trained(parts)
    seen = set()
    for r, all_of_it in texts:
        others = [o.text for o in all_of_it if o is not r and o.group == r.group and o.correct]
        assert (r.privileged_ids is None) == (not others)
        if r.privileged_ids is not None:
            said = "good" if r.correct else f"no; {r.problem.answer}"
            want = f"{r.problem.prompt};{others[0]};{said}"
            assert parts.student.tokenizer.decode(r.privileged_ids) == want
        seen.add((r.correct, not others))
    assert {(True, False), (False, False)} <= seen
    for row, start in zip(rows_of(tmp_path / "run"), range(0, 36, 12), strict=True):
        none = sum(r.privileged_ids is None for r, _ in texts[start : start + 12])
        assert row["without_context"] == none / 12


def test_a_response_without_a_prompt_is_never_scored_and_a_step_without_any_moves_nothing(world: Path, tmp_path: Path):
    rollouts = Rollouts.of(step_of_two_groups())
    with pytest.raises(ValueError, match="no prompt for"):
        own(toy(1), kind="initial").score(rollouts, rollouts.trained_N, "token", 1.0)
    raw = raw_recipe(
        world,
        None,
        objective=[{"distill": OWN}],
        self_teacher={"context": "{prompt}{sibling}"},
        task={"verifier": {"name": f"{world / 'judge.py'}:never"}},
    )
    run(raw, tmp_path / "run")
    for row in rows_of(tmp_path / "run"):
        assert row["without_context"] == 1.0
        assert row["loss"] == row["grad_norm"] == row["teacher_calls"] == 0


def test_dynamic_sampling_asks_for_contexts_too(world: Path, tmp_path: Path):
    raw = raw_recipe(
        world,
        None,
        objective=[{"policy_gradient": {}}, {"distill": OWN}],
        self_teacher={"context": "{answer}{prompt}"},
        rollout={"dynamic_sampling": 2, "group": 2},
    )
    run(raw, tmp_path / "run")
    for row in rows_of(tmp_path / "run"):
        assert row["dropped_groups"] == 0, "the distillation term wants every group"


# ---- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "there is nothing to learn from it: set self_teacher.context"),
        ({"self_teacher": {"kind": "past"}}, "past needs it, as in {kind: past, every: 100}"),
        ({"self_teacher": {"kind": "ema", "every": 3}}, "`every` belongs to kind past"),
        ({"self_teacher": {"kind": "initial", "rate": 0.1}}, "kind initial has none, kind ema does"),
        ({"self_teacher": {"kind": "ema", "rate": 1.5}}, "a share between 0 and 1, not 1.5"),
        ({"self_teacher": {"context": "{prompt}"}}, "nothing that the student does not see"),
        ({"self_teacher": {"context": "{promt}{answer}"}}, "{promt}; did you mean 'prompt'"),
        ({"self_teacher": {"context": "{answer"}}, "is no format string"),
        (
            {"self_teacher": {"context": "{prompt}{sibling}"}, "rollout": {"group": 1}},
            "a group of one has none",
        ),
        (
            {"self_teacher": {"kind": "ema"}, "objective": [{"policy_gradient": {}}]},
            "self_teacher is described, but no term asks it",
        ),
        (
            {
                "self_teacher": {"context": "{prompt}{feedback}"},
                "source": {"mixture": 0.5},
                "objective": [{"distill": {"teacher": "self"}}],
            },
            "gold text is not verified",
        ),
    ],
)
def test_what_cannot_teach_is_refused(change: dict[str, Any], words: str, world: Path):
    with pytest.raises(UserError) as caught:
        load_recipe(raw_recipe(world, None) | {"objective": [{"distill": OWN}]} | change)
    assert words in str(caught.value)


def test_contexts_that_do_not_fit_or_have_nothing_to_show_are_refused(world: Path, tmp_path: Path):
    raw = raw_recipe(world, None, objective=[{"distill": OWN}], self_teacher={"context": "{prompt}{sibling}"})
    with (
        pytest.raises(UserError, match=r"self_teacher\.context, filled in, and the responses make"),
        parts_of(raw, tmp_path, "rollout.max_new_tokens=62"),
    ):
        pass


@pytest.mark.parametrize("settings", [{}, {"kind": "ema"}, {"kind": "past", "every": 3}, {"context": "{answer}"}])
def test_a_resolved_recipe_reads_back(settings: dict[str, Any], world: Path, tmp_path: Path):
    on = ["student"] if settings else ["privileged"]
    terms = [{"policy_gradient": {}}, {"distill": OWN | {"on": on}}]
    raw = raw_recipe(world, None, objective=terms, self_teacher=settings)
    if not settings:
        raw["source"] = {"privileged": {"template": "{prompt}{answer}"}}
    recipe = load_recipe(raw)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
