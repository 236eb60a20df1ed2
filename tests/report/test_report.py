from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from kdrl.errors import UserError
from kdrl.report import report_run, report_runs

from .runs import evaluation, rows, write_run


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(path: Path) -> Page:
    return Page(path.read_text())


def shown(table: Table, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_page_of_a_run_holds_what_was_asked(tmp_path: Path):
    path = report_run(write_run(tmp_path / "kdrl-seed1"))
    assert path == tmp_path / "kdrl-seed1" / "report.html"
    got = page(path)
    for words in (
        *("Held-out accuracy", "Tokens per correct", "Truncated", "Teacher calls saved", "29.7 %"),
        *(
            "Reward",
            "Accuracy on development problems",
            "KL to the teacher",
            "Log-ratio R",
            "Entropy",
            "Response length",
        ),
        *("Gradient norms KD : RL", "Gradient cosine", "Zero-advantage groups", "Masked tokens", "Tokens per second"),
        *("Time per phase", "teacher, held-out", "method: kdrl", "2.13.0", "4+5-3="),
    ):
        assert words in got.text, words
    assert got.tags.count("svg") >= 18


def test_page_is_self_contained_and_escapes_what_models_write(tmp_path: Path):
    got = page(report_run(write_run(tmp_path / "r")))
    assert "script" not in got.tags
    assert "<script>alert(1)</script>" in got.text
    assert got.links == []
    source = (tmp_path / "r" / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", source)
    assert "prefers-color-scheme:dark" in source


def test_hostile_recipe_and_chat_prompts_are_escaped(tmp_path: Path):
    folder = write_run(tmp_path / "r", final=None)
    (folder / "recipe.yaml").write_text("method: '</pre><img src=x>'\n")
    turns = [{"role": "user", "content": "<i>hi</i>"}]
    (folder / "rollouts.jsonl").write_text(json.dumps({"step": 1, "prompt": turns, "response": "</pre><b>"}) + "\n")
    got = page(report_run(folder))
    assert {"img", "b"} & set(got.tags) == {"b"} & set(got.tags)
    assert "img" not in got.tags
    assert "user: <i>hi</i>" in got.text


def test_sparse_rows_draw_only_what_they_have(tmp_path: Path):
    folder = write_run(tmp_path / "r", final=None)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "reward": "high"}\n')
    got = page(report_run(folder))
    assert got.tags.count("svg") == 1
    assert "not finished, or has no held-out evaluation" in got.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", b'{"step": 1, "reward": 1}\nbroken\n{"step": 2}\n{"st', "1 of 3 lines of metrics.jsonl"),
        ("metrics.jsonl", b"", "no training step was logged"),
        ("metrics.jsonl", b'{"reward": 1}\n', "have no step"),
        ("metrics.jsonl", None, "metrics.jsonl does not exist"),
        ("evaluation.json", b"{", "evaluation.json is broken"),
        ("evaluation.json", b"[]", "evaluation.json is not a mapping"),
        ("evaluation.json", b'{"final": {"model": "m"}}', "evaluation.json, final"),
        ("evaluation.json", b'{"final": null}', "no evaluation of the finished student"),
        ("recipe.yaml", b"a: [", "recipe.yaml is broken"),
        ("recipe.yaml", None, "recipe.yaml does not exist"),
        ("environment.json", b"\xff\xfe", "environment.json cannot be read"),
        ("rollouts.jsonl", b"[1]\n", "rollouts.jsonl are no JSON objects"),
    ],
)
def test_what_is_broken_is_said_on_both_pages(name: str, content: bytes | None, words: str, tmp_path: Path):
    folder = write_run(tmp_path / "r")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert words in page(report_run(folder)).text
    table, path = report_runs([folder])
    assert shown(table)
    if name != "environment.json":
        assert words in page(path).text


