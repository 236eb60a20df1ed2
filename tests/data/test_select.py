"""Which rows each selector keeps, in which formats, and what it says when it cannot."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHARACTERS, MODEL, raw_recipe, sharpen

from data.making import read, task_file, write
from kdrl.cli import main
from kdrl.data.choosing import SelectConfig, domain_shares, kept_count, parse_keep, quotas, resample
from kdrl.data.coverage import first_token_probabilities
from kdrl.data.inputs import checked_options, open_inputs
from kdrl.data.report import numbers
from kdrl.data.rows import load_rows
from kdrl.data.scoring import score_rows
from kdrl.data.select import Selection, select
from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, NewModel, NewTokenizer, encode_prompt, load_model, save_final
from kdrl.tasks import TaskConfig, build_task, take
from kdrl.tasks.streams import WeightedStream

ROWS = [
    {
        "prompt": f"{a}+{b}=",
        "answer": str(a + b),
        "solution": f"{a}+{b};{a + b}#" * (1 + a % 3),
        "domain": "even" if a % 2 == 0 else "odd",
    }
    for a in range(1, 8)
    for b in range(1, 8)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher and a reference; the reference has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed, characters in (("teacher", 1, CHARACTERS), ("reference", 2, CHARACTERS[::-1])):
        config = ModelConfig(model=NewModel(**MODEL), tokenizer=NewTokenizer(characters=characters))
        loaded = load_model(config, "cpu", trainable=False, seed=seed)
        sharpen(loaded, 6.0)
        save_final(loaded, folder / name)
    return {name: str(folder / name) for name in ("teacher", "reference")}


def choose(folder: Path, rows: list[dict] | Path, name: str = "out.jsonl", **options: Any) -> Selection:
    data = rows if isinstance(rows, Path) else write(folder / "in.jsonl", rows)
    named = {role: options.pop(role) for role in ("teacher", "reference") if role in options}
    task = options.pop("task", {})
    config = checked_options(SelectConfig, options)
    (folder / name).unlink(missing_ok=True)
    return select(open_inputs(task_file(folder, data, **task)), config, folder / name, **named)


def losses(folder: Path, model: str) -> tuple[list[float], list[int]]:
    rows, _ = load_rows(open_inputs(write(folder / "in.jsonl", ROWS)).task)
    config = open_inputs(folder / "in.jsonl").model_section(model)
    found = score_rows(load_model(config, "cpu", trainable=False, seed=0), rows)
    assert None not in found.nats
    return [float(x) for x in found.nats if x is not None], found.tokens


def test_difference_keeps_the_share_where_the_teacher_is_most_ahead(models: dict[str, str], tmp_path: Path):
    (nats_t, tokens), (nats_r, _) = (losses(tmp_path, models[role]) for role in ("teacher", "reference"))
    ahead = [(r - t) / n for t, r, n in zip(nats_t, nats_r, tokens, strict=True)]
    for keep, count in ((0.5, 24), (0.25, 12), (7, 7), (1.0, 49)):
        done = choose(tmp_path, ROWS, by="difference", keep=keep, scores=True, **models)
        best = sorted(range(49), key=lambda i: -ahead[i])[:count]
        assert done.choice.kept == sorted(best)
        out = read(tmp_path / "out.jsonl")
        assert [{k: row[k] for k in ROWS[0]} for row in out] == [ROWS[i] for i in sorted(best)]
        assert [row["difference"] for row in out] == pytest.approx([ahead[i] for i in sorted(best)], rel=1e-5)
    least = choose(tmp_path, ROWS, by="difference", keep=0.5, reverse=True, **models)
    assert least.choice.kept == sorted(sorted(range(49), key=lambda i: ahead[i])[:24])
    found = numbers(choose(tmp_path, ROWS, by="difference", keep=0.5, **models))
    assert found["all"][0] == pytest.approx(min(ahead), rel=1e-5)
    assert found["of_kept"][0] >= found["all"][3] - 1e-9, "the kept half lies above the median"


def test_perplexity_by_bounds_and_by_share(models: dict[str, str], tmp_path: Path):
    for role in ("teacher", "reference"):
        nats, tokens = losses(tmp_path, models[role])
        perplexity = [math.exp(x / n) for x, n in zip(nats, tokens, strict=True)]
        low, high = sorted(perplexity)[10] - 1e-6, sorted(perplexity)[30] + 1e-6
        named = {role: models[role]}
        within = choose(tmp_path, ROWS, by="perplexity", of=role, low=low, high=high, **named)
        assert within.choice.kept == [i for i, value in enumerate(perplexity) if low <= value <= high]
        least = choose(tmp_path, ROWS, by="perplexity", of=role, keep=0.2, **named)
        assert least.choice.kept == sorted(sorted(range(49), key=lambda i: perplexity[i])[:10])


def test_length_in_tokens_of_the_teacher_or_as_stored(models: dict[str, str], tmp_path: Path):
    done = choose(tmp_path, ROWS, by="length", high=10, teacher=models["teacher"])
    assert done.choice.kept == [i for i, row in enumerate(ROWS) if len(row["solution"]) <= 10]
    stored = [{**row, "tokens": i} for i, row in enumerate(ROWS)]
    assert choose(tmp_path, stored, by="length", low=5, high=8).choice.kept == [5, 6, 7, 8]
    with pytest.raises(UserError, match="asks a teacher model and none is named"):
        choose(tmp_path, ROWS, by="length", high=10)


def verdicts(shares: dict[str, list[bool]]) -> list[dict]:
    return [
        {"prompt": prompt, "answer": "1", "response": "r", "correct": right} for prompt, all_of in shares.items()
        for right in all_of
    ]  # fmt: skip


def test_success_of_the_data_itself_or_of_other_traces(tmp_path: Path):
    traces = verdicts({"a": [True, True], "b": [True, False], "c": [False, False]})
    assert choose(tmp_path, traces, by="success", low=0.1, high=0.9).choice.kept == [2, 3]
    assert choose(tmp_path, traces, by="success", low=0.5).choice.kept == [0, 1, 2, 3]
    solved = write(tmp_path / "student.jsonl", verdicts({"1+1=": [True, True, True], "1+2=": [True, False, False]}))
    done = choose(tmp_path, ROWS, by="success", traces=str(solved), high=0.9)
    assert [ROWS[i]["prompt"] for i in done.choice.kept] == ["1+2="], "what the student solves already is dropped"
    assert "47 rows have a prompt without a trace" in done.choice.notes[0]
    with pytest.raises(UserError, match=r"in\.jsonl:1 is no trace with a verdict"):
        choose(tmp_path, ROWS, by="success", low=0.5)
    with pytest.raises(UserError, match="would keep none of 6 rows"):
        choose(tmp_path, traces, by="success", low=0.6, high=0.7)
    state = {"settings": {"keep": "right"}, "problems": 1, "bytes": 1, "counts": {}}
    (tmp_path / "student.jsonl.state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="written with --keep right, so the share of right traces in it says nothing"):
        choose(tmp_path, ROWS, by="success", traces=str(solved), high=0.9)


def test_domain_shares_by_hand():
    shares = domain_shares({"a": 2.0, "b": 1.0}, 0.5)
    assert shares["a"] == pytest.approx(0.5 * math.e / (1 + math.e) + 0.25)
    assert sum(shares.values()) == pytest.approx(1)
    assert domain_shares({"a": 2.0, "b": 1.0, "c": 9e9}, 0.0) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert domain_shares({"a": 9e9, "b": 1.0}, 1.0) == {"a": 1.0, "b": 0.0}
    assert quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 7) == {"a": 4, "b": 2, "c": 1}
    picks = resample({"a": [0, 1], "b": [2, 3, 4, 5]}, {"a": 0.75, "b": 0.25}, 8, 0)
    assert Counter(picks)[0] == Counter(picks)[1] == 3
    assert len({i for i in picks if i > 1}) == 2, "a domain with enough rows gives different ones"


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 200))
def test_quotas_add_up_and_stay_within_one(raw: list[float], size: int):
    shares = {str(i): value / sum(raw) for i, value in enumerate(raw)}
    found = quotas(shares, size)
    assert sum(found.values()) == size
    assert all(abs(found[name] - share * size) < 1 + 1e-9 for name, share in shares.items())


def test_ddk_weighs_domains_by_their_perplexity_ratio(models: dict[str, str], tmp_path: Path):
    (nats_t, tokens), (nats_r, _) = (losses(tmp_path, models[role]) for role in ("teacher", "reference"))
    ratio = {}
    for name in ("odd", "even"):
        mine = [i for i, row in enumerate(ROWS) if row["domain"] == name]
        mean_t, mean_r = (sum(n[i] for i in mine) / sum(tokens[i] for i in mine) for n in (nats_t, nats_r))
        ratio[name] = math.exp(mean_r) / math.exp(mean_t)
    total = sum(math.exp(value) for value in ratio.values())
    share = {name: 0.5 * math.exp(value) / total + 0.25 for name, value in ratio.items()}
    choose(tmp_path, ROWS, by="ddk", **models)
    out = read(tmp_path / "out.jsonl")
    for name, count in (("odd", 28), ("even", 21)):
        weights = [row["weight"] for row in out if row["domain"] == name]
        assert weights == pytest.approx([share[name] * 49 / count] * count, rel=1e-4)
    assert sum(row["weight"] for row in out) == pytest.approx(49)
    done = choose(tmp_path, ROWS, by="ddk", keep=100, **models)
    drawn = Counter(row["domain"] for row in read(tmp_path / "out.jsonl"))
    assert drawn["odd"] == pytest.approx(100 * share["odd"], abs=1)
    assert done.choice.kept == choose(tmp_path, ROWS, by="ddk", keep=100, **models).choice.kept
    with pytest.raises(UserError, match="holds one domain only"):
        choose(tmp_path, [{**row, "domain": "x"} for row in ROWS], by="ddk", **models)
    with pytest.raises(UserError, match=r"in\.jsonl:1 has no column 'topic', its domain"):
        choose(tmp_path, ROWS, by="ddk", domain="topic", **models)
    with pytest.raises(UserError, match="has a column 'weight' already"):
        choose(tmp_path, [{**row, "weight": 1} for row in ROWS], by="ddk", **models)


def test_a_probe_of_each_domain_scores_only_so_many_rows(models: dict[str, str], tmp_path: Path):
    seen: list[tuple[str, int]] = []
    data = write(tmp_path / "in.jsonl", ROWS)
    config = checked_options(SelectConfig, {"by": "ddk", "probe": 5})
    select(
        open_inputs(data), config, tmp_path / "out.jsonl", **models, progress=lambda what, _, n: seen.append((what, n))
    )
    assert seen == [("teacher", 10), ("reference", 10)]


def test_diversity_within_each_prompt(tmp_path: Path):
    texts = {"1": ["a b c d", "a b c e", "x y z w"], "2": ["one"], "3": ["p", "p", "q r"]}
    rows = [{"prompt": p, "answer": "0", "response": t, "correct": True} for p, all_of in texts.items() for t in all_of]
    assert choose(tmp_path, rows, by="diversity", per_prompt=2).choice.kept == [0, 2, 3, 4, 6]
    assert len(choose(tmp_path, rows, by="diversity", keep=3).choice.kept) == 3


def teacher_of(models: dict[str, str], folder: Path) -> LoadedModel:
    section = open_inputs(folder / "in.jsonl").model_section(models["teacher"])
    return load_model(section, "cpu", trainable=False, seed=0)


def test_coverage_keeps_prompts_that_the_teacher_answers_differently(models: dict[str, str], tmp_path: Path):
    """Against a plain forward of every prompt; of a prompt and its copy, which rounding tells apart, one is kept."""
    rows = [{**row, "answer": "0"} for row in ROWS[:9]] * 2
    found = choose(tmp_path, rows, by="coverage", keep=5, teacher=models["teacher"], scores=True)
    loaded = teacher_of(models, tmp_path)
    with torch.no_grad():
        p = [
            loaded.model(torch.tensor([encode_prompt(loaded, row["prompt"])])).logits[0, -1, : loaded.vocab_size]
            for row in rows
        ]
    p_NV = torch.stack(p).double().softmax(-1)
    apart = torch.cdist(p_NV, p_NV)
    chosen = [int(apart[0].argmax())]
    while len(chosen) < 5:
        chosen.append(int(apart[chosen].amin(0).argmax()))
    kept = found.choice.kept
    assert {i % 9 for i in kept} == {i % 9 for i in chosen}
    assert len({i % 9 for i in chosen}) == 5
    nearest = [min(float(apart[i, j]) for j in kept if j != i) for i in kept]
    assert [row["distance"] for row in read(tmp_path / "out.jsonl")] == pytest.approx(nearest, rel=1e-4)


def test_coverage_takes_the_likeliest_tokens_and_the_rest_as_one(models: dict[str, str], tmp_path: Path):
    rows, _ = load_rows(open_inputs(write(tmp_path / "in.jsonl", ROWS)).task)
    loaded = teacher_of(models, tmp_path)
    seen: list[tuple[int, int]] = []
    places, whole = first_token_probabilities(loaded, rows, progress=lambda done, total: seen.append((done, total)))
    _, few = first_token_probabilities(loaded, rows, outcomes=3, budget=8)
    assert places == list(range(49))
    assert whole.sum(-1) == pytest.approx(1.0)
    assert few[:, :3] == pytest.approx(whole[:, :3], abs=1e-6)
    assert few[:, 3] == pytest.approx(whole[:, 3:].sum(-1), abs=1e-6)
    assert (whole[:, :3].mean(0) >= whole[:, 3:-1].mean(0).max()).all()
    assert seen[-1] == (98, 98)


def test_ngram_draws_rows_like_the_target(tmp_path: Path):
    rows = [{"prompt": f"{'cat sat' if i % 2 else 'sum of'} {i}", "answer": "0", "solution": "x"} for i in range(40)]
    target = write(tmp_path / "t.jsonl", [{"prompt": "the cat sat", "answer": "0", "solution": "x"}] * 20)
    kept = choose(tmp_path, rows, by="ngram", target=str(target), keep=10).choice.kept
    assert sum(i % 2 for i in kept) >= 9
    assert choose(tmp_path, rows, by="ngram", target=str(target), keep=10).choice.kept == kept
    other = [choose(tmp_path, rows, by="ngram", target=str(target), keep=10, seed=s).choice.kept for s in range(1, 4)]
    assert any(found != kept for found in other)


READ: dict[str, Callable[[Path], list[dict]]] = {
    "out.jsonl": read,
    "out.json": lambda path: json.loads(path.read_text()),
    "out.csv": lambda path: list(csv.DictReader(path.open())),
    "out.parquet": lambda path: pyarrow.parquet.read_table(path).to_pylist(),
}


@pytest.mark.parametrize("name", READ)
def test_every_format_is_written_and_read_back_by_a_task(name: str, tmp_path: Path):
    rows = [{**row, "tokens": i} for i, row in enumerate(ROWS)]
    choose(tmp_path, rows, name, by="length", high=9)
    shown = [{k: str(v) for k, v in row.items()} for row in READ[name](tmp_path / name)]
    assert shown == [{k: str(v) for k, v in row.items()} for row in rows[:10]]
    stream = build_task(TaskConfig(path=str(tmp_path / name)), 0).problems("train")
    assert {p.prompt for p in take(stream, 100)} == {row["prompt"] for row in rows[:10]}
    assert not list(tmp_path.glob("*.part"))


def test_rows_that_are_held_out_stay_and_are_not_scored(tmp_path: Path):
    rows = [{**row, "tokens": i} for i, row in enumerate(ROWS)]
    holdout = {"holdout": {"development": 0.2, "test": 0.2}}
    done = choose(tmp_path, rows, by="length", high=20, task=holdout)
    config = TaskConfig.model_validate({"path": str(tmp_path / "in.jsonl"), **holdout})
    before = build_task(config, 0)
    after = build_task(config.model_copy(update={"path": str(tmp_path / "out.jsonl")}), 0)
    for split in ("development", "test"):
        assert {p.prompt for p in take(after.problems(split), 99)} == {
            p.prompt for p in take(before.problems(split), 99)
        }
    kept = {p.prompt for p in take(after.problems("train"), 99)}
    assert kept == {p.prompt for p in take(before.problems("train"), 99) if p.meta["tokens"] <= 20}
    assert done.rows + done.held == 49


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "diff", "keep": 0.5}, "--by: Input should be 'difference'"),
        ({"by": "difference"}, "--by difference needs --keep"),
        ({"by": "difference", "keep": 0.5, "low": 1.0}, "--low has no effect on --by difference"),
        ({"by": "length", "keep": 0.5, "low": 1.0}, "are two ways; choose one"),
        ({"by": "length", "low": 3.0, "high": 1.0}, "--low 3 is above --high 1"),
        ({"by": "length", "high": 1.0, "reverse": True}, "--reverse turns --keep round"),
        ({"by": "length", "keep": 1.5}, "--keep is a share such as 0.5 or a number"),
        ({"by": "length", "keep": 0}, "--keep is a share such as 0.5 or a number"),
        ({"by": "ngram", "keep": 3}, "--by ngram needs --target"),
        ({"by": "difference", "keep": 3}, "asks a (teacher|reference) model and none is named"),
        ({"by": "diversity", "keep": 50}, "--keep 50 asks for more than the 49 rows"),
        ({"by": "diversity", "keep": 5, "teacher": "x"}, "--teacher has no effect on --by diversity"),
        ({"by": "length", "keep": 5, "teacher": "/gone"}, "there is no such folder"),
        ({"by": "ngram", "keep": 5, "target": "gone.jsonl"}, "gone.jsonl does not exist"),
    ],
)
def test_options_that_cannot_work_are_sentences(options: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        choose(tmp_path, ROWS, **options)


def test_data_and_outputs_that_cannot_work_are_sentences(world: Path, tmp_path: Path):
    def check(said: str, rows: Any, name: str = "out.jsonl", **options: Any) -> None:
        with pytest.raises(UserError, match=said):
            choose(tmp_path, rows, name, **({"by": "diversity", "keep": 2} | options))

    check(r"in\.jsonl:1: the column 'prompt' \(prompt\) is missing", [{"question": "a", "answer": "1"}])
    check("has no training rows", [])
    check(r"in\.jsonl:1 has no response to score", [{"prompt": "a", "answer": "1"}])
    check("ends in '.txt'; known endings", ROWS, "out.txt")
    check("there is no folder", ROWS, "gone/out.jsonl")
    check("holds lists, which CSV cannot", [{**row, "tags": ["x"]} for row in ROWS], "out.csv")
    check("do not fit into Parquet columns", [{**r, "odd": i if i else "a"} for i, r in enumerate(ROWS)], "out.parquet",
          keep=49)  # fmt: skip
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(UserError, match="exists already"):
        select(open_inputs(world / "data.jsonl"), SelectConfig(by="diversity", keep=2), tmp_path / "there.jsonl")
    generated = tmp_path / "generated.yaml"
    generated.write_text(json.dumps({"task": {"name": "reasoning_gym", "dataset": "chain_sum"}}))
    with pytest.raises(UserError, match="has no rows to select from; write some with `kdrl generate`"):
        select(open_inputs(generated), SelectConfig(by="diversity", keep=2), tmp_path / "out.jsonl")


def test_what_the_reference_cannot_read_is_said_before_the_teacher_works(models: dict[str, str], tmp_path: Path):
    seen: list[str] = []
    config = checked_options(SelectConfig, {"by": "difference", "keep": 0.5})
    data = write(tmp_path / "in.jsonl", [{"prompt": "1", "answer": "1", "solution": "Ä"}])
    with pytest.raises(UserError, match=r"in\.jsonl:1: the tokenizer cannot write 'Ä'"):
        select(open_inputs(data), config, tmp_path / "o.jsonl", **models, progress=lambda what, *_: seen.append(what))
    assert not seen
    assert not (tmp_path / "o.jsonl").exists()


def test_shares_and_numbers():
    assert [parse_keep(text) for text in ("0.5", "1000", "1", "1.0", None)] == [0.5, 1000, 1, 1.0, None]
    assert [kept_count(keep, 49) for keep in (0.5, 0.001, 1, 1.0)] == [24, 1, 1, 49]
    with pytest.raises(UserError, match="not 'half'"):
        parse_keep("half")


def test_the_command_prints_tables_and_writes_numbers(
    models: dict[str, str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    recipe = tmp_path / "mine.yaml"
    sections = {"student": {"model": models["reference"]}, "teacher": {"model": models["teacher"]}}
    raw = raw_recipe(world, "opd", **sections)
    del raw["student"]["tokenizer"]
    raw |= {"student": {"model": models["teacher"]}, "teacher": {"model": models["teacher"]}}
    recipe.write_text(json.dumps(raw))
    out, found = tmp_path / "out.jsonl", tmp_path / "found.json"
    arguments = [
        "select",
        str(recipe),
        "--by",
        "perplexity",
        "--keep",
        "0.5",
        "--output",
        str(out),
        "--json",
        str(found),
    ]
    monkeypatch.setattr(sys, "argv", ["kdrl", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capfd.readouterr().out
    assert "perplexity of the teacher, per token" in said
    assert "that task.holdout keeps from training" in said
    numbers_found = json.loads(found.read_text())
    assert numbers_found["kept"] == round(numbers_found["rows"] / 2)
    assert len(read(out)) == numbers_found["kept"] + numbers_found["held_out"]


def test_weights_are_met_in_proportion_and_by_index(tmp_path: Path):
    rows = [{**row, "w": [0.0, 0.5, 1.0, 2.5][i % 4]} for i, row in enumerate(ROWS[:40])]
    config = {"path": str(write(tmp_path / "w.jsonl", rows)), "columns": {"weight": "w"}}
    stream = build_task(TaskConfig.model_validate(config), 7).problems("train")
    assert isinstance(stream, WeightedStream)
    assert stream.size == 40
    epochs = [Counter(stream[e * 40 + i].prompt for i in range(40)) for e in range(60)]
    for row in rows:
        each = [epoch[row["prompt"]] for epoch in epochs]
        assert all(math.floor(row["w"]) <= count <= math.ceil(row["w"]) for count in each)
        assert sum(each) / 60 == pytest.approx(row["w"], abs=4 * 0.5 / math.sqrt(60))
    again = build_task(TaskConfig.model_validate(config), 7).problems("train")
    assert [again[i].prompt for i in (95, 3, 41)] == [stream[i].prompt for i in (95, 3, 41)]
    assert [stream[i].prompt for i in range(40)] != [stream[40 + i].prompt for i in range(40)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "the weight is 'x'; it must be a number"),
        (-1, "the weight is -1"),
        (0, "weights of all training problems"),
    ],
)
def test_weights_that_are_none_are_sentences(value: Any, said: str, tmp_path: Path):
    path = write(tmp_path / "w.jsonl", [{**row, "w": value} for row in ROWS])
    with pytest.raises(UserError, match=said):
        build_task(TaskConfig(path=str(path), columns={"weight": "w"}), 0).problems("train")
