"""Who writes: worked solutions, a teacher whose text is stored, and the student with privileged context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import SpyUpdater, go, parts_of, problem, raw_recipe, rows_of, run, toy, with_teacher

from kdrl.batch import Rollouts
from kdrl.engines.base import Sample
from kdrl.errors import UserError
from kdrl.sources.base import Request
from kdrl.sources.config import SourceConfig
from kdrl.sources.student import PrivilegedSource, StudentSource, privileged_prompt
from kdrl.sources.text import GoldSource, TeacherSource


class CountingEngine:
    """Writes the seed's digits and the prompt's length; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def generate(self, prompts: Any, *, samples: int, seed: int, **sampling: Any) -> list[list[Sample]]:
        self.asked.append([list(p) for p in prompts])
        return [
            [Sample([2 + (seed + j) % 10, len(p) % 10 + 2, 1], [-1.0] * 3, True) for j in range(samples)]
            for p in prompts
        ]


@pytest.fixture(scope="module")
def student() -> Any:
    return toy(1)


def text_of(student: Any, ids: list[int]) -> str:
    return str(student.tokenizer.decode(ids, skip_special_tokens=True))


def test_gold_is_the_solution_and_its_end(student: Any):
    (response,) = GoldSource(student, 10).write(Request.of([problem(solution="1+2;3#")], 4, 0))
    assert text_of(student, response.token_ids) == response.text == "1+2;3#"
    assert response.token_ids[-1] in student.eos_ids
    assert (response.ended, response.group, response.origin, response.trained) == (True, 4, "gold", None)
    assert text_of(student, response.prompt_ids) == "1+2="


@pytest.mark.parametrize(("limit", "ended"), [(7, True), (6, False), (2, False)])
def test_gold_is_cut_at_the_limit_and_then_has_not_ended(student: Any, limit: int, ended: bool):
    (response,) = GoldSource(student, limit).write(
        Request.of([problem(solution="1+2;3#", untrained_spans=((0, 1),))], 0, 0)
    )
    assert len(response.token_ids) == limit
    assert response.ended is ended
    assert response.trained is not None
    assert len(response.trained) == limit
    assert bool(Rollouts.of([response]).last_N.any()) is ended


def test_untrained_spans_are_tokens_without_loss(student: Any):
    one = problem(solution="1+2;4#", untrained_spans=((0, 2), (4, 5)))
    (response,) = GoldSource(student, 10).write(Request.of([one]))
    shown = "".join(c if t else "_" for c, t in zip(f"{one.solution}E", response.trained or [], strict=True))
    assert shown == "__2;_#E", "the end is always trained"
    assert Rollouts.of([response]).trained_N.tolist() == response.trained


def test_corrupted_solutions_train_only_what_follows_the_mistake(world: Path, tmp_path: Path):
    """Through the real task: chain_sum's writer marks the mistake, and the tally counts trained tokens alone."""
    task = {
        "name": "reasoning_gym",
        "dataset": "chain_sum",
        "settings": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        "template": "{expression_compact}=",
        "solution": "chain_sum",
        "corrupt": 1.0,
    }
    raw = raw_recipe(world, "sft", steps=1, rollout={"prompts": 6, "group": 1, "max_new_tokens": 40}) | {"task": task}
    with parts_of(raw, tmp_path) as parts:
        parts.updater = updater = SpyUpdater(parts.student)
        go(parts)
    (seen,) = updater.seen
    trained = seen.scored.rollouts.trained_N
    assert 0 < int(trained.sum()) < len(trained)
    (active,) = seen.scored.active
    assert torch.equal(active.keep_N, trained)
    assert all(r.problem.untrained_spans for r in seen.scored.rollouts.responses)


def test_a_problem_without_solution_and_one_that_cannot_be_written_are_named(student: Any):
    with pytest.raises(UserError, match=r"problem p has no worked solution.*task\.columns\.solution"):
        GoldSource(student, 5).write(Request.of([problem()], 0, 0))
    with pytest.raises(UserError, match="cannot write the solution '1\u4e00'"):
        GoldSource(student, 5).write(Request.of([problem(solution="1\u4e00")], 0, 0))


def teacher_source(student: Any, store: Path, engine: CountingEngine) -> TeacherSource:
    return TeacherSource(engine, student, store, 2, {"max_new_tokens": 5})


