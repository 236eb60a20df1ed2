"""Mixture-of-experts teachers: experts by number against the model's own, a router's step by hand, draws, resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import attempt, kill_until_done, server
from test_resume import assert_same_run, tensors_of
from tiny import made_responses, plain_logp, raw_recipe, rows_of, run, section, toy
from torch import Tensor
from torch.func import functional_call
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from kdrl.batch import Rollouts
from kdrl.errors import UserError
from kdrl.models import LoadedModel
from kdrl.objectives.schedules import Moment
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe
from kdrl.teachers import PreparedTeacher
from kdrl.teachers.prepare import read_prepare

INNER = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
MADE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": INNER | {"shared_expert_intermediate_size": 12, "norm_topk_prob": False},
    "qwen3_moe": INNER | {"norm_topk_prob": True},
}
MOMENT = Moment(1, 4)


def made(kind: str = "mixtral", **change: Any) -> LoadedModel:
    """Two layers of four experts, of which the model takes two; the eager experts compute in float64."""
    loaded = toy(2, sharp=4.0, architecture=kind, layers=2, settings=MADE[kind] | change)
    loaded.model.set_experts_implementation("eager")
    with torch.no_grad():
        for weight in loaded.model.parameters():
            if weight.ndim == 3:
                weight.mul_(20.0)
    return loaded


def prepared(teacher: LoadedModel, budget: int = 4096, seed: int = 3, **settings: Any) -> PreparedTeacher:
    preparation = read_prepare({"experts": settings}).build(teacher, seed)
    return PreparedTeacher(teacher, budget, preparation, toy(1))


def logp_of(one: PreparedTeacher, rollouts: Rollouts) -> Tensor:
    return one.score(rollouts, rollouts.trained_N, "token", 1.0).logp_N.double()


@pytest.mark.parametrize(("use", "count"), [(1, 1), (2, 2), (-1, 3), ("all", 4)])
@pytest.mark.parametrize("kind", list(MADE))
def test_so_many_experts_answer_as_in_a_model_made_with_them(kind: str, use: Any, count: int):
    teacher, responses = made(kind), made_responses()
    rollouts = Rollouts.of(responses)
    twin = made(kind, num_experts_per_tok=count)
    twin.model.load_state_dict(teacher.model.state_dict())
    want = [
        plain_logp(twin, r.prompt_ids, r.token_ids).gather(-1, torch.tensor(r.token_ids)[:, None]) for r in responses
    ]
    own = plain_logp(teacher, [3, 4], [5, 6])
    one = prepared(teacher, use=use)
    assert one.prepare(rollouts, rollouts.trained_N, 1.0, MOMENT) == {}
    found = logp_of(one, rollouts)
    torch.testing.assert_close(found, torch.cat(want)[:, 0].detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(plain_logp(teacher, [3, 4], [5, 6]), own)
    bare = logp_of(prepared(teacher, use=2), rollouts)
    assert ((bare - found).abs().max() > 1e-3) == (count != 2)


def by_hand(teacher: LoadedModel, student: LoadedModel, weights: dict[str, Tensor], keep_N: Tensor) -> Tensor:
    """KL(p' || q) + 0.3 load balance of the kept tokens by the model's own forward and transformers' own balance."""
    twin = copy.deepcopy(teacher.model)
    for module in twin.modules():
        if hasattr(module, "top_k"):
            module.top_k = 4
    losses, routes, at = [], [], 0
    for r in made_responses():
        ids = torch.tensor([r.prompt_ids + r.token_ids])
        given = {"input_ids": ids, "use_cache": False, "output_router_logits": True}
        told: Any = functional_call(twin, {f"{name}.weight": w for name, w in weights.items()}, (), given)
        keep = keep_N[at : at + len(r.token_ids)]
        at += len(r.token_ids)
        place = slice(len(r.prompt_ids) - 1, -1)
        p = torch.log_softmax(told.logits[0, place, : teacher.vocab_size], -1)[keep]
        q = plain_logp(student, r.prompt_ids, r.token_ids).detach()[keep]
        losses.append((p.exp() * (p - q)).sum(-1))
        routes.append([logits[place][keep] for logits in told.router_logits])
    layers = [torch.cat(layer) for layer in zip(*routes, strict=True)]
    balance: Any = sum(load_balancing_loss_func((layer,), 4, 2) for layer in layers) / len(layers)
    return torch.cat(losses).mean() + 0.3 * balance


@pytest.mark.parametrize("budget", [1, 4096])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_routers_loss_gradient_and_step_by_hand(kind: str, budget: int):
    teacher = made(kind)
    rollouts = Rollouts.of(made_responses())
    keep = torch.arange(rollouts.tokens) % 3 != 1
    one = prepared(teacher, budget, router={"lr": 1e-2, "balance": 0.3, "clip": None})
    weights: dict[str, Tensor] = dict(one.preparation.parameters)
    assert len(weights) == 2
    before = {name: w.detach().clone() for name, w in weights.items()}
    want = by_hand(teacher, one.student, weights, keep)
    gradients = torch.autograd.grad(want, list(weights.values()))
    stored = {name: w.clone() for name, w in teacher.model.state_dict().items()}
    told = one.prepare(rollouts, keep, 1.0, MOMENT)
    assert told["prepare/loss"] == pytest.approx(float(want.detach()), rel=1e-5)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert told["prepare/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        # AdamW's first step is lr times the gradient's sign.
        want_step = before[name] - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(weight.detach(), want_step, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(w, stored[name]) for name, w in teacher.model.state_dict().items())
    assert all(w.grad is None and not w.requires_grad for w in teacher.model.parameters())


def test_a_fitted_router_lowers_its_loss_and_is_what_scores():
    teacher = made()
    rollouts = Rollouts.of(made_responses())
    one = prepared(teacher, router={"lr": 0.1, "balance": 0.0})
    first = logp_of(one, rollouts)
    seen = [one.prepare(rollouts, rollouts.trained_N, 1.0, MOMENT)["prepare/loss"] for _ in range(15)]
    assert seen[-1] < 0.98 * seen[0]
    assert (logp_of(one, rollouts) - first).abs().max() > 1e-3
    torch.testing.assert_close(logp_of(prepared(teacher, router={}), rollouts), first)


def test_draws_follow_the_routers_probabilities_and_the_share():
    """Sampling 2 of 3 without replacement: expert c is left out with sum over orders of p_a p_b / (1 - p_a)."""
    teacher = made(num_local_experts=3)
    preparation: Any = read_prepare({"experts": {"use": -1, "sample": {"share": 0.5}}}).build(teacher, 0)
    p = torch.tensor([0.6, 0.3, 0.1])
    left, drawn = torch.zeros(3), 0
    names = list(preparation._routers)
    for step in range(1500):
        preparation.begin(Moment(step, 1500))
        for name in [n for n in names if n in preparation._noise]:
            drawn += 1
            _, scores, chosen = preparation._draw(name, (p.log()[None], p[None, :2], torch.tensor([[0, 1]])))
            left[3 - int(chosen.sum())] += 1
            torch.testing.assert_close(scores[0], p[chosen[0]] / p[chosen[0]].sum())
    a, b, c = p.tolist()
    want = torch.tensor(
        [b * c / (1 - b) + c * b / (1 - c), a * c / (1 - a) + c * a / (1 - c), a * b / (1 - a) + b * a / (1 - b)]
    )
    assert abs(drawn / 3000 - 0.5) < 0.03
    assert ((left / drawn - want).abs() < 0.05).all()


def test_a_draw_is_of_the_step_and_not_of_the_micro_batches():
    teacher, rollouts = made(), Rollouts.of(made_responses())
    often = {"use": 2, "sample": {"share": 1.0}}

    def scored(step: int, budget: int = 4096, seed: int = 3) -> Tensor:
        one = prepared(teacher, budget, seed, **often)
        one.prepare(rollouts, rollouts.trained_N, 1.0, Moment(step, 9))
        return logp_of(one, rollouts)

    torch.testing.assert_close(scored(1), scored(1, budget=1), atol=1e-6, rtol=1e-6)
    likeliest = logp_of(prepared(teacher, use=2), rollouts)
    for other in (scored(2), scored(1, seed=4), likeliest):
        assert (scored(1) - other).abs().max() > 1e-3
    rare = prepared(teacher, use=2, sample={"share": 0.0})
    rare.prepare(rollouts, rollouts.trained_N, 1.0, MOMENT)
    assert torch.equal(logp_of(rare, rollouts), likeliest)


def recipe(world: Path, method: str, **change: Any) -> dict[str, Any]:
    teacher = section(architecture="mixtral", layers=2, settings=MADE["mixtral"])
    return raw_recipe(world, method, teacher=teacher, optimizer={"lr": 1e-2}, **change)


@pytest.mark.parametrize("method", ["moe-sar", "moe-ka"])
def test_the_method_runs(method: str, world: Path, tmp_path: Path):
    run(recipe(world, method), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(("prepare/loss" in row) == (method == "moe-sar") for row in rows)


def test_a_killed_run_goes_on_with_its_routers(world: Path, tmp_path: Path):
    raw = recipe(world, "moe-sar", steps=5, checkpoint={"every": 1, "keep": 2})
    raw["teacher"]["prepare"] = {"experts": {"router": {"lr": 1e-2}}}
    context = server()
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    died, _ = kill_until_done(context, raw, tmp_path / "killed", seed=1, kills=1)
    assert died >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    found = tensors_of(tmp_path / "whole" / "checkpoints" / "step-000005")
    assert any(key.startswith("prepared_teacher") and key.endswith("mlp.gate|exp_avg") for key in found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use": 5}, r"experts.use=5: the teacher has 4 experts in a layer; take 1 to 4"),
        ({"use": -4}, r"experts.use=-4: the teacher has 4 experts"),
        ({"use": 4, "sample": {}}, r"sample draws from 4 experts, and use=4 takes all of them"),
    ],
)
def test_a_number_of_experts_that_is_not_there_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        prepared(made(), **settings)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="Qwen3ForCausalLM has no experts to choose from; take a mixture-of-experts"):
        prepared(toy(2))
    odd = made()
    layer: Any = odd.model.model.layers[0]  # type: ignore[union-attr]
    layer.mlp.gate.register_forward_hook(lambda module, args, told: (told[0], told[1] * 0.5, told[2]))
    with pytest.raises(UserError, match=r"mlp.gate \(MixtralTopKRouter\) does not choose its experts by the largest"):
        prepared(odd)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use": 0}, "`use` is a number of experts"),
        ({"use": "some"}, "experts.use"),
        ({"sample": {}}, "`use: all` leaves none out; set use, as in use: -1"),
        ({"use": 2, "sample": {}, "router": {}}, "`sample` and `router` are two ways"),
        ({"router": {"balanced": 1}}, "did you mean 'balance'"),
        ({"lr": 1e-3}, "experts.lr is no recipe key"),
    ],
)
def test_a_mistake_has_its_sentence(settings: dict[str, Any], words: str, world: Path):
    raw = recipe(world, "moe-sar")
    raw["teacher"]["prepare"] = {"experts": settings}
    with pytest.raises(UserError) as caught:
        load_recipe(raw)
    assert words in str(caught.value)


def test_a_resolved_recipe_reads_back_and_the_plan_counts_what_is_fitted(world: Path, tmp_path: Path):
    for method in ("moe-sar", "moe-ka"):
        found = load_recipe(recipe(world, method))
        (tmp_path / "recipe.yaml").write_text(found.to_yaml())
        assert load_recipe(tmp_path / "recipe.yaml") == found
        assert any(item.phase == "prepare" for item in memory_plan(found).items) == (method == "moe-sar")
