"""Problems from files and data sets: formats, columns, splits, and the sentence for every broken file."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl.errors import UserError
from kdrl.tasks import Problem, ResponseInfo, TaskConfig, VerifierPool, build_task, register_task, take
from kdrl.tasks.scoring import build_scorer

ROWS = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(60)]


def config(**section: Any) -> TaskConfig:
    return TaskConfig.model_validate(section)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer", "level"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITE: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: jsonl(path, ROWS),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_problems(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / name)
    stream = build_task(config(path=str(tmp_path / name)), 0).problems("train")
    problems = take(stream, 10**6)
    assert {(p.prompt, str(p.answer)) for p in problems} == {(row["prompt"], row["answer"]) for row in ROWS}
    assert stream.size == len(ROWS)


def test_a_datasets_folder_with_its_own_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    sets = {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:]}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in sets.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    task = build_task(config(dataset=str(tmp_path / "saved")), 0)
    for split, key in (("train", "train"), ("development", "validation"), ("test", "test")):
        assert {str(p.prompt) for p in take(task.problems(split), 99)} == {row["prompt"] for row in sets[key]}


def test_a_hub_id_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nlong trace")

    offline.__signature__ = __import__("inspect").signature(datasets.load_dataset)  # type: ignore[attr-defined]
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"'some/set' is no folder here .* \(ConnectionError: no route to the hub\)"):
        build_task(config(dataset="some/set"), 0)
    with pytest.raises(UserError, match=r"set task.name: reasoning_gym"):
        build_task(config(dataset="chain_sum"), 0)
    with pytest.raises(UserError, match=r"no setting 'revison'; did you mean 'revision'"):
        build_task(config(dataset="some/set", settings={"revison": "x"}), 0)


def test_epochs_reshuffle_and_random_access_equals_order(tmp_path: Path) -> None:
    made = config(path=jsonl(tmp_path / "a.jsonl", ROWS))
    stream = build_task(made, 0).problems("train")
    flat = [stream[index].id for index in range(180)]
    epochs = [flat[start : start + 60] for start in (0, 60, 120)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = build_task(made, 0).problems("train")
    assert [again[index].id for index in reversed(range(180))] == flat[::-1]
    other = build_task(made, 1).problems("train")
    assert [other[index].id for index in range(60)] != epochs[0]


def test_holdout_splits_by_text_whatever_the_seed(tmp_path: Path) -> None:
    rows = ROWS + [{**row, "prompt": row["prompt"].replace(" ", "  ").upper()} for row in ROWS[:20]]
    made = config(path=jsonl(tmp_path / "a.jsonl", rows), holdout={"development": 0.2, "test": 0.2})
    by_seed = []
    for seed in (0, 1):
        task = build_task(made, seed)
        by_seed.append({s: [p.prompt for p in take(task.problems(s), 999)] for s in ("train", "development", "test")})
    assert {k: set(v) for k, v in by_seed[0].items()} == {k: set(v) for k, v in by_seed[1].items()}
    plain = {split: {"".join(str(t).lower().split()) for t in found} for split, found in by_seed[0].items()}
    assert not plain["train"] & plain["test"]
    assert not plain["train"] & plain["development"]
    assert not plain["test"] & plain["development"]
    assert all(plain.values())
    assert set.union(*plain.values()) == {"".join(row["prompt"].lower().split()) for row in ROWS}
    assert len(by_seed[0]["test"]) == len(plain["test"]), "held-out texts stand once"


def test_a_shared_prompt_is_refused_with_both_lines_or_dropped_from_training(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", ROWS)
    for split in ("development", "test"):
        held_out = jsonl(tmp_path / "held_out.jsonl", [{"prompt": "new", "answer": "1"}, ROWS[4]])
        section: dict[str, Any] = {"path": train, f"{split}_path": held_out}
        with pytest.raises(UserError, match=r"train.jsonl:5 has the same prompt as .*held_out.jsonl:2"):
            build_task(config(**section), 0)
        task = build_task(config(**section, on_shared="drop"), 0)
        stream = task.problems("train")
        assert (stream.size, stream.skipped["shared"]) == (59, 1)
        assert ROWS[4]["prompt"] not in {str(p.prompt) for p in take(stream, 99)}
        assert task.problems(split).size == 2
    both = {"development_path": train, "test_path": train}
    with pytest.raises(UserError, match=r"the development problem .* has the same prompt as the test problem"):
        build_task(config(**both), 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "ans', r"bad.jsonl:2: not a JSON object.*may be cut off"),
        ('{"prompt": "a", "answer": "1"}\n\n{oops}\n', r"bad.jsonl:3: not a JSON object \(Expecting"),
        ('["a"]\n', r"bad.jsonl:1: expected a JSON object with columns, found a list"),
        ('{"prompt": "a", "answr": "1"}\n', r"bad.jsonl:1: the column 'answer' \(answer\) is missing.*mean 'answr'"),
        ('{"prompt": "a", "answer": null}\n', r"bad.jsonl:1: the column 'answer' \(answer\) is empty"),
        ('{"messages": "a", "answer": "1"}\n', r"bad.jsonl:1: messages must be a list"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}\n', r"last turn is of 'assistant'"),
        ("", r"this task has no train problems"),
    ],
)
def test_a_bad_jsonl_line_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence):
        build_task(config(path=str(tmp_path / "bad.jsonl")), 0).problems("train")


def test_other_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("prompt,answer\na,1\nb\n")
    with pytest.raises(UserError, match=r"bad.csv:3: 1 values, but the header names 2 columns"):
        build_task(config(path=str(tmp_path / "bad.csv")), 0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad.parquet: not a readable Parquet file"):
        build_task(config(path=str(tmp_path / "bad.parquet")), 0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        build_task(config(path=str(tmp_path / "latin.jsonl")), 0)
    with pytest.raises(UserError, match=r"bad.cvs does not exist in .*did you mean 'bad.csv'"):
        build_task(config(path=str(tmp_path / "bad.cvs")), 0)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"ends in '.txt'; known endings: .jsonl"):
        build_task(config(path=str(tmp_path / "x.txt")), 0)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({}, "the task is empty"),
        ({"path": "a.jsonl", "dataset": "b"}, "both given"),
        ({"path": "a.jsonl", "settings": {"x": 1}}, "no meaning for data files"),
        ({"test_path": "a.jsonl", "holdout": {"test": 0.1}}, "task.test_path and task.holdout.test"),
        ({"name": "dta"}, "did you mean 'data'"),
        ({"name": "reasoning_gim", "dataset": "chain_sum"}, "did you mean 'reasoning_gym'"),
    ],
)
def test_sections_that_contradict_themselves(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_task(config(**section), 0)


def test_columns_template_system_prompt_and_solution(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2", "gold": "so #### 4", "hint": "add"}]
    made = config(
        path=jsonl(tmp_path / "a.jsonl", rows),
        columns={"prompt": "q", "answer": "gold", "solution": "gold"},
        template="{prompt_compact} ({hint})?",
        system_prompt="Be brief.",
        reference_extract={"after": "####"},
    )
    problem = build_task(made, 0).problems("train")[0]
    assert problem.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2 (add)?"}]
    assert (problem.answer, problem.solution, problem.meta["hint"]) == ("4", "so #### 4", "add")


def test_messages_are_kept_and_get_the_system_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2 + 2?"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns, "answer": 4}])
    assert build_task(config(path=path), 0).problems("train")[0].prompt == turns
    with_system = build_task(config(path=path, system_prompt="S"), 0).problems("train")[0].prompt
    assert with_system == [{"role": "system", "content": "S"}, *turns]
    with pytest.raises(UserError, match=r"task\.template renders a prompt"):
        build_task(config(path=path, template="{messages}"), 0)
    own = jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "system", "content": "x"}, *turns], "answer": 4}])
    with pytest.raises(UserError, match="has a system message of its own"):
        build_task(config(path=own, system_prompt="S"), 0)


def test_limit_and_long_prompts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)

    def tokens(problem: Problem) -> int:
        return len(str(problem.prompt))

    first = build_task(config(path=path, limit=7), 0).problems("train")
    assert {str(p.prompt) for p in take(first, 99)} == {row["prompt"] for row in ROWS[:7]}
    short = build_task(config(path=path, max_prompt_tokens=14), 0, tokens).problems("train")
    assert (short.size, short.skipped["too_long"]) == (10, 50)
    with pytest.raises(UserError, match=r"16 tokens, task.max_prompt_tokens is 14 \(.*a.jsonl:11\)"):
        build_task(config(path=path, max_prompt_tokens=14, on_long="refuse"), 0, tokens).problems("train")
    with pytest.raises(UserError, match="none of the 60 train prompts fits"):
        build_task(config(path=path, max_prompt_tokens=3), 0, tokens).problems("train")


def test_a_test_file_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    task = build_task(config(test_path=jsonl(tmp_path / "a.jsonl", ROWS)), 0)
    assert [p.prompt for p in take(task.problems("test"), 3)] == [row["prompt"] for row in ROWS[:3]]
    with pytest.raises(UserError, match=r"no train problems; give them by task\.path"):
        task.problems("train")


@register_task("test-doubling")
def doubling(count: int = 5) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}", "answer": str(2 * n)} for n in range(count)]


@register_task("test-own-streams")
class OwnStreams:
    def __init__(self, answer: str = "1") -> None:
        self.answer = answer

    def problems(self, split: str) -> Any:
        return split


def test_registered_tasks_of_rows_problems_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = build_task(config(name="test-doubling", settings={"count": 9}, template="{prompt}="), 0).problems("train")
    assert {p.prompt: p.answer for p in take(stream, 99)} == {f"{n}+{n}=": str(2 * n) for n in range(9)}
    with pytest.raises(UserError, match="no setting 'cuont'; did you mean 'count'"):
        build_task(config(name="test-doubling", settings={"cuont": 9}), 0)
    with pytest.raises(UserError, match="did you mean 'test-doubling'"):
        build_task(config(name="test-dubling"), 0)
    assert build_task(config(name="test-own-streams"), 0).problems("test") == "test"  # type: ignore[comparison-overlap]
    with pytest.raises(UserError, match=r"task\.limit has no effect"):
        build_task(config(name="test-own-streams", limit=3), 0)
    (tmp_path / "mine.py").write_text(
        "from kdrl.tasks import Problem\ndef make():\n    return [Problem('a', 'say a', 'a', solution='a')]\n"
    )
    monkeypatch.chdir(tmp_path)
    for reference in ("mine.py:make", "mine:make"):
        assert build_task(config(name=reference), 0).problems("train")[0].solution == "a"
    with pytest.raises(UserError, match="has no 'mke'; did you mean 'make'"):
        build_task(config(name="mine.py:mke"), 0)


@pytest.mark.skipif("KDRL_DATA" not in os.environ, reason="KDRL_DATA does not name the folder with gsm8k/")
def test_gsm8k_with_its_answer_mark() -> None:
    folder = Path(os.environ["KDRL_DATA"]) / "gsm8k"
    made = config(
        path=str(folder / "train.jsonl"),
        test_path=str(folder / "test.jsonl"),
        columns={"prompt": "question", "answer": "answer", "solution": "answer"},
        reference_extract={"after": "####"},
        extract={"after": "####"},
        verifier="numeric",
    )
    task = build_task(made, 0)
    train, test, score = task.problems("train"), task.problems("test"), build_scorer(made)
    assert (train.size, test.size) == (7473, 1319)
    problems = take(test, 1319)
    assert all(score(str(p.solution), p)[0] == 1.0 for p in problems)
    assert sum(score(str(problems[0].solution), p)[0] for p in problems[1:]) < 100
    info = ResponseInfo(10, False, 100)
    by_math = config(**{**made.model_dump(exclude={"verifier", "extract"}), "verifier": "math", "extract": "boxed"})
    with VerifierPool(by_math) as pool:
        verdicts = pool.score([(f"so \\boxed{{{p.answer}}}", p, info) for p in problems[:60]])
    assert all(verdict.correct for verdict in verdicts)