def test_no_run_is_a_sentence(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for path, words in [(tmp_path / "absent", "does not exist"), (tmp_path / "empty", "so it is not a run")]:
        with pytest.raises(UserError, match=words):
            report_run(path)
    with pytest.raises(UserError, match="no run to compare"):
        report_runs([tmp_path / "absent", tmp_path / "empty"])


def table_rows(path: Path) -> list[list[str]]:
    body = re.search(r"<tbody>(.*?)</tbody>", path.read_text(), re.DOTALL)
    assert body
    return [re.findall(r"<td>(.*?)</td>", row) for row in body[1].split("</tr>") if "<td>" in row]


def make_demo(folder: Path, seeds: tuple[int, ...] = (1, 2)) -> list[Path]:
    return [
        write_run(folder / f"{method}-seed{seed}", method=method, seed=seed, final=final)
        for method, final in [("kdrl", 0.6), ("grpo", 0.35)]
        for seed in seeds
    ]


def test_seeds_are_grouped_and_references_stand_first_once(tmp_path: Path):
    table, path = report_runs(make_demo(tmp_path))
    got = table_rows(path)
    assert [row[0] for row in got] == ["teacher", "start student", "kdrl", "grpo"]
    assert [row[1] for row in got] == ["–", "–", "2", "2"]
    mean = [100 * evaluation(f"kdrl-seed{s}/final", 0.6, seed=s).accuracy for s in (1, 2)]
    assert got[2][2].startswith(f"{sum(mean) / 2:.1f} % ± ")
    assert got[3][4] == "–", "differences are from grpo although kdrl was given first"
    assert re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", got[2][4])
    text = shown(table)
    assert "teacher" in text
    assert "grpo" in text


def test_one_seed_shows_no_seeds_and_another_recipe_is_another_arm(tmp_path: Path):
    first = write_run(tmp_path / "kdrl-seed1", seed=1)
    second = write_run(tmp_path / "kdrl-seed2", seed=2)
    recipe = yaml.safe_load((second / "recipe.yaml").read_text()) | {"steps": 99}
    (second / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, path = report_runs([first, second])
    assert [row[0] for row in table_rows(path)] == ["teacher", "start student", "kdrl-seed1", "kdrl-seed2"]
    assert "seeds</th>" not in path.read_text()


def test_plot_has_a_line_per_arm_the_teacher_as_a_level_and_is_a_file(tmp_path: Path):
    _, path = report_runs(make_demo(tmp_path))
    assert path == tmp_path / "comparison.html"
    picture = tmp_path / "comparison.svg"
    root = ET.fromstring(picture.read_text())
    ns = "{http://www.w3.org/2000/svg}"
    assert len([e for e in root.iter(f"{ns}polyline") if "line" in e.attrib["class"].split()]) == 2
    assert len(list(root.iter(f"{ns}polygon"))) == 2, "a band of the seeds for each arm"
    texts = [e.text for e in root.iter(f"{ns}text")]
    assert "teacher, held-out" in texts
    assert {"kdrl", "grpo"} <= set(texts)
    got = page(path)
    assert got.tags.count("svg") == 2
    assert "responses written" in got.text


def test_a_glob_that_holds_the_reports_own_files_works_twice(tmp_path: Path):
    make_demo(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "other").mkdir()
    first = report_runs(sorted(tmp_path.iterdir()))[1].read_text()
    second = report_runs(sorted(tmp_path.iterdir()))[1].read_text()
    assert first == second
    assert "other is no run" in first


def test_runs_without_evaluation_or_steps_have_a_row(tmp_path: Path):
    runs = make_demo(tmp_path, seeds=(1,))
    runs.append(write_run(tmp_path / "unfinished", method="opd", final=None))
    runs.append(write_run(tmp_path / "empty", method="sft", steps=0))
    got = {row[0]: row for row in table_rows(report_runs(runs)[1])}
    assert got["unfinished"][1] == "not evaluated"
    assert got["empty"][-2:] == ["–", "–"]


def test_other_problems_are_not_compared(tmp_path: Path):
    runs = make_demo(tmp_path, seeds=(1,))
    (runs[0] / "evaluation.json").write_text(json.dumps({"final": evaluation("x", 0.5, prefix="q").to_dict()}))
    got = {row[0]: row for row in table_rows(report_runs(runs)[1])}
    assert got["kdrl"][3] == "other problems"


def test_nothing_right_is_a_word(tmp_path: Path):
    runs = make_demo(tmp_path, seeds=(1,))
    (runs[0] / "evaluation.json").write_text(json.dumps({"final": evaluation("x", 0.0).to_dict()}))
    got = {row[0]: row for row in table_rows(report_runs(runs)[1])}
    assert got["kdrl"][5] == "no right answer"


def test_teacher_calls_saved_is_a_share_of_counters_that_run_on(tmp_path: Path):
    folder = write_run(tmp_path / "r", steps=3)
    lines: list[dict[str, Any]] = rows(3)
    for i, row in enumerate(lines, start=1):
        row.update(teacher_calls=30 * i, teacher_calls_saved=10 * i)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert table_rows(report_runs([folder])[1])[-1][-3] == "25 %"


def test_base_can_be_named_and_a_wrong_name_is_refused(tmp_path: Path):
    runs = make_demo(tmp_path, seeds=(1,))
    assert {row[0]: row for row in table_rows(report_runs(runs, base="kdrl")[1])}["kdrl"][3] == "–"
    with pytest.raises(UserError, match="no arm is called 'krdl'"):
        report_runs(runs, base="krdl")


def test_out_may_be_a_file_or_a_folder(tmp_path: Path):
    runs = make_demo(tmp_path / "runs", seeds=(1,))
    assert report_runs(runs, tmp_path / "x" / "all.html")[1] == tmp_path / "x" / "all.html"
    assert (tmp_path / "x" / "all.svg").exists()
    assert report_runs(runs, tmp_path / "y")[1] == tmp_path / "y" / "comparison.html"


def test_table_of_several_seeds_fits_eighty_columns(tmp_path: Path):
    runs = make_demo(tmp_path)
    shutil.move(runs[0], tmp_path / "kdrl-annealed-seed1")
    shutil.move(runs[1], tmp_path / "kdrl-annealed-seed2")
    table = report_runs(sorted(tmp_path.iterdir()))[0]
    narrow, wide = shown(table, 80), shown(table, 300)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    for word in re.findall(r"kdrl-annealed|[\d.]+±[\d.]+|[\d.]+–[\d.]+|\[[+-].*?\]", wide):
        assert word in narrow


def test_a_report_needs_no_torch(tmp_path: Path):
    write_run(tmp_path / "r")
    code = "import sys, kdrl.report as r; r.report_run(sys.argv[1]); assert 'torch' not in sys.modules"
    assert run_command([sys.executable, "-c", code, str(tmp_path / "r")], check=False).returncode == 0
