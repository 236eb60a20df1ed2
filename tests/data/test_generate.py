"""Traces: what is drawn, which are kept, what the file holds, and what it is good for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from killing import command, server
from tiny import raw_recipe, rows_of, run, section, with_teacher

from data.making import inputs_of, read, recipe_file, trace, write
from kdrl.data.generate import GenerateConfig, Summary, generate
from kdrl.data.inputs import checked_options, open_inputs
from kdrl.data.store import state_path
from kdrl.data.thoughts import parse_first_thought
from kdrl.data.traces import keep_traces, satisfied
from kdrl.engines import TorchEngine
from kdrl.errors import UserError
from kdrl.jsonlines import JsonLines
from kdrl.models import encode_prompt, load_model
from kdrl.recipe import load_recipe
from kdrl.seeds import derive
from kdrl.tasks import build_task, take


def go(world: Path, folder: Path, name: str = "out.jsonl", **options: Any) -> tuple[list[dict], Summary]:
    change = options.pop("change", {})
    model, writer = options.pop("model", None), options.pop("writer", None)
    out = folder / name
    config = checked_options(GenerateConfig, options)
    done = generate(inputs_of(world, folder, **change), config, out, model=model, writer=writer, say=lambda text: None)
    return (read(out) if out.exists() else []), done


def even(text: str) -> bool:
    return sum(map(ord, text)) % 2 == 0


def test_a_line_holds_the_response_of_the_teacher_and_its_verdict(world: Path, tmp_path: Path):
    rows, done = go(world, tmp_path, samples=3)
    recipe = load_recipe(raw_recipe(world, "kdrl", **with_teacher(world)))
    problems = take(build_task(recipe.task, recipe.seed).problems("train"), 10**6)
    by_id = {p.id: p for p in problems}
    assert [key for key, _ in groupby(rows, key=lambda r: r["id"])] == list(dict.fromkeys(p.id for p in problems))
    teacher = load_model(recipe.teacher, "cpu", trainable=False, seed=0)  # type: ignore[arg-type]
    written = TorchEngine(teacher, 64).generate(
        [encode_prompt(teacher, by_id[i].prompt) for i in dict.fromkeys(r["id"] for r in rows)],
        samples=3,
        max_new_tokens=6,
        seed=derive(0, "generate", 0),
    )
    flat = [sample for group in written for sample in group]
    assert len(flat) == len(rows)
    for row, sample in zip(rows, flat, strict=True):
        assert row["response"] == teacher.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert (row["tokens"], row["ended"]) == (len(sample.token_ids), sample.ended)
        assert row["correct"] == even(row["response"].strip()) if row["response"].strip() else not row["correct"]
        assert (row["prompt"], row["answer"]) == (by_id[row["id"]].prompt, by_id[row["id"]].answer)
        assert row["model"] == str(world / "teacher")
    c = done.counts
    assert (c["problems"], c["drawn"], c["kept"]) == (len(by_id), len(rows), len(rows))
    assert c["right"] == sum(r["correct"] for r in rows)
    assert c["tokens"] == sum(r["tokens"] for r in rows)
    assert f"accuracy of the first draws {c['right'] / len(rows):.3f}" in done.lines()[1]


def test_keeping_is_a_choice_among_the_same_draws(world: Path, tmp_path: Path):
    everything, _ = go(world, tmp_path, "all.jsonl", samples=4)
    groups = {key: list(rows) for key, rows in groupby(everything, key=lambda r: r["id"])}
    right, done = go(world, tmp_path, "right.jsonl", samples=4, keep="right")
    assert right == [r for r in everything if r["correct"]]
    assert done.counts["solved"] == sum(any(r["correct"] for r in g) for g in groups.values())
    wrong, _ = go(world, tmp_path, "wrong.jsonl", samples=4, keep="wrong", most=1)
    assert [r["id"] for r in wrong] == [i for i, g in groups.items() if not all(r["correct"] for r in g)]
    best, _ = go(world, tmp_path, "best.jsonl", samples=4, keep="best")
    for row, group in zip(best, groups.values(), strict=True):
        assert row == min(group, key=lambda r: (-r["reward"], r["tokens"], r["sample"]))
    pairs, _ = go(world, tmp_path, "pair.jsonl", samples=4, keep="pair")
    both = [i for i, g in groups.items() if 0 < sum(r["correct"] for r in g) < 4]
    assert [r["id"] for r in pairs] == [i for i in both for _ in range(2)]
    assert [r["correct"] for r in pairs] == [True, False] * len(both)
    assert both, "a test without a pair proves nothing"


def test_tries_draw_again_only_where_something_is_missing(world: Path, tmp_path: Path):
    once, first = go(world, tmp_path, "once.jsonl", samples=2, keep="right")
    more, done = go(world, tmp_path, "more.jsonl", samples=2, keep="right", tries=4)
    unsolved = first.counts["problems"] - first.counts["solved"]
    assert unsolved > 0
    assert [r for r in more if r["sample"] < 2] == once
    assert done.counts["solved"] > first.counts["solved"]
    assert first.counts["drawn"] + 2 * unsolved <= done.counts["drawn"] <= first.counts["drawn"] + 6 * unsolved
    assert done.counts["right"] == first.counts["right"], "accuracy is that of the first draws, not of the hard rest"
    hopeless = {"task": {"verifier": {"name": f"{world / 'judge.py'}:never", "workers": 1}}}
    rows, done = go(world, tmp_path, "none.jsonl", samples=1, keep="right", tries=3, problems=5, change=hopeless)
    assert (rows, done.counts["drawn"], done.counts["solved"]) == ([], 15, 0)


def test_rules_of_keeping():
    mixed = [trace(0, False, ended=False), trace(1, True, 9), trace(2, True, 4), trace(3, False), trace(4, True, 4)]
    samples = lambda found: [t.sample for t in found]  # noqa: E731
    assert samples(keep_traces(mixed, "all")) == [0, 1, 2, 3, 4]
    assert samples(keep_traces(mixed, "right")) == [1, 2, 4]
    assert samples(keep_traces(mixed, "right", most=2)) == [2, 4], "fewest tokens, then as drawn"
    assert samples(keep_traces(mixed, "wrong", most=1)) == [3], "one that ended says more than one that was cut"
    assert samples(keep_traces(mixed, "best")) == [2]
    assert samples(keep_traces(mixed, "pair")) == [2, 3]
    assert keep_traces([t for t in mixed if t.correct], "pair") == []
    same = [trace(0, True, text="a"), trace(1, True, text="b"), trace(2, True, text="a")]
    assert samples(keep_traces(same, "right", distinct=True)) == [0, 1]
    assert [satisfied(mixed[:2], k) for k in ("all", "right", "wrong", "best", "pair")] == [True] * 5
    assert [satisfied(mixed[:1], k) for k in ("all", "right", "wrong", "best", "pair")] == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_another_model_begins_the_response(world: Path, tmp_path: Path):
    named = str(world / "teacher")
    change = {"student": section() | {"model": {**section()["model"], "hidden_size": 24}}}
    options = {"first_thought": f"{named}/3", "temperature": 0.0, "writer": "student", "change": change}
    rows, _ = go(world, tmp_path, "led.jsonl", problems=6, **options)
    plain, _ = go(world, tmp_path, "plain.jsonl", problems=6, temperature=0.0)
    recipe = load_recipe(raw_recipe(world, "kdrl", **with_teacher(world), **change))
    student = load_model(recipe.student, "cpu", trainable=False, seed=recipe.seed)
    for row, own in zip(rows, plain, strict=True):
        ids = student.tokenizer(own["response"])["input_ids"][:3]
        begun = student.tokenizer.decode(ids, skip_special_tokens=True)
        assert row["first_thought"] == begun
        prompt = encode_prompt(student, row["prompt"]) + list(ids)
        ((sample,),) = TorchEngine(student, 4).generate([prompt], samples=1, max_new_tokens=6, temperature=0, seed=0)
        assert row["response"] == begun + student.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert row["tokens"] == len(ids) + len(sample.token_ids)
    assert parse_first_thought("a/b/line") == ("a/b", "line")
    for bad in ("models/x", "/3", "model/0", "model/"):
        with pytest.raises(UserError, match="must end with how much is taken"):
            checked_options(GenerateConfig, {"first_thought": bad})


def test_gold_trains_on_the_right_traces_of_a_file(world: Path, tmp_path: Path):
    rows, _ = go(world, tmp_path, samples=4, keep="right")
    task = {"path": str(tmp_path / "out.jsonl"), "holdout": None}
    raw = raw_recipe(world, "sft", task=task, log={"rollouts_every": 1, "rollouts": 8})
    run(raw, tmp_path / "run")
    shown = read(tmp_path / "run" / "rollouts.jsonl")
    wanted = {(r["prompt"], r["response"]) for r in rows}
    assert shown
    assert {(r["prompt"], r["response"]) for r in shown} <= wanted
    assert rows_of(tmp_path / "run")[-1]["loss"] > 0
    mixed, _ = go(world, tmp_path, "mixed.jsonl", samples=4)
    assert not all(r["correct"] for r in mixed)
    raw = raw_recipe(world, "sft", task={**task, "path": str(tmp_path / "mixed.jsonl")}, steps=30)
    with pytest.raises(UserError, match="no worked solution"):
        run(raw, tmp_path / "refused")
    stream = build_task(load_recipe(raw, ["task.columns.solution=response"]).task, 0).problems("train")
    both = Counter((p.prompt, p.solution) for p in take(stream, 10**6))
    assert both == Counter((r["prompt"], r["response"]) for r in mixed), "asked for by name, wrong ones too"


def test_chat_prompts_come_back_as_messages(world: Path, tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    change = {"student": {"chat_template": template}, "teacher": {"model": str(world / "teacher")}}
    change["teacher"]["chat_template"] = template
    rows, _ = go(world, tmp_path, problems=4, change={**change, "task": {"system_prompt": "think"}})
    assert rows[0]["prompt"][0] == {"role": "system", "content": "think"}
    raw = raw_recipe(world, "sft", task={"path": str(tmp_path / "out.jsonl"), "holdout": None})
    again = take(build_task(load_recipe(raw).task, 0).problems("train"), 10)
    assert {(p.id, json.dumps(p.prompt)) for p in again} == {(r["id"], json.dumps(r["prompt"])) for r in rows}


def test_who_writes(world: Path, tmp_path: Path):
    rows, _ = go(world, tmp_path, "s.jsonl", writer="student", problems=2)
    assert rows[0]["model"] == "new model"
    rows, _ = go(world, tmp_path, "m.jsonl", model=str(world / "teacher"), problems=2)
    assert rows[0]["model"] == str(world / "teacher")
    for options, said in [
        ({"model": "x", "writer": "student"}, "--model and --writer both say who writes"),
        ({"writer": "judge"}, "--writer is teacher or student, not 'judge'"),
        ({"model": str(world / "gone")}, "there is no such folder"),
        ({"change": {"teacher": None}}, "there is no teacher to write: name a model with --model"),
    ]:
        if "change" in options:
            inputs = inputs_of(world, tmp_path).model_copy(update={"teacher": None})
            with pytest.raises(UserError, match=said):
                generate(inputs, GenerateConfig(), tmp_path / "x.jsonl")
            continue
        with pytest.raises(UserError, match=said):
            go(world, tmp_path, "x.jsonl", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "rigth"}, "--keep: Input should be 'all'"),
        ({"tries": 2}, "--tries does nothing with --keep all"),
        ({"keep": "pair"}, "--keep pair needs at least two draws"),
        ({"keep": "best", "most": 2}, "--most belongs to --keep right or wrong"),
        ({"temperature": 0.0, "samples": 2}, "--temperature 0 writes the same trace 2 times"),
        ({"temperature": 0.0, "top_k": 3}, "--top-p and --top-k change nothing at temperature 0"),
        ({"max_new_tokens": 500}, "reads at most 128 tokens, but a prompt of .* lower --max-new-tokens"),
        ({"split": "tset"}, "--split: Input should be"),
    ],
)
def test_options_that_cannot_work_are_sentences(options: dict[str, Any], said: str, world: Path, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        go(world, tmp_path, **options)


def test_an_endless_task_needs_a_number(world: Path, tmp_path: Path):
    task = {"name": "reasoning_gym", "dataset": "chain_sum", "template": "{expression_compact}="}
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps({"task": task, "student": section(), "rollout": {"max_new_tokens": 4}}))
    with pytest.raises(UserError, match="have no end; say how many with --problems"):
        generate(open_inputs(path), GenerateConfig(), tmp_path / "x.jsonl", writer="student")
    done = generate(open_inputs(path), GenerateConfig(problems=7), tmp_path / "y.jsonl", writer="student")
    assert len({row["id"] for row in read(done.path)}) == 7


def test_a_file_of_other_settings_or_none_is_not_gone_on_with(world: Path, tmp_path: Path):
    go(world, tmp_path, problems=4)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"begun with other settings: temperature was 1.0 and is 0.5 now"):
        go(world, tmp_path, problems=4, temperature=0.5)
    with pytest.raises(UserError, match=r"begun with other settings: task.verifier.timeout_s"):
        go(world, tmp_path, problems=4, change={"task": {"verifier": {"timeout_s": 3.0}}})
    (tmp_path / "out.jsonl").write_bytes(before[:-5])
    with pytest.raises(UserError, match="it was cut or changed"):
        go(world, tmp_path, problems=4)
    state_path(tmp_path / "out.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be gone on with; choose another --output"):
        go(world, tmp_path, problems=4)
    (tmp_path / "out.jsonl").write_bytes(b"")
    go(world, tmp_path, problems=4)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="there is no folder"):
        go(world, tmp_path, "gone/out.jsonl")


def test_more_problems_are_added_to_a_finished_file(world: Path, tmp_path: Path):
    change = {"rollout": {"rows": 8}}
    few, _ = go(world, tmp_path, "grown.jsonl", problems=5, samples=2, change=change)
    grown, done = go(world, tmp_path, "grown.jsonl", problems=17, samples=2, change=change)
    whole, _ = go(world, tmp_path, "whole.jsonl", problems=17, samples=2, change=change)
    assert grown[: len(few)] == few
    assert grown == whole
    assert done.counts["problems"] == 17
    again, same = go(world, tmp_path, "grown.jsonl", problems=17, samples=2, change=change)
    assert (again, same.counts) == (grown, done.counts)


def torn(arguments: list[str], write_number: int, share: float) -> None:
    """`kdrl ARGUMENTS` that dies by SIGKILL in the middle of writing a line, a part of it on disk."""
    seen = [0]
    whole = JsonLines.write

    def write_some(self: JsonLines, row: Any) -> None:
        seen[0] += 1
        if seen[0] == write_number:
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
            self._file.write(line[: int(share * len(line))])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, row)

    JsonLines.write = write_some  # type: ignore[method-assign]
    command(arguments, os.devnull)


@pytest.mark.parametrize("keep", ["all", "right"])
def test_killed_and_gone_on_with_has_the_bytes_of_an_undisturbed_file(keep: str, world: Path, tmp_path: Path):
    change = {"rollout": {"rows": 12}}
    recipe = recipe_file(world, tmp_path, **change)
    options = {"samples": 2, "keep": keep, "tries": 1 if keep == "all" else 2}
    _, done = go(world, tmp_path, "whole.jsonl", change=change, **options)
    out = tmp_path / "killed.jsonl"
    arguments = ["generate", str(recipe), "--output", str(out)]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    deaths, context = 0, server()
    for line, share in ((15, 0.5), (14, 0.99), (3, 0.0)):
        process = context.Process(target=torn, args=(arguments, line, share))
        process.start()
        process.join(60)
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths == 3
    said: list[str] = []
    config = checked_options(GenerateConfig, options)
    again = generate(open_inputs(recipe), config, out, say=said.append)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert state_path(out).read_bytes() == state_path(tmp_path / "whole.jsonl").read_bytes()
    assert again.counts == done.counts
    assert any("unfinished batch" in line for line in said)
    assert any("problems already; going on" in line for line in said)
    assert not list(tmp_path.glob("*.lock"))


def test_ctrl_c_leaves_a_whole_file_and_says_so(world: Path, tmp_path: Path):
    (tmp_path / "slow.py").write_text("import time\n\n\ndef slow(response, problem):\n    time.sleep(0.4)\n")
    judge = {"name": f"{tmp_path / 'slow.py'}:slow", "workers": 1}
    recipe = recipe_file(world, tmp_path, rollout={"rows": 1}, task={"verifier": judge})
    out, said = tmp_path / "out.jsonl", tmp_path / "said.txt"
    arguments = ["generate", str(recipe), "--output", str(out)]
    process = server().Process(target=command, args=(arguments, str(said)))
    process.start()
    while not (out.exists() and out.stat().st_size):
        process.join(0.05)
        assert process.is_alive()
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1
    assert "stopped; what is written to" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert all("response" in row for row in read(out))


def test_two_processes_do_not_share_a_file(world: Path, tmp_path: Path):
    lock = state_path(tmp_path / "out.jsonl").with_suffix(".lock")
    code = (
        f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is writing"):
            go(world, tmp_path)
        other.communicate(b"\n")
    go(world, tmp_path, problems=1)


def test_a_full_disk_is_a_sentence(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written: No space left on device; free some space"):
        go(world, tmp_path, problems=2)


def test_what_a_source_can_be(world: Path, tmp_path: Path):
    data = open_inputs(world / "data.jsonl", ["task.verifier=numeric"])
    assert (data.task.path, data.task.verifier.name) == (str(world / "data.jsonl"), "numeric")
    run(raw_recipe(world, "grpo"), tmp_path / "run")
    assert open_inputs(tmp_path / "run").task == load_recipe(tmp_path / "run").task
    bad = write(tmp_path / "bad.yaml", [])
    for source, overrides, said in [
        ("gone.yaml", [], "there is no file or folder gone.yaml"),
        (bad, [], "neither a recipe nor a task file"),
        (world / "data.jsonl", ["task.verifer=numeric"], "did you mean 'verifier'"),
        (world / "data.jsonl", ["steps=3"], "steps is no recipe key"),
        (world / "data.jsonl", ["numeric"], "no override; write key=value"),
    ]:
        with pytest.raises(UserError, match=said):
            open_inputs(source, overrides)


def test_problem_ids_are_those_of_the_task(world: Path, tmp_path: Path):
    rows, _ = go(world, tmp_path, split="test")
    task = build_task(load_recipe(raw_recipe(world, "grpo")).task, 3)
    assert {r["id"] for r in rows} == {p.id for p in take(task.problems("test"), 100)}


def test_source_traces_reads_the_file_with_its_verdicts(world: Path, tmp_path: Path):
    rows, _ = go(world, tmp_path, samples=4, keep="pair")
    source = {"traces": {"path": str(tmp_path / "out.jsonl"), "take": "wrong"}}
    run(raw_recipe(world, "sft", source=source, log={"rollouts_every": 1, "rollouts": 8}), tmp_path / "run")
    shown = {(r["prompt"], r["response"], r["correct"]) for r in read(tmp_path / "run" / "rollouts.jsonl")}
    assert shown
    assert shown <= {(r["prompt"], r["response"], False) for r in rows if not r["correct"]}