def test_the_teacher_writes_each_prompt_once(student: Any, tmp_path: Path):
    engine = CountingEngine()
    source = teacher_source(student, tmp_path / "t.jsonl", engine)
    problems = [problem("a", "1="), problem("b", "22="), problem("a", "1=")]
    first = source.write(Request.of(problems, 0, 1))
    assert [len(asked) for asked in engine.asked] == [2], "a prompt that stands twice is written once"
    assert [(r.group, r.problem.id) for r in first] == [(g, n) for g, n in enumerate("aba") for _ in range(2)]
    again = source.write(Request.of([problem("b", "22="), problem("c", "3=")], 5, 99))
    assert engine.asked[1:] == [[[5, 14]]], "only what is new"
    assert [r.token_ids for r in again[:2]] == [r.token_ids for r in first[2:4]]
    assert {r.origin for r in first + again} == {"teacher"}
    stored = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [entry["problem"] for entry in stored] == ["a", "b", "c"]


def test_a_resumed_store_is_cut_back_and_read(student: Any, tmp_path: Path):
    store = tmp_path / "t.jsonl"
    one = teacher_source(student, store, CountingEngine())
    kept = one.write(Request.of([problem("a", "1=")], 0, 1))
    values, tensors = one.state()
    offset = values["offset"]
    lost = one.write(Request.of([problem("b", "22=")], 0, 2))
    assert store.stat().st_size > offset

    engine = CountingEngine()
    resumed = teacher_source(student, store, engine)
    resumed.restore(values, tensors)
    assert store.stat().st_size == offset == resumed.state()[0]["offset"]
    assert [r.token_ids for r in resumed.write(Request.of([problem("a", "1=")], 0, 7))] == [r.token_ids for r in kept]
    assert engine.asked == []
    assert [r.token_ids for r in resumed.write(Request.of([problem("b", "22=")], 0, 2))] == [r.token_ids for r in lost]

    fresh = teacher_source(student, store, engine)
    assert fresh.state() == ({"offset": 0}, {})
    fresh.write(Request.of([problem("z", "9=")], 0, 3))
    names = [json.loads(line)["problem"] for line in store.read_text().splitlines()]
    assert names == ["z"], "without a checkpoint the store begins anew"


def test_a_damaged_store_is_named_with_its_line(student: Any, tmp_path: Path):
    store = tmp_path / "t.jsonl"
    store.write_text('{"problem": "a", "samples": []}\n{"problem": 3}\n')
    with pytest.raises(UserError, match=r"t\.jsonl, line 2"):
        teacher_source(student, store, CountingEngine()).restore({"offset": store.stat().st_size}, {})


def test_seqkd_trains_on_what_the_teacher_wrote(world: Path, tmp_path: Path):
    """`method: sft` with `source: teacher`, over more than one epoch: the store ends with one entry a problem."""
    raw = raw_recipe(world, "sft", source="teacher", steps=4, task={"limit": 5}, **with_teacher(world))
    run(raw, tmp_path / "run")
    stored = [json.loads(line) for line in (tmp_path / "run" / "teacher_text.jsonl").read_text().splitlines()]
    names = [entry["problem"] for entry in stored]
    assert len(names) == len(set(names)) == 5
    assert all(len(entry["samples"]) == 4 for entry in stored)
    assert all(row["loss"] > 0 for row in rows_of(tmp_path / "run"))


def test_privileged_prompts_show_the_answer_and_train_under_the_ordinary_one(student: Any):
    engine = CountingEngine()
    source = PrivilegedSource(StudentSource(engine, student, 2), "{prompt} is {answer}.")
    written = source.write(Request.of([problem()], 3, 0))
    assert [text_of(student, ids) for ids in engine.asked[0]] == ["1+2= is 3."]
    for response in written:
        assert text_of(student, response.prompt_ids) == "1+2="
        assert text_of(student, response.privileged_ids or []) == "1+2= is 3."
        assert (response.origin, response.group) == ("privileged", 3)
        assert response.logp is None, "it was not sampled from the ordinary prompt's policy"


def test_privileged_context_replaces_only_the_last_message():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+2="}]
    made = privileged_prompt(problem(prompt=chat, solution="so"), "{prompt}|{answer}|{solution}")  # type: ignore[arg-type]
    assert made == [chat[0], {"role": "user", "content": "1+2=|3|so"}]
    assert chat[1]["content"] == "1+2="


