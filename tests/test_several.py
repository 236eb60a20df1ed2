"""Several teachers as one: whose scores a response gets, means and choices by plain references, resume."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import attempt, kill_until_done, server
from test_resume import assert_same_run
from tiny import (
    gradient,
    made_responses,
    parts_of,
    plain_gradient,
    plain_logp,
    raw_recipe,
    rows_of,
    run,
    score,
    section,
    toy,
)
from torch import Tensor

from kdrl import build
from kdrl.batch import Rollouts
from kdrl.errors import UserError
from kdrl.objectives.head import Head
from kdrl.objectives.support import Few
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe, merge
from kdrl.teachers import LocalTeacher, ReferenceTeacher, Teacher
from kdrl.teachers.base import Evidence, Gives
from kdrl.teachers.combined import AverageConfig, BestConfig, RouteConfig
from kdrl.teachers.several import AveragedTeacher, BestTeacher, RoutedTeacher
from kdrl.yamls import load_yaml

TOKEN: dict[str, Any] = {"support": {"token": "k2"}}
FULL: dict[str, Any] = {"divergence": "forward_kl"}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"A": toy(2), "B": toy(5, hidden_size=24), "C": toy(9)}


@pytest.fixture
def teachers(models: dict[str, Any]) -> dict[str, Teacher]:
    return {name: LocalTeacher(loaded, 60) for name, loaded in models.items()}


@pytest.fixture
def rollouts() -> Rollouts:
    responses = made_responses()
    for response in responses:
        domain = ["math", "code", "law"][response.group]
        response.problem = replace(response.problem, meta={"domain": domain})
    return Rollouts.of(responses)


def whole(loaded: Any, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probs `[N, V]` from a model's own logits."""
    rows = [plain_logp(loaded, r.prompt_ids, r.token_ids, temperature) for r in rollouts.responses]
    return torch.cat(rows).detach().double()


def at_tokens(logp_NV: Tensor, rollouts: Rollouts) -> Tensor:
    return logp_NV.gather(-1, rollouts.tokens_N[:, None]).squeeze(-1)


def read_whole(found: Evidence, rollouts: Rollouts, size: int) -> Tensor:
    index = found.scored_N.nonzero().squeeze(1)
    return found.logp(index, torch.empty(len(index), size, dtype=torch.float64))


