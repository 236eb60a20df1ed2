"""Generated problems: splits by text, determinism, worked solutions judged by the task's own verifier."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from kdrl.errors import UserError
from kdrl.tasks import Problem, ResponseInfo, Solution, TaskConfig, VerifierPool, build_task
from kdrl.tasks.reasoning_gym import WINDOW
from kdrl.tasks.scoring import build_scorer
from kdrl.tasks.splits import normalise

CHAIN = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1}


def config(dataset: str = "chain_sum", **more: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "reasoning_gym", "dataset": dataset, **more})


def texts(task_config: TaskConfig, seed: int, split: str, count: int) -> list[str]:
    stream = build_task(task_config, seed).problems(split)
    return [normalise(str(stream[index].prompt)) for index in range(count)]


def test_splits_share_no_text_across_seeds_and_difficulties() -> None:
    small = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    found: dict[str, set[str]] = {"train": set(), "development": set(), "test": set()}
    for settings in (CHAIN, small):
        for template in ("{expression}=", "{expression_compact} ="):
            for seed in (0, 1):
                made = config(settings=settings, template=template)
                for split in found:
                    found[split] |= set(texts(made, seed, split, 700 if split == "train" else 60))
    assert len(found["train"]) > 1000
    assert not found["train"] & found["test"]
    assert not found["train"] & found["development"]
    assert not found["development"] & found["test"]


def test_split_by_keeps_recipes_with_other_wording_apart() -> None:
    def expressions(template: str, split: str, split_by: str | None) -> set[str]:
        made = config(settings={"min_terms": 2, "max_terms": 2, "max_digits": 1}, template=template, split_by=split_by)
        stream = build_task(made, 0).problems(split)
        return {stream[i].meta["item"]["metadata"]["expression"] for i in range(60 if split == "train" else 12)}

    def shared(split_by: str | None) -> set[str]:
        train = expressions("{expression}=", "train", split_by) | expressions("{expression} is?", "train", split_by)
        return train & expressions("Work out {expression}", "test", split_by)

    assert shared("{expression}") == set()
    assert shared(None) != set(), "two wordings are two texts unless split_by says otherwise"


def test_held_out_shares_are_what_was_asked() -> None:
    task = build_task(config(settings=CHAIN, holdout={"development": 0.3, "test": 0.2}), 0)
    train = task.problems("train")
    drawn = train._draws(0)  # type: ignore[attr-defined]
    splits = [drawn(index)[0] for index in range(2000)]
    assert splits.count("test") / 2000 == pytest.approx(0.2, abs=0.04)
    assert splits.count("development") / 2000 == pytest.approx(0.3, abs=0.04)


def test_random_access_equals_reading_in_order() -> None:
    made = config(settings=CHAIN, solution="chain_sum", corrupt=0.5)
    in_order = build_task(made, 3).problems("train")
    wanted = {index: in_order[index] for index in range(0, 2 * WINDOW + 40)}
    order = list(wanted)
    random.Random(0).shuffle(order)
    again = build_task(made, 3).problems("train")
    for index in [2 * WINDOW + 39, 0, WINDOW, *order[:200]]:
        assert again[index] == wanted[index]


def test_training_follows_the_seed_and_held_out_problems_do_not() -> None:
    made = config(settings=CHAIN)
    assert texts(made, 0, "train", 50) != texts(made, 1, "train", 50)
    assert texts(made, 0, "test", 50) == texts(made, 1, "test", 50)
    other = config(settings=CHAIN, held_out_seed=1)
    assert texts(made, 0, "test", 50) != texts(other, 0, "test", 50)


def test_no_text_repeats_in_a_window_or_in_a_held_out_split() -> None:
    made = config(settings={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1})
    train = texts(made, 0, "train", WINDOW)
    assert len(set(train)) == WINDOW
    held_out = texts(made, 0, "test", 100)
    assert len(set(held_out)) == 100


def test_a_task_of_few_texts_repeats_in_training_and_says_so_when_held_out() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train = texts(config(settings=few), 0, "train", WINDOW)
    distinct = len(set(train))
    assert 100 < distinct < 200, "two signs and ten by ten digits, less what is held out"
    assert max(train.count(text) for text in set(train)) <= 2 * min(10, WINDOW // distinct + 1)
    with pytest.raises(UserError, match=r"only \d+ different test problems exist"):
        texts(config(settings=few), 0, "test", 200)
    with pytest.raises(UserError, match=r"only \d+ different train problems exist"):
        texts(config(settings=few, limit=500), 0, "train", 500)


def test_limit_is_an_epoch_that_is_reshuffled() -> None:
    stream = build_task(config(settings=CHAIN, limit=40, solution="chain_sum", corrupt=0.3), 0).problems("train")
    epochs = [[stream[40 * epoch + place] for place in range(40)] for epoch in range(3)]
    assert stream.size == 40
    ids = [[problem.id for problem in epoch] for epoch in epochs]
    assert set(ids[0]) == set(ids[1]) == set(ids[2])
    assert len(set(ids[0])) == 40
    assert ids[0] != ids[1] != ids[2]


def test_long_prompts_are_skipped_and_counted_or_refused() -> None:
    def tokens(problem: Problem) -> int:
        return len(str(problem.prompt))

    made = {"settings": CHAIN, "template": "{expression_compact}=", "max_prompt_tokens": 8}
    stream = build_task(config(**made), 0, tokens).problems("train")
    assert all(tokens(stream[index]) <= 8 for index in range(100))
    assert stream.skipped["too_long"] > 100
    with pytest.raises(UserError, match="max_prompt_tokens is 8"):
        [build_task(config(**made, on_long="refuse"), 0, tokens).problems("train")[i] for i in range(100)]
    with pytest.raises(UserError, match="more than 3 prompt tokens"):
        _ = build_task(config(**{**made, "max_prompt_tokens": 3}), 0, tokens).problems("train")[0]
    with pytest.raises(UserError, match="needs a tokenizer"):
        build_task(config(**made), 0)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"dataset": "chain_summ"}, r"'chain_summ'; did you mean 'chain_sum'"),
        ({"settings": {"min_term": 2}}, r"no setting 'min_term'; did you mean 'min_terms'"),
        ({"settings": {"min_terms": 5, "max_terms": 2}}, r"refuses task.settings of 'chain_sum'"),
        ({"settings": {"seed": 5}}, r"use seed"),
        ({"solution": "chain_sun"}, r"did you mean 'chain_sum'"),
        ({"solution": "gcd", "corrupt": 0.5}, r"no parameter `corrupt`"),
        ({"corrupt": 0.5}, r"needs task.solution"),
        ({"path": "x.jsonl"}, r"task.path is for data files"),
        ({"columns": {"prompt": "x"}}, r"task.columns"),
        ({"on_long": "refuse"}, r"does nothing without task.max_prompt_tokens"),
        ({"holdout": {"test": 0.7, "development": 0.6}}, r"more than 1"),
    ],
)
def test_bad_sections_have_their_sentence(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_task(TaskConfig.model_validate({"name": "reasoning_gym", "dataset": "chain_sum", **section}), 0)


def test_bad_templates_and_unfit_writers_have_their_sentence() -> None:
    with pytest.raises(UserError, match=r"'expresion'.*did you mean 'expression'"):
        _ = build_task(config(template="{expresion}="), 0).problems("train")[0]
    with pytest.raises(UserError, match="not a format string"):
        _ = build_task(config(template="{expression"), 0).problems("train")[0]
    with pytest.raises(UserError, match="'gcd' does not fit this task"):
        _ = build_task(config(solution="gcd"), 0).problems("train")[0]
    with pytest.raises(UserError, match="no problem is left for test"):
        build_task(config(holdout={"test": 0.0}), 0).problems("test")
    with pytest.raises(UserError, match="there is no split 'dev'"):
        build_task(config(), 0).problems("dev")


SOLVED = [
    ("chain_sum", "chain_sum", {"after": "#"}, {}),
    ("chain_sum", "chain_sum_spoken", "last_number", {}),
    ("decimal_chain_sum", "chain_sum_spoken", "last_number", {}),
    ("basic_arithmetic", "basic_arithmetic", "last_number", {}),
    ("gcd", "gcd", "last_number", {"max_numbers": 4}),
    ("lcm", "lcm", "last_number", {"max_numbers": 3}),
    ("spell_backward", "spell_backward", {"regex": r"; (\w+)$"}, {}),
    ("leg_counting", "answer", None, {}),
]


@pytest.mark.parametrize(("dataset", "writer", "extract", "settings"), SOLVED)
def test_worked_solutions_satisfy_the_task_itself(dataset: str, writer: str, extract: Any, settings: Any) -> None:
    made = config(dataset, solution=writer, extract=extract, settings=settings)
    stream, score = build_task(made, 0).problems("train"), build_scorer(made)
    problems = [stream[index] for index in range(400)]
    assert [p.prompt for p in problems if score(str(p.solution), p)[0] != 1.0] == []
    assert any(score(str(problems[0].solution), p)[0] != 1.0 for p in problems[1:]), "the verifier tells them apart"


def test_the_demo_trace_is_what_it_should_be() -> None:
    from kdrl.tasks.writers import chain_sum, chain_sum_spoken

    item = {"metadata": {"expression": "4 - 5 + 3 - 4"}}
    assert chain_sum(item) == Solution("4-5=-1;-1+3=2;2-4=-2#-2")
    assert chain_sum_spoken(item) == Solution("4 - 5 = -1\n-1 + 3 = 2\n2 - 4 = -2\nThe answer is -2")
    assert chain_sum({"expression": "1 + 2"}) == Solution("1+2=3#3"), "a data file's column works as well"


STEP = re.compile(r"(-?\d+)\s?([+-])\s?(\d+)\s?=\s?(-?\d+)")


@pytest.mark.parametrize("writer", ["chain_sum", "chain_sum_spoken"])
def test_corruption_covers_exactly_the_text_up_to_the_one_wrong_result(writer: str) -> None:
    made = config(settings=CHAIN, solution=writer, corrupt=0.25)
    stream = build_task(made, 0).problems("train")
    problems = [stream[index] for index in range(600)]
    share = sum(bool(p.untrained_spans) for p in problems) / len(problems)
    assert share == pytest.approx(0.25, abs=0.06)
    for problem in problems:
        text = str(problem.solution)
        steps = list(STEP.finditer(text))
        wrong = [s for s in steps if int(s[1]) + int(s[2] + s[3]) != int(s[4])]
        assert [s[4] for s in steps[:-1]] == [s[1] for s in steps[1:]], "each step starts from the written result"
        assert re.split(r"#|is ", text)[-1] == steps[-1][4]
        if not problem.untrained_spans:
            assert wrong == []
            continue
        assert len(wrong) == 1
        assert wrong[0] is not steps[-1]
        assert problem.untrained_spans == ((0, wrong[0].end()),)


def test_held_out_solutions_are_never_corrupted() -> None:
    stream = build_task(config(settings=CHAIN, solution="chain_sum", corrupt=1.0), 0).problems("development")
    assert not any(stream[index].untrained_spans for index in range(100))


def test_an_answer_of_none_is_allowed() -> None:
    made = config("propositional_logic")
    problem = build_task(made, 0).problems("train")[0]
    assert problem.answer is None
    score = build_scorer(made)
    assert score(problem.meta["item"]["metadata"]["example_answer"], problem)[0] == 1.0
    assert score("rubbish", problem)[0] == 0.0


def test_tasks_that_do_not_repeat_are_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    build_task(config("chain_sum"), 0)
    assert caplog.messages == []
    build_task(config("ransom_note"), 0)
    assert "PYTHONHASHSEED=0" in caplog.text


def test_what_a_task_prints_while_scoring_is_no_fault_of_the_response(capfd: pytest.CaptureFixture[str]) -> None:
    made = config("bf")
    stream = build_task(made, 0).problems("train")
    problems = [stream[index] for index in range(4)]
    with VerifierPool(made, workers=1, timeout_s=20) as pool:
        verdicts = pool.score([(p.answer, p, ResponseInfo(1, False, 9)) for p in problems])
    assert [v.status for v in verdicts] == ["ok"] * 4
    assert all(v.correct for v in verdicts)
    assert capfd.readouterr().out == ""


def test_system_prompt_makes_messages() -> None:
    made = config(settings=CHAIN, system_prompt="Be brief.", template="{expression}=")
    problem, plain = (
        build_task(c, 0).problems("train")[0] for c in (made, config(settings=CHAIN, template="{expression}="))
    )
    assert [turn["role"] for turn in problem.prompt] == ["system", "user"]  # type: ignore[index]
    assert problem.prompt[1]["content"] == plain.prompt  # type: ignore[index]
    assert problem.id == plain.id, "the same problem under another system prompt"
