from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from kdrl.errors import UserError
from kdrl.evaluation import (
    EvaluateConfig,
    EvaluationResult,
    Record,
    Response,
    compare,
    evaluate,
    evaluate_loaded,
    results_table,
)
from kdrl.results import cell


def record(name: str, *right: bool, tokens: int = 10, answers: tuple[str | None, ...] | None = None) -> Record:
    answers = answers or tuple("1" if r else "0" for r in right)
    return Record(
        name,
        f"{name}?",
        tuple(Response("text", tokens, r, tokens > 50, a) for r, a in zip(right, answers, strict=True)),
    )


def result(*records: Record, model: str = "m", **kwargs: Any) -> EvaluationResult:
    return EvaluationResult.from_records(records, model=model, **kwargs)


def test_summary_by_hand():
    got = result(
        record("a", True, True, False, False, tokens=20),
        record("b", False, False, False, True, tokens=60, answers=("5", None, "5", "7")),
        k=[1, 2],
    ).metrics
    assert got["accuracy"] == got["pass@1"] == pytest.approx(3 / 8)
    assert got["pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert got["majority@4"] == pytest.approx((0.5 + 0.0) / 2)
    assert got["tokens"] == got["tokens_median"] == 40
    assert got["tokens_per_correct"] == pytest.approx(320 / 3)
    assert got["truncated"] == 0.5


def test_nothing_right_is_said_in_a_word_and_is_valid_json(tmp_path: Path):
    none = result(record("a", False), record("b", False))
    assert none.metrics["tokens_per_correct"] is None
    text = none.save(tmp_path / "e.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))["notes"]["tokens_per_correct"]
    assert cell(none, "tokens_per_correct") == "no right answer"


def test_json_round_trip(tmp_path: Path):
    one = result(record("a", True, False), record("b", True, True), k=[2], seed=3, settings={"temperature": 1.0})
    assert EvaluationResult.load(one.save(tmp_path / "deep" / "e.json")) == one


def test_broken_files_are_named(tmp_path: Path):
    path = tmp_path / "e.json"
    for text, words in [("{", "not JSON"), ('{"model": 1}', "not an evaluation"), ("[]", "not an evaluation")]:
        path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            EvaluationResult.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        EvaluationResult.load(tmp_path / "absent.json")


def test_compare_pairs_by_problem_not_by_position():
    a = result(*(record(f"p{i}", i % 3 == 0) for i in range(60)), model="a")
    b = result(*(record(f"p{i}", i % 3 != 1) for i in reversed(range(60))), model="b")
    got = compare(a, b)
    assert got.difference.mean == pytest.approx(1 / 3)
    assert got.difference.low > 0
    assert "b minus a" in got.sentence()
    assert "leaves 0 out" in got.sentence()
    assert "no difference" in compare(a, a).sentence()


def test_compare_refuses_other_problems():
    with pytest.raises(UserError, match="1 of them shared"):
        compare(result(record("a", True), record("b", True)), result(record("a", True), record("c", True)))


def test_table_shows_every_metric():
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table([result(record("a", True, False), k=[2]), result(record("a", False), model="other")]))
    shown = console.export_text()
    for word in ("accuracy", "pass@2", "majority@2", "tokens_per_correct", "no right answer", "other", "problems"):
        assert word in shown


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"samples": 4}, "temperature 0 writes the same"),
        ({"samples": 4, "temperature": 1.0, "k": [8]}, "pass@8 needs k between 1 and"),
        ({"samples": 4, "temperature": 1.0, "k": [0]}, "pass@0"),
        ({"samples": 4, "temperature": 1.0, "k": [2, 2]}, "twice"),
        ({"top_p": 0.9}, "change nothing at temperature 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"smaples": 4}, "smaples"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        EvaluateConfig(**fields)


def test_final_is_the_test_split():
    final = EvaluateConfig(final_problems=7).final()
    assert (final.split, final.problems) == ("test", 7)
    with pytest.raises(UserError, match="final_problems is 0"):
        EvaluateConfig(final_problems=0).final()


@dataclass(frozen=True)
class FakeSample:
    token_ids: list[int]
    ended: bool


@dataclass
class FakeEngine:
    """Writes `samples` responses to a prompt: its id repeated, one token more for each sample."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def generate(self, prompts: list[list[int]], **kwargs: Any) -> list[list[FakeSample]]:
        self.calls.append({"prompts": prompts, **kwargs})
        return [[FakeSample(p * (i + 1), i + 1 < 3) for i in range(kwargs["samples"])] for p in prompts]


@dataclass(frozen=True)
class FakeProblem:
    id: str
    prompt: str


class FakePool:
    def answer(self, text: str) -> str:
        return text[-1]

    def score(self, items: list[tuple[str, FakeProblem, Any]]) -> list[Any]:
        return [SimpleNamespace(reward=1.0, correct=text == p.prompt * 2, status="ok") for text, p, _ in items]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    models = ModuleType("kdrl.models")
    models.encode_prompt = lambda loaded, prompt: [ord(c) for c in prompt]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kdrl.models", models)
    decode = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))
    return SimpleNamespace(tokenizer=decode, config=SimpleNamespace(model="fake"))


def test_every_response_meets_its_own_problem(loaded: Any):
    problems: Any = [FakeProblem(f"id{c}", c) for c in "abcde"]
    engine, seen = FakeEngine(), []
    config = EvaluateConfig(samples=3, temperature=1.0, k=[1], batch=2, max_new_tokens=9)
    got = evaluate_loaded(
        engine, loaded, problems, FakePool(), config, 0, progress=lambda done, total: seen.append((done, total))
    )  # type: ignore[arg-type]
    assert [r.id for r in got.records] == ["ida", "idb", "idc", "idd", "ide"]
    assert all([r.text for r in rec.responses] == [rec.prompt * n for n in (1, 2, 3)] for rec in got.records)
    assert all([r.correct for r in rec.responses] == [False, True, False] for rec in got.records)
    assert all(r.answer == rec.prompt for rec in got.records for r in rec.responses)
    assert got.metrics["truncated"] == pytest.approx(1 / 3)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert len({call["seed"] for call in engine.calls}) == 3, "batches must not draw the same random numbers"
    assert {call["max_new_tokens"] for call in engine.calls} == {9}


def test_evaluation_needs_problems_and_a_limit(loaded: Any):
    pool: Any = FakePool()
    with pytest.raises(UserError, match="max_new_tokens"):
        evaluate_loaded(FakeEngine(), loaded, [FakeProblem("a", "a")], pool, EvaluateConfig(), 0)  # type: ignore[list-item]
    with pytest.raises(UserError, match="no problems in split 'development'"):
        evaluate_loaded(FakeEngine(), loaded, [], pool, EvaluateConfig(max_new_tokens=4), 0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
method: grpo
student:
  model: {architecture: qwen3, hidden_size: 16, layers: 1, heads: 2}
  tokenizer: {characters: "0123456789+-=;# "}
task:
  name: reasoning_gym
  dataset: chain_sum
  settings: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
  extract: {after: "#"}
  template: "{expression}="
  verifier: {name: exact, workers: 1}
rollout: {max_new_tokens: 6}
evaluate: {problems: 3, final_problems: 5}
"""
    )
    return path


