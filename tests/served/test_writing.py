"""A served teacher that writes: traces by `kdrl generate`, and answers to held-out problems."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_doctor import good
from tiny import raw_recipe, run

from kdrl.data.generate import GenerateConfig, generate
from kdrl.data.inputs import open_inputs
from kdrl.doctor import Effort, examine
from kdrl.errors import UserError
from kdrl.evaluation import EvaluationResult
from kdrl.models import LoadedModel, ModelConfig, encode_prompt, load_model
from kdrl.recipe import load_recipe
from kdrl.sources.served import ServedEngine
from kdrl.teachers.client import Client
from kdrl.teachers.served import ServedTeacher
from kdrl.teachers.served_config import ServedConfig
from served.server import Manners, serving

APIS = ["tokens", "completions", "chat"]


@pytest.fixture(scope="module")
def saved(world: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(world / "teacher")), "cpu", trainable=False, seed=0)


def recipe(world: Path, url: str | None, api: str = "tokens", **change: Any) -> dict[str, Any]:
    raw = raw_recipe(world, change.pop("method", "kdrl"), teacher={"model": str(world / "teacher")}, **change)
    if url is not None:
        raw["teacher"]["served"] = {"urls": [url], "backoff_s": 0.02, "api": api}
    return raw


def write(folder: Path, raw: dict[str, Any], name: str, said: list[str] | None = None, **options: Any) -> list[Any]:
    file = folder / "mine.json.yaml"
    file.write_text(json.dumps(raw))
    model, problems = options.pop("model", None), options.pop("problems", 9)
    say = (lambda text: None) if said is None else said.append
    config = GenerateConfig(problems=problems, **options)
    generate(open_inputs(file), config, folder / name, model=model, say=say)
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("api", APIS)
def test_its_greedy_traces_are_those_of_the_model_loaded_here(
    world: Path, saved: LoadedModel, tmp_path: Path, api: str
):
    source = {} if api == "tokens" else {"method": "sft", "source": "teacher"}
    with serving(saved, Manners(prompt_logprobs=api == "tokens", detokenize=api == "tokens")) as server:
        served = write(tmp_path, recipe(world, server.url, api, **source), "served.jsonl", temperature=0.0)
    local = write(tmp_path, recipe(world, None), "local.jsonl", temperature=0.0)
    whole = {"id", "prompt", "answer", "response", "reward", "correct", "model"}
    for mine, theirs in zip(local, served, strict=True):
        assert {key: mine[key] for key in whole} == {key: theirs[key] for key in whole}
        if api == "tokens":
            assert mine == theirs


def test_a_stopped_job_goes_on_at_another_server_to_the_same_bytes(world: Path, saved: LoadedModel, tmp_path: Path):
    with serving(saved) as server:
        write(tmp_path, recipe(world, server.url), "whole.jsonl", samples=2)
        write(tmp_path, recipe(world, server.url), "parts.jsonl", samples=2, problems=5)
    with serving(saved) as another:
        raw = recipe(world, another.url)
        raw["teacher"]["served"] |= {"concurrency": 3, "timeout_s": 30}
        write(tmp_path, raw, "parts.jsonl", samples=2)
        asked = [body["seed"] for body in another.asked]
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "parts.jsonl").read_bytes()
    assert len(asked) == 4


def test_a_prompt_s_seed_is_its_own_whatever_else_is_asked(saved: LoadedModel):
    one, two = (encode_prompt(saved, text) for text in ("1+2=", "2+2="))
    with serving(saved) as server:
        engine = served_engine(server.url, saved)
        engine.generate([one, two, one], samples=2, max_new_tokens=4, seed=7)
        engine.generate([two], samples=2, max_new_tokens=4, seed=7)
        engine.generate([two], samples=2, max_new_tokens=4, seed=8)
        seeds = [(body["prompt"], body["seed"]) for body in server.asked]
    together, alone, other = seeds[:3], seeds[3], seeds[4]
    assert len({seed for _, seed in together}) == 3
    assert alone in together
    assert other not in together


def served_engine(url: str, reader: LoadedModel) -> ServedEngine:
    return ServedEngine(ServedTeacher(Client(ServedConfig(urls=(url,))), "toy", reader.vocab_size), reader)


def test_a_written_padding_row_is_refused(saved: LoadedModel):
    reader = replace(saved, vocab_size=5)
    with serving(saved) as server, pytest.raises(UserError, match=r"wrote token \d+, a padding row .* tokenizer has 5"):
        served_engine(server.url, reader).generate([[3, 4]], samples=8, max_new_tokens=8, seed=0)


@pytest.mark.parametrize(
    ("manners", "options", "words"),
    [
        (Manners(spelling={7: "9"}), {}, r"spells tokens 0 to .* \(token 7: '9', here '5'\)"),
        (Manners(context=8), {}, "reads at most 8 tokens"),
        (Manners(name="other"), {"served": "toy"}, r"serves 'other' and not 'toy'"),
    ],
    ids=["tokenizer", "context", "model"],
)
def test_a_server_that_will_not_do_is_refused_before_it_writes(
    world: Path, saved: LoadedModel, tmp_path: Path, manners: Manners, options: dict[str, str], words: str
):
    with serving(saved, manners) as server:
        raw = recipe(world, server.url)
        raw["teacher"]["served"]["model"] = options.get("served")
        with pytest.raises(UserError, match=words):
            write(tmp_path, raw, "out.jsonl")
        assert not any("n" in body for body in server.asked)


def test_a_first_thought_needs_a_writer_that_goes_on(world: Path, saved: LoadedModel, tmp_path: Path):
    thought = f"{world / 'teacher'}/2"
    with serving(saved) as server:
        rows = write(tmp_path, recipe(world, server.url), "led.jsonl", first_thought=thought, temperature=0.0)
        local = write(tmp_path, recipe(world, None), "local.jsonl", first_thought=thought, temperature=0.0)
        assert rows == local
        chat = recipe(world, server.url, "chat", method="sft", source="teacher")
        with pytest.raises(UserError, match="--first-thought needs a writer that goes on"):
            write(tmp_path, chat, "chat.jsonl", first_thought=thought)


def test_a_model_that_is_named_is_loaded_here(world: Path, tmp_path: Path):
    raw = recipe(world, "http://127.0.0.1:9")
    assert write(tmp_path, raw, "here.jsonl", model=str(world / "teacher"))
    with pytest.raises(UserError, match="no teacher server answers"):
        write(tmp_path, raw, "there.jsonl")


def test_top_k_is_refused_of_a_text_api(world: Path):
    raw = recipe(world, "http://127.0.0.1:9", "completions", method="sft", source="teacher", rollout={"top_k": 5})
    with pytest.raises(UserError, match=r"rollout\.top_k is no option of teacher\.served\.api=completions"):
        load_recipe(raw)


@pytest.mark.parametrize("api", ["tokens", "chat"])
def test_it_is_measured_as_a_baseline_like_the_model_loaded_here(
    world: Path, saved: LoadedModel, tmp_path: Path, api: str
):
    change: dict[str, Any] = {"evaluate": {"final_problems": 6, "baselines": True}, "steps": 1}
    change |= {} if api == "tokens" else {"method": "sft", "source": "gold"}
    with serving(saved, Manners(detokenize=False)) as server:
        run(recipe(world, server.url, api, **change), tmp_path / "served")
    run(recipe(world, None, **change), tmp_path / "local")
    served, local = (
        EvaluationResult.from_dict(json.loads((tmp_path / name / "evaluation.json").read_text())["teacher"])
        for name in ("served", "local")
    )
    assert served.model == local.model == str(world / "teacher")
    for mine, theirs in zip(local.records, served.records, strict=True):
        assert mine.id == theirs.id
        assert [r.text for r in mine.responses] == [r.text for r in theirs.responses]
        assert [r.correct for r in mine.responses] == [r.correct for r in theirs.responses]


@pytest.mark.parametrize("limit", [20, 3])
def test_the_doctor_measures_it(world: Path, saved: LoadedModel, limit: int):
    with serving(saved, Manners(max_logprobs=limit)) as server:
        raw = load_recipe(good(world, teacher={"served": {"urls": [server.url]}}))
        found = {f.what: f for f in examine(raw, effort=Effort(problems=4, prompts=2, group=2))}
    assert "wrong" not in {f.verdict for f in found.values()}
    assert "of 4 development problems right" in found["teacher's accuracy"].text
    assert (found["parity"].verdict, found["parity"].text[:21]) == ("ok", "served against local:")
    assert "mean log p - log q" in found["teacher's R"].text
    assert ("teacher's overlap" in found) == (limit == 20)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_no_way_to_a_server(
    world: Path, saved: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str
):
    for each in list(os.environ):
        if each.lower().endswith("_proxy"):
            monkeypatch.delenv(each)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(saved) as server:
        assert Client(ServedConfig(urls=(server.url,))).ask_each("/v1/models")
    with pytest.raises(UserError, match=f"proxy that {name.upper()} names is not used"):
        Client(ServedConfig(urls=("http://127.0.0.1:9",))).ask_each("/v1/models")
