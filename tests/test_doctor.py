"""The doctor: a good recipe has nothing wrong, each seeded fault is found in training's words, numbers are true."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import parts_of, plain_logp, raw_recipe, run, section, with_teacher

from kdrl.build import Builder
from kdrl.cli import main
from kdrl.doctor import Doctor, Effort, Finding, examine, to_json
from kdrl.doctor_samples import TOP, Accuracy, Gap, Measured, TermGradient, measure
from kdrl.doctor_verdicts import judge
from kdrl.errors import UserError
from kdrl.recipe import Recipe, load_recipe, merge
from kdrl.trainer import Trainer

FEW = Effort(problems=4, prompts=2, group=2)
ROOT = Path(__file__).parents[1]


def good(world: Path, **change: Any) -> dict[str, Any]:
    raw = raw_recipe(world, "kdrl", **with_teacher(world))
    data = world / "solved.jsonl"
    if not data.exists():
        rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
        data.write_text("".join(json.dumps(row | {"solution": f"so {row['answer']}#"}) + "\n" for row in rows))
    raw["task"] |= {"path": str(data), "verifier": {"name": "numeric", "workers": 1}}
    return merge(raw, change)


def look(raw: dict[str, Any]) -> list[Finding]:
    try:
        recipe: Recipe | None = load_recipe(raw)
    except UserError as error:
        return [Finding("recipe", "wrong", str(error))]
    return examine(recipe, effort=FEW)


def of(findings: list[Finding], what: str) -> Finding:
    return next(f for f in findings if f.what == what)


def wrongs(findings: list[Finding]) -> dict[str, str]:
    return {f.what: f.text for f in findings if f.verdict == "wrong"}


def test_a_good_recipe_has_nothing_wrong_and_every_check_a_line(world: Path):
    found = look(good(world))
    assert not wrongs(found)
    told = {f.what for f in found}
    assert told >= {"recipe", "memory", "tokenizer", "end token", "chat template", "vocabulary", "context length"}
    assert told >= {"student", "teacher", "prompt (teacher)", "temperature", "verifier", "what teacher gives"}
    assert told >= {"student's accuracy", "teacher's accuracy", "responses", "groups", "time"}
    assert told >= {"teacher's R", "teacher's overlap", "teacher's entropy"}
    assert told >= {"objective.policy_gradient", "objective.distill"}
    assert of(found, "verifier").verdict == "ok"


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "tokenizer": (
        {"teacher": section() | {"tokenizer": {"characters": "9876543210+-=;#abc"}}},
        "tokenizer",
        "another tokenizer than the student",
    ),
    "end": ({"teacher": {"eos": ["#"]}}, "end token", "end a response differently"),
    "optimizer": ({"optimizer": {"kind": "paged_adamw_8bit"}}, "optimizer.kind", "this run is on the CPU"),
    "context": ({"rollout": {"max_new_tokens": 500}}, "context length", "the student reads at most 128 tokens"),
    "split": ({"task": {"holdout": {"test": 0.0}}, "evaluate": {"final_problems": 4}}, "held-out problems", "no test"),
    "model": ({"teacher": {"model": "/no/such/folder"}}, "loading", "there is no such folder"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_that_training_refuses_are_found_in_its_words(world: Path, tmp_path: Path, name: str):
    change, what, said = FAULTS[name]
    raw = good(world)
    if "model" in change.get("teacher", {}):
        raw.pop("teacher")
    raw = merge(raw, change)
    found = look(raw)
    assert said in wrongs(found)[what]
    with pytest.raises(UserError) as refused:
        run(raw, tmp_path / "run")
    assert str(refused.value) in wrongs(found).values()
    assert "student's accuracy" not in {f.what for f in found}


def test_all_faults_of_a_pair_are_told_at_once(world: Path):
    found = look(
        good(world, teacher={"eos": ["#"], "chat_template": "{{ messages }}"}, rollout={"max_new_tokens": 500})
    )
    assert {"end token", "context length"} <= wrongs(found).keys()
    assert of(found, "chat template").verdict == "note"
    assert of(found, "prompt (teacher)").verdict == "note"


@pytest.mark.parametrize(
    ("function", "said"), [("never", "0 of 4 worked solutions score right"), ("always", "empty or idle responses")]
)
def test_a_broken_verifier_is_wrong_where_rewards_are_read(world: Path, tmp_path: Path, function: str, said: str):
    (tmp_path / "judge.py").write_text(
        "def never(response, problem):\n    return False\n\n\ndef always(response, problem):\n    return True\n"
    )
    verifier = {"task": {"verifier": {"name": f"{tmp_path / 'judge.py'}:{function}", "workers": 1}}}
    assert said in wrongs(look(good(world, **verifier)))["verifier"]
    unread = merge(raw_recipe(world, "opd", **with_teacher(world)), verifier)
    assert of(look(unread), "verifier").verdict == "note"


def test_answers_stand_for_solutions_where_there_are_none(world: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    data = tmp_path / "plain.jsonl"
    data.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "answer")}) + "\n" for row in rows))
    for extract in ("boxed", {"after": "#"}, {"tag": "answer"}, "last_number"):
        found = look(good(world, task={"path": str(data), "extract": extract}))
        assert (
            of(found, "verifier").text == "4 of 4 stated answers score right, and none of the empty and idle responses"
        )


def test_another_vocabulary_size_is_a_note_and_a_recipe_that_cannot_be_read_is_wrong(world: Path, tmp_path: Path):
    raw = good(world)
    raw["teacher"] = section(settings={"vocab_size": 64})
    found = look(raw)
    assert not wrongs(found)
    assert "both cut" in of(found, "vocabulary").text
    assert "padded rows left out" in of(found, "teacher").text
    assert "there is no recipe" in wrongs(examine(tmp_path / "none.yaml"))["recipe"]
    assert "temperature" in of(look(good(world, rollout={"temperature": 0.5})), "temperature").what


def test_a_teacher_that_is_the_student_is_noted(world: Path):
    raw = good(world)
    raw["teacher"] = section()
    assert "is the student as it starts" in of(look(raw), "teacher's R").text


def test_the_numbers_are_those_of_plain_models(world: Path, tmp_path: Path):
    raw = good(world, objective=[{"distill": {"support": {"token": "k2"}, "clamp": 0.5}}])
    recipe = load_recipe(raw)
    with ExitStack() as stack:
        builder = Builder(recipe, tmp_path / "a", stack)
        parts = builder.parts()
        found = measure(builder, parts, 3)
        responses = Trainer(parts).trial(0).rollouts.responses
        gaps, shared, spread = [], [], []
        for r in responses:
            p, q = (
                plain_logp(m, r.prompt_ids, r.token_ids).detach() for m in (builder.models["teacher"], parts.student)
            )
            index = torch.tensor(r.token_ids)[:, None]
            gaps += (p.gather(-1, index) - q.gather(-1, index)).flatten().tolist()
            for one, other in zip(p.topk(TOP).indices.tolist(), q.topk(TOP).indices.tolist(), strict=True):
                shared.append(len({*one} & {*other}) / TOP)
            spread += (-(p.exp() * p).sum(-1)).tolist()
        gap = found.gaps["teacher"]
        assert gap.ratio == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
        assert gap.magnitude == pytest.approx(sum(map(abs, gaps)) / len(gaps), abs=1e-4)
        assert gap.beyond == pytest.approx(sum(abs(r) > 0.5 for r in gaps) / len(gaps), abs=1e-9)
        assert gap.overlap == pytest.approx(sum(shared) / len(shared), abs=1e-6)
        assert gap.entropy == pytest.approx(sum(spread) / len(spread), abs=1e-4)
        assert found.accuracy["student"].problems == 3
        # Nothing was trained: a second look sees the same.
        again = measure(builder, parts, 3)
        assert (again.gaps, again.terms, again.accuracy) == (found.gaps, found.terms, found.accuracy)
        assert not any(p.grad is not None for p in parts.updater.parameters)


def test_an_examination_leaves_the_run_as_it_would_be(world: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = look(good(world)), look(good(world))
    passing = ("time", "memory")  # of the machine at that moment
    assert [f for f in one if f.what not in passing] == [f for f in other if f.what not in passing]
    assert not list(tmp_path.iterdir())
    with parts_of(good(world), tmp_path / "parts") as parts:
        assert parts.collector.position == 0


def said(found: Measured, world: Path) -> dict[str, Finding]:
    patient = Doctor()
    judge(patient, load_recipe(good(world)), found)
    return {f.what: f for f in patient.findings}


def made(**change: Any) -> Measured:
    base = Measured(rows=4, tokens=20.0, truncated=0.0, flat=0.0, entropy=1.0, seconds={"rollout": 1.0})
    base.accuracy = {"student": Accuracy(2, 8, 20.0, "development"), "teacher": Accuracy(6, 8, 20.0, "development")}
    base.gaps = {"teacher": Gap(-0.5, 0.6, 0.0, 10, 0.8, 1.0)}
    base.terms = [
        TermGradient("policy_gradient", "rl", 1.0, 80, 1.0, None),
        TermGradient("distill", "kd", 0.1, 80, 0.5, None),
    ]
    for key, value in change.items():
        setattr(base, key, value)
    return base


def test_verdicts_on_what_was_measured(world: Path):
    calm = said(made(), world)
    assert {f.verdict for f in calm.values()} == {"ok"}
    assert "beta x length x KL is 0.1 x 20 x 0.5 = 1" in calm["balance"].text
    worse = {"student": Accuracy(5, 8, 9.0, "development"), "teacher": Accuracy(3, 8, 9.0, "development")}
    assert "fewer than the student's 5" in said(made(accuracy=worse), world)["teacher's accuracy"].text
    rl, kd = made().terms
    faint = [rl, TermGradient("distill", "kd", 1e-4, 80, 1e-3, None)]
    assert "the teacher hardly counts" in said(made(terms=faint), world)["balance"].text
    loud = [rl, TermGradient("distill", "kd", 1e4, 80, 1e3, None)]
    assert "the rewards hardly count" in said(made(terms=loud), world)["balance"].text
    # beta x length x KL is 4.7 x 20 x 0.5 = 47, whatever the norms say
    heavy = said(made(terms=[rl, TermGradient("distill", "kd", 4.7, 80, 1.0, None)]), world)["balance"]
    assert heavy.verdict == "note"
    assert "lower objective.distill.weight from 4.7 to about 0.1, for order 1" in heavy.text
    light = said(made(terms=[rl, TermGradient("distill", "kd", 0.005, 80, 1.0, None)]), world)["balance"]
    assert "raise objective.distill.weight from 0.005 to about 0.1, for order 1" in light.text
    # Of a teacher whose KL is not known a token the norms have to do.
    unknown = said(made(gaps={}, terms=[rl, TermGradient("distill", "kd", 2.0, 80, 20.0, None)]), world)["balance"]
    assert "from 2 to about 0.1" in unknown.text
    dead = [rl, TermGradient("distill", "kd", 1.0, 80, 0.0, None, "teacher")]
    assert said(made(terms=dead), world)["objective.distill"].verdict == "wrong"
    same = {"teacher": Gap(0.0, 0.0, 0.0)}
    equal = said(made(terms=dead, gaps=same), world)["objective.distill"]
    assert (equal.verdict, "equal at the start" in equal.text) == ("note", True)
    alone = said(made(terms=dead[1:], gaps=same), world)["objective.distill"]
    assert (alone.verdict, "no other term moves it" in alone.text) == ("wrong", True)
    flat = [TermGradient("policy_gradient", "rl", 1.0, 80, 0.0, None), kd]
    assert said(made(terms=flat, flat=1.0), world)["objective.policy_gradient"].verdict == "note"
    masked = [rl, TermGradient("distill", "kd", 1.0, 0, 0.0, None)]
    assert "keeps no token" in said(made(terms=masked), world)["objective.distill"].text
    narrow = [rl, TermGradient("distill", "kd", 0.1, 80, 0.5, 0.4)]
    assert said(made(terms=narrow), world)["objective.distill"].verdict == "note"
    far = said(made(gaps={"teacher": Gap(-4.0, 4.0, 0.2, 10, 0.1, 1.0)}, truncated=0.9), world)
    assert [far[w].verdict for w in ("teacher's R", "teacher's overlap", "responses")] == ["note"] * 3


@pytest.mark.parametrize(("covered", "verdict"), [(0.95, "ok"), (0.6, "note"), (0.2, "wrong")])
def test_a_teacher_that_reads_little_of_what_is_written(world: Path, covered: float, verdict: str):
    found = said(made(alignment={"vocabulary/A/covered": 1.0, "vocabulary/B/covered": covered}), world)["alignment"]
    assert found.verdict == verdict
    assert (f"on {covered:.0%} of the student's tokens alone" in found.text) == (verdict != "ok")


def test_a_teacher_that_shares_the_students_weights_is_no_fault(world: Path):
    raw = good(world)
    raw["student"] |= {"model": str(world / "teacher"), "lora": {"rank": 2}}
    raw["student"].pop("tokenizer")
    found = look(raw)
    assert not wrongs(found)
    assert "student and teacher are equal at the start" in of(found, "objective.distill").text


def test_the_demos_models_swapped_are_a_teacher_that_is_worse(monkeypatch):
    monkeypatch.chdir(ROOT)
    swapped = ["student.model=models/tiny-teacher", "teacher.model=models/tiny-student", "device=cpu"]
    found = examine("recipes/demo.yaml", swapped, effort=Effort(64, 1, 2))
    assert not wrongs(found)
    worse = of(found, "teacher's accuracy")
    assert (worse.verdict, "fewer than the student's" in worse.text) == ("note", True)


def test_the_command_line(world: Path, tmp_path: Path, monkeypatch, capfd):
    def call(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["kdrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(load_recipe(good(world)).to_yaml())
    small = ["--problems", 2, "--prompts", 1, "--group", 2]
    assert call("doctor", recipe, *small, "--json", tmp_path / "found.json") == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1].endswith("; 0 wrong")
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["wrong"] is False
    assert [f"{f['verdict']:<5}  {f['what']}: {f['text']}" for f in stored["findings"]] == out.splitlines()[:-1]
    assert call("doctor", recipe, "teacher.eos=['#']", *small) == 2
    assert "wrong  end token" in capfd.readouterr().out
    assert call("doctor", recipe, "--json", tmp_path / "no" / "x.json") == 2
    assert call("doctor", "--help") == 0
    assert "--problems" in capfd.readouterr().out
    assert json.loads(to_json([Finding("a", "wrong", "b")]))["wrong"] is True


def test_what_does_not_fit_is_not_loaded(world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdrl.memory.available_bytes", lambda device: 10**8)
    monkeypatch.setattr("kdrl.doctor.Builder", None)
    found = look(good(world))
    assert [(f.what, f.verdict) for f in found][-2:] == [("memory", "wrong"), ("loading", "note")]