def test_a_model_is_evaluated_on_a_recipe_with_real_parts(recipe: Path):
    from kdrl.models import load_model
    from kdrl.recipe import load_recipe

    loaded = load_model(load_recipe(recipe).student, "cpu", trainable=False, seed=0)
    held_out = evaluate(loaded, recipe)
    assert (held_out.split, len(held_out.records), held_out.settings["max_new_tokens"]) == ("test", 5, 6)
    assert evaluate(loaded, recipe) == held_out, "the same model gives the same result"
    tuned = evaluate(loaded, load_recipe(recipe), split="development", samples=4, temperature=1.0, k=[2])
    assert (tuned.split, len(tuned.records)) == ("development", 3)
    assert not set(held_out.problem_ids) & set(tuned.problem_ids)
    assert tuned.metrics.keys() >= {"pass@2", "majority@2", "majority@4"}
    for record in tuned.records:
        for response in record.responses:
            assert response.answer == (response.text.rpartition("#")[2].strip() if "#" in response.text else None)
            assert response.tokens <= 6


def test_evaluate_refuses_what_it_does_not_know(recipe: Path):
    model: Any = SimpleNamespace()
    with pytest.raises(UserError, match=r"no option 'smaples'.*'samples'"):
        evaluate(model, recipe, smaples=3)
    with pytest.raises(UserError, match="temperature 0 writes the same"):
        evaluate(model, recipe, samples=3)
    with pytest.raises(UserError, match="absent"):
        evaluate("./absent", recipe)


def test_the_public_function_is_not_hidden_by_a_module_and_takes_a_mapping(recipe: Path):
    import importlib

    import yaml

    import kdrl

    importlib.import_module("kdrl.evaluation")
    assert callable(kdrl.evaluate)
    with pytest.raises(UserError, match="smaples"):
        kdrl.evaluate("./absent", yaml.safe_load(recipe.read_text()), smaples=3)
