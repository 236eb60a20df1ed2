"""What the recipes of examples/systems compute and read, against few-line references of their own."""

from __future__ import annotations

import itertools
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.making import read
from features.toys import own, pair, responses, step, updater_of
from objectives.reference import as_tensor, close, distribution_loss, kl, log_softmax, softmax
from test_examples import ROOT
from tiny import (
    assert_near,
    go,
    gradient,
    made_responses,
    parts_of,
    plain_gradient,
    plain_logp,
    raw_recipe,
    rows_of,
    run,
    score,
    toy,
    with_teacher,
)
from torch import Tensor

from kdrl.batch import Response
from kdrl.data.generate import GenerateConfig, generate
from kdrl.data.inputs import open_inputs
from kdrl.methods import get_method
from kdrl.models import LoadedModel
from kdrl.objectives.distill import DistillConfig
from kdrl.objectives.schedules import Moment
from kdrl.tasks import build_task
from kdrl.tasks.base import take
from kdrl.yamls import load_yaml

FOLDER = ROOT / "examples" / "systems"


@pytest.fixture(autouse=True)
def in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def recipe_of(name: str) -> dict[str, Any]:
    return load_yaml((FOLDER / f"{name}.yaml").read_text(), name)


def entries(name: str) -> list[dict[str, Any]]:
    return recipe_of(name)["objective"]


def distill_of(name: str) -> DistillConfig:
    (found,) = [entry["distill"] for entry in entries(name) if "distill" in entry]
    return DistillConfig.model_validate(found)


def token_logp(model: LoadedModel, response: Response) -> Tensor:
    ids = torch.tensor(response.token_ids)[:, None]
    return plain_logp(model, response.prompt_ids, response.token_ids).gather(-1, ids)[:, 0]


@pytest.mark.parametrize("base", [1.00001, 1.5])
def test_apo_shapes_the_leash_by_success_and_wrong_responses_by_length(base: float):
    student, start, texts = toy(1, trainable=True), toy(3), made_responses()
    terms = entries("apo")
    terms[0]["policy_gradient"]["scale"] = {"stcr": {"base": base}}
    found = gradient(student, score(student, texts, terms, reference=start))

    def loss() -> Tensor:
        total = torch.zeros(())
        for group in range(3):
            mine = [r for r in texts if r.group == group]
            rewards = np.array([r.reward for r in mine])
            lengths = [len(r.token_ids) for r in mine if r.correct]
            for r in mine:
                worth = (r.reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
                excess = max(0.0, len(r.token_ids) - np.mean(lengths)) if lengths else 0.0
                longer = 1.0 if r.correct else 2.0 - base**-excess
                leash = 1.0 - math.exp(-math.e * len(lengths) / 3) if r.correct and len(lengths) < 3 else 1.0
                logq = token_logp(student, r)
                u = (token_logp(start, r) - logq).detach().clamp(-10, 10).exp()
                total = total + (-worth * longer * logq + 1.0e-3 * leash * (1.0 - u) * logq).mean() / len(texts)
        return total

    assert_near(found, plain_gradient(student, loss))


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_genarm_tilts_the_base_by_the_reward_model(b: float):
    reward, student, base = np.random.default_rng(0).normal(size=(3, 4, 7))
    config = distill_of("genarm")
    if b != 1.0:
        given = {"product": 1.0 / (1.0 + b), "power": 1.0 + 1.0 / b}
        config = DistillConfig.model_validate({"divergence": "forward_kl", "support": "full", "target": given})
    logs = [as_tensor(log_softmax(z)) for z in (reward, student, base)]
    value = distribution_loss(config, *logs[:2], reference_CV=logs[2])
    tilted = softmax(log_softmax(base) + log_softmax(reward) / b)
    close(value, [kl(p, q) for p, q in zip(tilted, softmax(student), strict=True)])


def test_f_distill_weighs_the_sampled_gradient_by_the_density_ratio():
    student, teacher, texts = toy(1, trainable=True), toy(2), made_responses()

    def loss() -> Tensor:
        parts = []
        for r in texts:
            logq = token_logp(student, r)
            log_r = token_logp(teacher, r) - logq.detach()
            h = 2.0 * log_r.exp() / (1.0 + log_r.exp())
            parts.append(-h * log_r.clamp(-10, 10) * logq)
        return torch.cat(parts).mean()

    found = gradient(student, score(student, texts, entries("f-distill"), teacher=teacher))
    assert_near(found, plain_gradient(student, loss))


F: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor]]] = {
    "forward KL": ({}, lambda r: r * r.log()),
    "reverse KL": ({"mix": 1.0}, lambda r: -r.log()),
    "Jensen-Shannon": ({"mix": 0.5}, lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log()),
    "Hellinger": ({"power": 0.5}, lambda r: (r.sqrt() - 1).square()),
}