def test_hdpo_scores_with_the_student_that_sees_the_answer(world: Path, tmp_path: Path):
    """The self-teacher's numbers are the student's own under the privileged prompt, on kept responses only."""
    from tiny import plain_logp

    # About one in three is right: some groups fail, and some privileged answers pass.
    (tmp_path / "third.py").write_text(
        "def third(response, problem):\n    return sum(map(ord, response)) % 3 == 0\n", encoding="utf-8"
    )
    raw = raw_recipe(
        world,
        "hdpo",
        steps=1,
        source={"privileged": {"template": "{prompt}{answer} ", "samples": 8}},
        rollout={"prompts": 8, "group": 2},
        task={"verifier": {"name": f"{tmp_path / 'third.py'}:third"}},
    )
    with parts_of(raw, tmp_path / "run", "optimizer.lr=0") as parts:
        parts.updater = updater = SpyUpdater(parts.student)
        go(parts)
        (seen,) = updater.seen
        rollouts = seen.scored.rollouts
        extra = [i for i, r in enumerate(rollouts.responses) if r.origin == "privileged"]
        assert extra, "the test needs a failed group with a right privileged answer"
        evidence = seen.scored.evidence["self"]
        assert set(rollouts.row_N[evidence.scored_N].tolist()) == set(extra)
        for i in extra:
            response = rollouts.responses[i]
            start, end = rollouts.span(i)
            assert response.correct
            own, privileged = (
                plain_logp(parts.student, prompt, response.token_ids)
                .gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]
                .detach()
                for prompt in (response.prompt_ids, response.privileged_ids or [])
            )
            torch.testing.assert_close(evidence.logp_N[start:end], privileged, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(seen.logp_N[start:end], own, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(own, privileged, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gould", "no source is called 'gould'; did you mean 'gold'"),
        ({"mixture": 1.5}, "a share between 0 and 1, not 1.5"),
        ("mixture", "mixture.share is missing"),
        ({"gold": 1}, "source gold has no settings"),
        ({"kind": "gold"}, "no source is called 'kind'"),
        ({"mixture": 0.5, "student": {}}, "a source is one of buffer, corrupt"),
        ({"mixture": {"share": 0.5, "others": "teacher"}}, "others is no recipe key; did you mean 'other'"),
        ({"mixture": {"linear": {"from": 1}}}, "schedule linear needs to"),
        ({"mixture": {"share": 0.5, "per": "token"}}, "per: Input should be 'batch' or 'sample'"),
        ("privileged", "template is missing"),
        ({"privileged": {"template": "{promt} {answer}"}}, "did you mean 'prompt'"),
        ({"privileged": {"template": "{prompt"}}, "no format string"),
        ({"privileged": {"template": "{prompt} think"}}, "shows nothing privileged"),
        ({"buffer": {"share": 0.5, "size": 0}}, "size: Input should be greater than or equal to 1"),
        ({"buffer": 2}, "buffer.share is a share"),
        ("speculative", "k is missing"),
        ({"speculative": 0}, "k: Input should be greater"),
        ({"mixed": {"share": 0.2, "weights": "both"}}, "weights: Input should be"),
        ({"corrupt": {"share": 0.2, "pick": "soft"}}, "pick: Input should be 'random', 'hard' or 'easy'"),
        ({"pair": "student"}, "chosen: Input should be 'teacher' or 'gold'"),
        ({"guided": 0}, "teacher: Input should be greater"),
        ({"traces": {"path": "x", "take": "best"}}, "take: Input should be"),
        ({"filtered": {"source": "pair", "keep": "right"}}, "filtered takes the responses of student, teacher"),
        ({"filtered": "good"}, "Input should be a valid dictionary"),
        ({"filtered": {"score": "lenght", "above": 1}}, "did you mean 'length'"),
        ({"filtered": {"score": "length"}}, "needs one of above, below"),
        ({"filtered": {"score": "length", "top": 0.5, "above": 3}}, "one rule, not above and top"),
        ({"filtered": {"source": "gold", "keep": "right", "tries": 2}}, "text of gold is the same every time"),
        ({"filtered": {"keep": {"score": "length", "top": 0.5}, "tries": 2}}, "rank over the step"),
        ({"filtered": {"keep": []}}, "keep needs a filter"),
    ],
)
def test_bad_sources_are_refused(source: Any, words: str):
    with pytest.raises(ValidationError, match=words):
        SourceConfig.model_validate(source)
