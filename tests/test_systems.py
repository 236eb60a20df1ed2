"""docs/systems.md: the list is whole, its counts are right, and what it says works is there and runs."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_examples import ROOT
from typer.main import get_command

from kdrl.cli import app
from kdrl.data.choosing import SelectConfig
from kdrl.data.generate import GenerateConfig
from kdrl.data.inputs import open_inputs
from kdrl.methods import all_methods
from kdrl.recipe import load_recipe
from kdrl.run import train
from kdrl.tasks import build_task
from kdrl.yamls import load_yaml

PAGE = (ROOT / "docs" / "systems.md").read_text()
FOLDER = ROOT / "examples" / "systems"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if "objective" in load_yaml(path.read_text(), path.name))
TASKS = sorted({*FOLDER.glob("*.yaml")} - {*RECIPES})
# sha256 of the lines "number|system|class" of the list that the page carries.
LIST = "b0188eafbaee95eb26637ed010a0b880576395252b504db41705b670a608f3e1"
REASONS = {
    *("no formula", "the teacher trains"),
    *("no command", "another network", "another modality"),
}
# What may keep a founding, reward, preference or distillation objective open; and the least that works of the others.
EXCUSES = {"no formula", "the teacher trains"}
GOALS = {"A": 1, "D": 20, "E": 10, "F": 20}


@dataclass(frozen=True)
class Row:
    """One system; `said` are the names after `method`, `recipe`, `command`, `test`."""

    number: int
    system: str
    kind: str
    state: str
    reason: str | None
    said: dict[str, list[str]]


def read_row(line: str) -> Row:
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    number, system, kind, _, state = cells
    if found := re.fullmatch(r"open \(([a-z ]+)\): .+", state):
        return Row(int(number), system, kind, "open", found[1], {})
    found = re.fullmatch(r"works: (.*?)(?:; differs: .+)?", state)
    assert found, line
    said: dict[str, list[str]] = {}
    for part in found[1].split("; "):
        word, names = part.split(" ", 1)
        assert re.fullmatch(r"`[^`]+`(, `[^`]+`)*", names), part
        said[word] = re.findall(r"`([^`]+)`", names)
    return Row(int(number), system, kind, "works", None, said)


ROWS = [read_row(line) for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
WORKING = [row for row in ROWS if row.state == "works"]


def named(word: str) -> list[str]:
    return sorted({name for row in WORKING for name in row.said.get(word, [])})


def test_all_systems_are_there_in_the_order_of_the_list():
    assert [row.number for row in ROWS] == list(range(1, 114))
    lines = "\n".join(f"{row.number}|{row.system}|{row.kind}" for row in ROWS)
    assert hashlib.sha256(lines.encode()).hexdigest() == LIST


def test_the_counts_of_the_head_are_those_of_the_rows():
    head = re.findall(r"^\| ?([A-F]?) \| [^|]+ \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    count = Counter((row.kind, row.state) for row in ROWS)
    per_class = [(k, count[k, "works"], count[k, "open"]) for k in "ABCDEF"]
    total = ("", sum(w for _, w, _ in per_class), sum(o for _, _, o in per_class))
    assert [(k, int(w), int(o), int(n)) for k, w, o, n in head] == [(k, w, o, w + o) for k, w, o in [*per_class, total]]


def test_the_goals_of_the_classes_are_reached():
    count = Counter(row.kind for row in WORKING)
    assert all(count[kind] >= least for kind, least in GOALS.items()), count
    for row in ROWS:
        if row.state == "open":
            assert row.reason in REASONS
            assert row.kind not in "ABC" or row.reason in EXCUSES, row.system


def test_what_works_says_by_what_and_which_test_shows_it():
    for row in WORKING:
        assert set(row.said) <= {"method", "recipe", "command", "test"}, row.system
        assert set(row.said) & {"method", "recipe", "command"}, row.system
        assert row.said.get("test"), row.system


def test_methods_that_are_named_exist():
    assert set(named("method")) <= set(all_methods())


def test_recipes_that_are_named_are_those_that_lie_there():
    assert {ROOT / name for name in named("recipe")} == {*RECIPES, *TASKS}


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", named("test"))
def test_tests_that_are_named_exist(test: str):
    path, function = test.split("::")
    assert re.fullmatch(r"tests/(\w+/)*test_\w+\.py", path)
    assert function.startswith("test_")
    assert function in functions_of(path)


@pytest.mark.parametrize("command", named("command"))
def test_commands_that_are_named_exist(command: str):
    program, name, *words = shlex.split(command)
    assert program == "kdrl"
    known: Any = get_command(app)
    parameters = {option: p for p in known.commands[name].params for option in p.opts}
    given: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            assert word in parameters, command
            flag = getattr(parameters[word], "is_flag", False)
            given[word] = "" if flag or i + 1 == len(words) else words[i + 1]
    if "--by" in given:
        assert given["--by"] in str(SelectConfig.model_fields["by"].annotation)
    if name == "generate" and "--keep" in given:
        assert GenerateConfig.model_validate({"keep": given["--keep"]}).keep == given["--keep"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What the rows of a trial show beside finite numbers.
SHOWS: dict[str, Any] = {
    # At the start a preference against the start is log 2, KTO's gain one half.
    "knowpo": lambda rows: abs(rows[0]["loss"] - math.log(2)) < 1e-6,
    "deliberation": lambda rows: abs(rows[0]["loss"] - 0.5) < 1e-6,
    # One term before the switch, the other after it.
    "llava-mod": lambda rows: (
        ["loss/distill" in row for row in rows] == [True, False]
        and ["loss/preference" in row for row in rows] == [False, True]
    ),
    # The earlier self is the student at first; the two weights are shares of one, and the second fades.
    "lexical-choice": lambda rows: (
        [row["weight/distill"] for row in rows] == [0.5, 0.0]
        and [row["weight/cross_entropy"] for row in rows] == [0.5, 1.0]
    ),
    "spankl": lambda rows: abs(rows[0]["loss/distill"]) < 1e-6 < rows[1]["loss/distill"],
    # A quarter and a half of the batch are kept.
    "acid": lambda rows: all(row["source/kept"] == 0.25 for row in rows),
    "hard": lambda rows: all(row["source/kept"] == 0.5 for row in rows),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_trains(path: Path, checkout: Path):
    recipe = load_recipe(path, ["device=cpu", "log.progress=off"])
    train(recipe, output=checkout / "run", say=lambda text: None)
    rows = [json.loads(line) for line in (checkout / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and row["skipped_updates"] == 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert SHOWS.get(path.stem, lambda rows: True)(rows)


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_every_task_has_problems(path: Path, checkout: Path):
    assert (build_task(open_inputs(path).task, 0).problems("train").size or 0) > 0