@pytest.mark.parametrize("name", F)
def test_the_density_ratio_is_the_second_derivative_of_f_times_r_squared(name: str):
    settings, f = F[name]
    r = torch.tensor([0.01, 0.3, 1.0, 4.0, 90.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    power, mix = settings.get("power", 1.0), settings.get("mix", 0.0)
    h = (r / (1 - mix + mix * r)) ** power
    ratio = (h / (second * r.square())).detach()
    close(ratio, ratio[0].expand(5))


def test_qfd_follows_rounded_hidden_states():
    student, teacher = pair()
    (term,) = [entry for entry in entries("qfd") if "feature" in entry]
    del term["feature"]["projector"]

    def loss() -> Tensor:
        parts = []
        for r in responses():
            mine, theirs = own(student, r)[-1], own(teacher, r)[-1].detach()
            level = theirs.abs().amax(-1, keepdim=True) / 7  # 4 bits: -7 to 7
            parts.append((mine - (theirs / level).round() * level).square().mean(-1))
        return torch.cat(parts).mean()

    value, found = step(student, teacher, [{"feature": term["feature"] | {"on": ["student"]}}])
    assert value == pytest.approx(float(loss().detach()), rel=1e-5)
    assert_near(found, plain_gradient(student, loss))


def test_align_to_distill_mixes_the_scores_of_all_heads_towards_each_of_the_teachers():
    student, teacher = pair(heads=4, kv_heads=2, head_dim=4)
    terms = [entry for entry in get_method("align-to-distill").recipe["objective"] if "feature" in entry]
    term = {"feature": terms[0]["feature"] | {"weight": 1.0}}
    (mix_GH,) = updater_of(student, teacher, [term]).projectors
    assert mix_GH.shape == (8, 4)

    def loss() -> Tensor:
        parts = []
        for r in responses():
            mine = torch.cat(own(student, r, inside="attentions"))
            theirs = torch.cat(own(teacher, r, inside="attentions")).detach()
            seen = (theirs > 0)[0]
            # A row's softmax forgets the constant by which its log-probabilities differ from the scores.
            scores = torch.where(seen, mine.clamp(min=1e-300).log(), 0.0)
            mixed = torch.einsum("gh,htk->gtk", mix_GH.detach().double(), scores)
            logq = mixed.masked_fill(~seen, -torch.inf).log_softmax(-1)
            gap = torch.where(seen, theirs.clamp(min=1e-300).log() - logq, 0.0)
            parts.append((theirs * gap).sum(-1).mean(0))
        return torch.cat(parts).mean()

    value, _ = step(student, teacher, [term])
    assert value == pytest.approx(float(loss().detach()), rel=1e-5)


def test_redi_pulls_right_traces_up_and_pushes_wrong_ones_down():
    student, texts = toy(1, trainable=True), made_responses(groups=3, size=2, origin="teacher")
    for i, r in enumerate(texts):
        r.correct = i % 2 == 0
    found = gradient(student, score(student, texts, get_method("redi").recipe["objective"]))

    def loss() -> Tensor:
        of_pairs = [
            -token_logp(student, right).mean() + 0.8 * token_logp(student, wrong).mean()
            for right, wrong in zip(texts[::2], texts[1::2], strict=True)
        ]
        return torch.stack(of_pairs).mean()

    assert_near(found, plain_gradient(student, loss))


def test_spankl_keeps_old_labels_by_a_binary_kl():
    earlier, student = np.random.default_rng(1).normal(size=(2, 5, 6))
    label = np.array([0, 5, 2, 2, 3])
    value = distribution_loss(
        distill_of("spankl"), as_tensor(log_softmax(earlier)), as_tensor(log_softmax(student)), label
    )
    p, q = (softmax(z)[np.arange(5), label] for z in (earlier, student))
    close(value, p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def read_by_the_teacher(name: str, folder: Path) -> list[tuple[str, Response]]:
    """What the self-teacher of a recipe reads before each response."""
    seen: list[tuple[str, Response]] = []
    with parts_of(recipe_of(name), folder, "steps=1") as parts:
        own: Any = parts.teachers["self"]
        ask = own.score

        def spied(rollouts: Any, *more: Any) -> Any:
            for r in rollouts.responses:
                seen.append((str(parts.student.tokenizer.decode(r.privileged_ids)), r))
            return ask(rollouts, *more)

        own.score = spied
        go(parts)
    return seen


def test_filter_teaches_from_the_source_language_text(tmp_path: Path):
    seen = read_by_the_teacher("filter", tmp_path / "run")
    rows = {row["prompt"]: row for row in read(FOLDER / "data" / "translations.jsonl")}
    assert seen
    for text, r in seen:
        row = rows[str(r.problem.prompt)]
        assert (text, r.origin, r.text) == (row["answer"], "gold", row["solution"])


def test_strategies_are_read_by_the_teacher_alone(tmp_path: Path):
    seen = read_by_the_teacher("strategies", tmp_path / "run")
    rows = {row["prompt"]: row for row in read(FOLDER / "data" / "strategies.jsonl")}
    assert seen
    for text, r in seen:
        assert text == f"{r.problem.prompt}\nstrategy: {rows[str(r.problem.prompt)]['response']}\n"
        assert r.origin == "student"


def test_reasoning_paths_of_the_data_are_the_right_ones(tmp_path: Path):
    with parts_of(recipe_of("deliberation"), tmp_path / "run") as parts:
        written = parts.collector.collect(Moment(0, 2), lambda rollouts: set()).responses
    assert [r.origin for r in written] == ["gold", "student"] * 4
    assert all(r.correct for r in written if r.origin == "gold")
    assert not all(r.correct for r in written)


def test_stages_go_on_from_each_other(world: Path, tmp_path: Path):
    """AceReason: distil, reinforce on one task, then on another, each run from the result of the one before."""
    from safetensors.torch import load_file

    first = run(raw_recipe(world, "seqkd", rollout={"group": 1}, **with_teacher(world)), tmp_path / "distilled")
    again = {"student": {"model": str(first.model), "tokenizer": None}}
    same = run(raw_recipe(world, "grpo", steps=0, **again), tmp_path / "same")
    weights = [load_file(result.model / "model.safetensors") for result in (first, same)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    half = [row for row in read(world / "data.jsonl") if len(row["prompt"]) > 6]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    second = run(raw_recipe(world, "grpo", **again), tmp_path / "first-task")
    last = raw_recipe(world, "grpo", student={"model": str(second.model), "tokenizer": None})
    last["task"]["path"] = str(tmp_path / "other.jsonl")
    run(last, tmp_path / "second-task")
    assert [row["step"] for row in rows_of(tmp_path / "second-task")] == [1, 2]


def generated(name: str, out: Path, *overrides: str, **options: Any) -> list[dict[str, Any]]:
    inputs = open_inputs(FOLDER / f"{name}.yaml", [*overrides, "device=cpu"])
    generate(inputs, GenerateConfig(**options), out, say=lambda text: None)
    return read(out)


def sft_on(path: Path, folder: Path, **task: Any) -> list[dict[str, Any]]:
    raw = recipe_of("knowpo") | {"method": "sft", "source": "gold", "task": {"path": str(path)} | task}
    del raw["objective"]
    run(raw | {"log": {"rollouts_every": 1, "rollouts": 8}}, folder)
    return read(folder / "rollouts.jsonl")


def test_entigraph_writes_on_every_pair_of_entities_and_trains_on_all_of_it(tmp_path: Path):
    rows = generated("entigraph", tmp_path / "out.jsonl")
    documents = read(FOLDER / "data" / "documents.jsonl")
    pairs = {(d["text"], pair) for d in documents for pair in itertools.combinations(d["entities"], 2)}
    assert len(rows) == len(pairs) == 9
    assert {(row["prompt"].split("\n")[0], tuple(row["answer"].split(", "))) for row in rows} == pairs
    shown = sft_on(tmp_path / "out.jsonl", tmp_path / "run", columns={"solution": "response"})
    texts = {(row["prompt"], row["response"]) for row in rows}
    assert shown
    assert {(row["prompt"], row["response"]) for row in shown} <= texts


def test_mistakes_are_shown_to_the_teacher_and_only_wrong_ones(tmp_path: Path):
    rows = generated("mistakes", tmp_path / "out.jsonl", problems=5)
    wrong = [row for row in read(FOLDER / "data" / "wrong.jsonl") if not row["correct"]]
    every = take(build_task(open_inputs(FOLDER / "mistakes.yaml").task, 0).problems("train"), 100)
    assert len(rows) == 5
    assert {(str(p.prompt), p.answer) for p in every} == {
        (f"{row['prompt']}\nwrong: {row['response']}\nwhy, and what is right?\n", row["answer"]) for row in wrong
    }
    assert {row["prompt"] for row in rows} <= {str(p.prompt) for p in every}


def test_backward_teacher_text_is_a_file_with_its_columns_exchanged(tmp_path: Path):
    """Rejuvenating low-frequency words: a teacher of the other direction wrote sources for true targets."""
    rows = [{"prompt": f"{a}=", "response": f"{a}+0", "answer": str(a), "correct": True} for a in range(1, 7)]
    (tmp_path / "backward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = sft_on(tmp_path / "backward.jsonl", tmp_path / "run", columns={"prompt": "response", "solution": "prompt"})
    assert shown
    assert {(row["prompt"], row["response"]) for row in shown} <= {(row["response"], row["prompt"]) for row in rows}


def test_merged_weights_are_a_mean_or_the_middle_of_an_arc(world: Path, tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    done = run(raw_recipe(world, "sft", rollout={"group": 1}, checkpoint={"every": 1, "keep": 5}), tmp_path / "run")
    merge = runpy.run_path(str(FOLDER / "merge.py"))
    paths = [done.model, tmp_path / "run" / "checkpoints" / "step-000001" / "student.safetensors"]
    for how in ("mean", "slerp"):
        merge["merge"](how, tmp_path / how, paths)
        found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / how).named_parameters())
        ends = [load_file(done.model / "model.safetensors"), load_file(paths[1])]
        name = "model.layers.0.mlp.up_proj.weight"
        torch.testing.assert_close(found[name].data, (ends[0][name] + ends[1][name]) / 2, rtol=1e-3, atol=1e-4)
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(merge["slerp"](east, north), torch.tensor([[2.0**0.5, 2.0**0.5]]))
    torch.testing.assert_close(merge["slerp"](east, east), east)
    torch.testing.assert_close(merge["mean"](east, north), torch.tensor([[1.0, 1.0]]))