def near(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.double(), want.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_routing_gives_each_response_to_its_teacher_alone(models, teachers, rollouts: Rollouts, temperature: float):
    routed = RoutedTeacher("r", teachers, RouteConfig(by="domain", to={"math": "A", "code": "B"}, otherwise="C"))
    found = routed.score(rollouts, rollouts.trained_N, "distribution", temperature)
    all_NV = torch.stack([whole(models[name], rollouts, temperature) for name in "ABC"])
    want_NV = all_NV[rollouts.group_B[rollouts.row_N], torch.arange(rollouts.tokens)]
    near(read_whole(found, rollouts, want_NV.shape[1]), want_NV)
    near(found.logp_N, at_tokens(want_NV, rollouts))
    assert found.calls == rollouts.rows
    assert {name: part.calls for name, part in found.parts("r").items()} == {"A": 3, "B": 3, "C": 3}
    assert sum(found.shares().values()) == pytest.approx(1.0)


def test_a_problem_of_no_teacher_or_without_the_column_is_refused(teachers, rollouts: Rollouts):
    for by, said in (("domain", "names no teacher for domain='law'"), ("domian", "did you mean 'domain'")):
        routed = RoutedTeacher("r", teachers, RouteConfig(by=by, to={"math": "A", "code": "B"}))
        with pytest.raises(UserError, match=said):
            routed.score(rollouts, rollouts.trained_N, "token", 1.0)


WEIGHTS = {"A": 1.0, "B": 2.0, "C": 0.5}


def mean_of(models: dict[str, Any], rollouts: Rollouts, space: str, temperature: float) -> Tensor:
    shares = [w / sum(WEIGHTS.values()) for w in WEIGHTS.values()]
    all_NV = [whole(models[name], rollouts, temperature) for name in WEIGHTS]
    if space == "probability":
        return sum(w * p.exp() for w, p in zip(shares, all_NV, strict=True)).log()  # type: ignore[union-attr]
    product = sum(w * p for w, p in zip(shares, all_NV, strict=True))
    return product - product.exp().sum(-1, keepdim=True).log()  # type: ignore[union-attr]


@pytest.mark.parametrize("space", ["probability", "log"])
@pytest.mark.parametrize("need", ["token", "distribution"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_means_are_the_references(models, teachers, rollouts: Rollouts, space: Any, need: Any, temperature: float):
    averaged = AveragedTeacher("m", teachers, AverageConfig(of=WEIGHTS, space=space))
    keep_N = rollouts.trained_N & (torch.arange(rollouts.tokens) % 3 != 1)
    found = averaged.score(rollouts, keep_N, need, temperature)
    want_NV = mean_of(models, rollouts, space, temperature)
    near(found.logp_N, torch.where(keep_N, at_tokens(want_NV, rollouts), 0.0))
    assert torch.equal(found.scored_N, keep_N)
    assert found.fan == 3
    if need == "distribution":
        near(read_whole(found, rollouts, want_NV.shape[1]), want_NV[keep_N])


def test_the_gradient_under_a_mean_is_that_of_the_mean(models, teachers, rollouts: Rollouts):
    student = toy(1, trainable=True)
    averaged = AveragedTeacher("m", teachers, AverageConfig(of=WEIGHTS))
    scored = score(student, rollouts.responses, [{"distill": FULL}], teacher=models["A"])
    scored = replace(scored, evidence={"teacher": averaged.score(rollouts, rollouts.trained_N, "distribution", 1.0)})
    p_NV = mean_of(models, rollouts, "probability", 1.0).exp()

    def loss() -> Tensor:
        rows = [plain_logp(student, r.prompt_ids, r.token_ids) for r in rollouts.responses]
        return -(p_NV * torch.cat(rows)).sum(-1).mean()

    found, want = gradient(student, scored), plain_gradient(student, loss)
    assert (found - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("per", ["response", "token"])
@pytest.mark.parametrize("by", ["cross_entropy", "confidence"])
@pytest.mark.parametrize("need", ["token", "distribution"])
def test_the_best_is_the_one_with_the_best_score(models, teachers, rollouts: Rollouts, per: Any, by: Any, need: Any):
    found = BestTeacher("b", teachers, BestConfig(of=("A", "B", "C"), by=by, per=per)).score(
        rollouts, rollouts.trained_N, need, 1.0
    )
    all_NV = [whole(models[name], rollouts) for name in "ABC"]
    likely = torch.stack([at_tokens(p, rollouts) for p in all_NV])
    value = likely if by == "cross_entropy" else torch.stack([p.exp().amax(-1) for p in all_NV])
    want_N = torch.empty(rollouts.tokens, dtype=torch.long)
    for row in range(rollouts.rows):
        mine = rollouts.row_N == row
        want_N[mine] = value[:, mine].mean(1).argmax() if per == "response" else value[:, mine].argmax(0)
    assert len(want_N.unique()) > 1
    near(found.logp_N, likely.gather(0, want_N[None])[0])
    assert found.calls == 3 * rollouts.rows == found.fan * rollouts.rows
    if need == "distribution":
        want_NV = torch.stack(all_NV)[want_N, torch.arange(rollouts.tokens)]
        near(read_whole(found, rollouts, want_NV.shape[1]), want_NV)


class FewTeacher:
    """Gives the likeliest tokens of a model alone."""

    def __init__(self, loaded: Any, k: int) -> None:
        self.local, self.k = LocalTeacher(loaded, 60), k

    @property
    def gives(self) -> Gives:
        return Gives(distribution=False, topk=self.k)

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Any, temperature: float) -> Evidence:
        found = self.local.score(rollouts, keep_N, "distribution", temperature)
        assert isinstance(found.head, Head)
        assert found.hidden_MD is not None
        top = found.head.logp(found.hidden_MD, temperature).topk(self.k)
        few = Few(top.indices, top.values)
        return Evidence(found.logp_N, found.where_N, found.calls, temperature=temperature, few=few)


def test_likeliest_tokens_are_routed_too_and_cut_to_what_all_give(models, rollouts: Rollouts):
    few: dict[str, Teacher] = {"A": FewTeacher(models["A"], 4), "B": FewTeacher(models["B"], 6)}
    routed = RoutedTeacher("r", few, RouteConfig(by="domain", to={"code": "B"}, otherwise="A"))
    assert routed.gives == Gives(distribution=False, topk=4)
    found = routed.score(rollouts, rollouts.trained_N, "few", 1.0)
    assert found.few is not None
    for name, group in (("A", (0, 2)), ("B", (1,))):
        mine = torch.isin(rollouts.group_B[rollouts.row_N], torch.tensor(group))
        want = whole(models[name], rollouts)[mine].topk(4)
        got = found.few.at(found.where_N[mine])
        assert torch.equal(got.ids_NK, want.indices)
        near(got.logp_NK, want.values)


def test_means_of_logs_and_confidence_need_whole_distributions(models):
    few: dict[str, Teacher] = {"A": LocalTeacher(models["A"], 60), "B": FewTeacher(models["B"], 6)}
    with pytest.raises(UserError, match=r"B gives no distribution; set average\.space to probability"):
        AveragedTeacher("m", few, AverageConfig(of={"A": 1, "B": 1}, space="log"))
    with pytest.raises(UserError, match=r"set best\.by to cross_entropy"):
        BestTeacher("b", few, BestConfig(of=("A", "B"), by="confidence"))
    assert AveragedTeacher("m", few, AverageConfig(of={"A": 1, "B": 1})).gives == Gives(distribution=False)


def several(world: Path, **change: Any) -> dict[str, Any]:
    return raw_recipe(
        world,
        None,
        objective=[{"distill": TOKEN | {"teacher": "A"}}, {"distill": FULL | {"teacher": "all", "weight": 0.5}}],
        teachers={
            "A": {"model": str(world / "teacher")},
            "B": section(hidden_size=24),
            "all": {"average": {"of": {"A": 2, "B": 1}}},
        },
        **change,
    )


def test_terms_ask_their_own_teachers_and_metrics_name_them(world: Path, tmp_path: Path):
    rows = rows_of(run(several(world), tmp_path / "run").run_dir)
    asked = rows[-1]["responses"]
    assert rows[-1]["teacher_calls/A"] == 2 * asked
    assert rows[-1]["teacher_calls/B"] == asked
    assert rows[-1]["teacher_calls"] == 3 * asked
    assert rows[-1]["teacher_calls_saved"] == 0
    assert all(math.isfinite(rows[0][f"kl_teacher/{name}"]) for name in "AB")
    assert rows[0]["kl_teacher/A"] != rows[0]["kl_teacher/B"]
    assert rows[0]["loss/distill.0"] > 0
    assert rows[0]["loss/distill.1"] > 0


def test_a_recipes_own_teacher_may_be_a_combination_and_reads_back(world: Path, tmp_path: Path):
    raw = several(world)
    raw["teacher"] = {"route": {"by": "answer", "to": {"3": "A"}, "otherwise": "B"}}
    raw["teachers"].pop("all")
    raw["objective"] = [{"distill": TOKEN}]
    recipe = load_recipe(raw)
    assert load_recipe(load_yaml(recipe.to_yaml(), "recipe")) == recipe  # type: ignore[arg-type]
    row = rows_of(run(recipe, tmp_path / "run").run_dir)[-1]
    assert row["chosen/A"] + row["chosen/B"] == pytest.approx(1.0)
    assert row["teacher_calls/A"] + row["teacher_calls/B"] == row["responses"]


def test_identical_checkpoints_are_loaded_and_planned_once(world: Path, tmp_path: Path, monkeypatch):
    loads: list[Any] = []
    real = build.load_model

    def counted(config: Any, *rest: Any, **more: Any) -> Any:
        loads.append(config)
        return real(config, *rest, **more)

    monkeypatch.setattr(build, "load_model", counted)
    raw = several(world)
    raw["teachers"]["B"] = {"model": str(world / "elsewhere" / ".." / "teacher")}
    (world / "elsewhere").mkdir(exist_ok=True)
    with parts_of(raw, tmp_path) as parts:
        assert len(loads) == 2
        one, other = (t.loaded for t in parts.teachers["all"].teachers.values())  # type: ignore[attr-defined]
        assert one is other is parts.teachers["A"].loaded  # type: ignore[attr-defined]
    twice = [item.name for item in memory_plan(load_recipe(raw)).items if "weights" in item.name]
    assert twice == ["student weights", "teacher weights"]
    names = [item.name for item in memory_plan(load_recipe(several(world))).items]
    assert {"teacher weights", "B weights", "B hidden states"} <= set(names)


def test_a_teacher_that_is_the_adapters_base_shares_its_weights(world: Path, tmp_path: Path, monkeypatch):
    raw = raw_recipe(world, None, objective=[{"distill": FULL}], optimizer={"lr": 1e-2})
    raw["student"] = {"model": str(world / "teacher"), "lora": {"rank": 2}}
    raw["teacher"] = {"model": str(world / "teacher")}
    with parts_of(raw, tmp_path / "a") as parts:
        shared = parts.teachers["teacher"]
        assert isinstance(shared, ReferenceTeacher)
        assert shared.loaded is parts.student
    assert "teacher weights" not in [item.name for item in memory_plan(load_recipe(raw)).items]
    run(raw, tmp_path / "shared")
    # Another folder for the same bytes would be shared too; another number format is a model of its own.
    apart = copy.deepcopy(raw)
    (tmp_path / "copy").mkdir()
    for file in (world / "teacher").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    apart["teacher"] = {"model": str(tmp_path / "copy")}
    run(apart, tmp_path / "apart")
    for one, other in zip(rows_of(tmp_path / "shared"), rows_of(tmp_path / "apart"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-7)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-7)


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return server()


def test_killed_and_resumed_equals_undisturbed(world: Path, tmp_path: Path, context: ForkServerContext):
    raw = several(world, steps=6, checkpoint={"every": 1, "keep": 2})
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    died, _ = kill_until_done(context, raw, tmp_path / "killed", seed=4, kills=2)
    assert died >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teachers": {"C": section()}}, r"teachers\.C is asked by no term; set objective\.distill\.teacher=C"),
        ({"objective": [{"distill": TOKEN | {"teacher": "al"}}]}, "no teacher is called 'al'; did you mean 'all'"),
        ({"teachers": {"all": {"average": {"of": {"A": 1, "Z": 1}}}}}, "names 'Z', which is no teacher"),
        ({"teachers": {"all": {"average": {"of": {"A": 1}}}}}, "at least 2"),
        ({"teachers": {"all": {"average": {"of": {"A": 1, "B": -1}}}}}, "greater than 0"),
        ({"teachers": {"all": {"mean": {"of": {"A": 1}}}}}, "mean is no recipe key"),
        ({"teachers": {"more": {"best": {"of": ["A", "all"]}}}}, "'all', which is a combination itself"),
        (
            {"teachers": {"B": {"prepare": {"soft_prompt": {"tokens": 2, "lr": 0.1}}}}},
            r"teachers\.B\.prepare is fitted",
        ),
        ({"objective": [{"distill": TOKEN}]}, r"teachers\.A is asked by no term; set objective\.distill\.teacher=A"),
        ({"teachers": {"self": section()}}, r"teachers\.self: the student itself"),
    ],
)
def test_what_cannot_work_is_refused(world: Path, change: dict[str, Any], said: str):
    raw = several(world)
    if "average" in str(change.get("teachers", "")) or "mean" in str(change):
        raw["teachers"].pop("all")
    with pytest.raises(UserError, match=said):
        load_recipe(merge(raw, change))


def test_combinations_neither_write_nor_are_two_of_one_name(world: Path):
    raw = several(world)
    raw["teachers"]["teacher"] = raw["teachers"].pop("all")
    raw["objective"] = [{"distill": FULL}, {"distill": TOKEN | {"teacher": "A", "on": ["student"]}}]
    load_recipe(raw)
    with pytest.raises(UserError, match="several cannot write at once"):
        load_recipe(raw | {"source": "teacher"})
    with pytest.raises(UserError, match="two teachers of one name"):
        load_recipe(raw | {"teacher": section()})


OTHER = {"tokenizer": {"characters": "9876543210+-=;#abcdefghijklmnopqrstuvwxyz ."}}
ROUTE = {"route": {"by": "answer", "to": {"2": "A"}}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teachers": {"B": OTHER}}, r"teachers\.B has another tokenizer than the student"),
        ({"teachers": {"B": {"eos": ["#"]}}}, r"student and teachers\.B end .*Set teachers\.B\.eos"),
        ({"teachers": {"B": {"model": {"max_positions": 8}}}}, r"teachers\.B reads at most 8 tokens"),
        ({"teachers": {"B": {"offload": True, "model": {"hidden_size": 24}}}}, r"teachers\.B\.offload moves"),
        ({"teachers": {"B": {"cache": "/none"}}}, r"store them: teachers\.B\.cache=\{path"),
        ({"teachers": {"R": {"route": {"by": "colour", "to": {"x": "A"}}}}}, r"teachers\.R\.route\.by=colour"),
    ],
)
def test_a_refusal_names_which_of_several_teachers_is_meant(
    change: dict[str, Any], says: str, world: Path, tmp_path: Path
):
    names = ["A", "B", *(["R"] if "R" in change["teachers"] else [])]
    terms = [{"distill": TOKEN | {"teacher": name}} for name in names]
    raw = raw_recipe(world, None, objective=terms, teachers={"A": section(), "B": section()})
    with pytest.raises(UserError, match=says):
        run(merge(raw, change), tmp_path / "run")


def test_a_route_that_is_left_open_names_its_section(world: Path, tmp_path: Path):
    raw = raw_recipe(world, None, objective=[{"distill": TOKEN}], teachers={"A": section()}, teacher=ROUTE)
    with pytest.raises(UserError, match=r"^teacher\.route"):
        run(raw, tmp_path / "run")
