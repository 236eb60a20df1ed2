"""What is found out about a served teacher before the first step, and what a recipe may not ask of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import raw_recipe, rows_of, run, toy

from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, load_model, save_final
from kdrl.recipe import load_recipe
from kdrl.run import train
from kdrl.teachers.served_config import ServedConfig
from served.server import Manners, serving


@pytest.fixture(scope="module")
def saved(world: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(world / "teacher")), "cpu", trainable=False, seed=0)


def recipe(world: Path, urls: list[str], served: dict[str, Any] | None = None, **change: Any) -> dict[str, Any]:
    settings = {"urls": urls, "backoff_s": 0.02, "wait_s": 1, "retries": 1} | (served or {})
    teacher = {"model": str(world / "teacher"), "served": settings}
    raw = raw_recipe(world, change.pop("method", "kdrl"), teacher=teacher, steps=1)
    return {**raw, **change} if "objective" in change else raw | change


def topk(k: int) -> dict[str, Any]:
    return {"objective": [{"distill": {"divergence": "forward_kl", "support": {"topk": k}}}]}


@pytest.mark.parametrize(
    ("manners", "served", "change", "words"),
    [
        (Manners(), {"model": "other"}, {}, r"serves 'toy' and not 'other'; mend teacher\.served\.model"),
        (Manners(max_logprobs=3), {}, topk(5), r"its 5 likeliest.*max allowed: 3.*--max-logprobs 5.*--top-k 5"),
        (Manners(), {"top_k": 4}, topk(5), r"reads more of the teacher than teacher gives.*topk: K.* with K up to 4"),
        (
            Manners(),
            {},
            {"objective": [{"distill": {"divergence": {"jsd": 0.3}}}]},
            "reads more of the teacher than teacher gives.*or a local teacher",
        ),
        (Manners(context=12), {}, {}, r"reads at most 12 tokens.*makes 1\d; start it with a longer --max-model-len"),
        (Manners(key="k"), {}, {}, r"refuses access \(status 401\); it wants a key"),
        (Manners(prompt_logprobs=False), {}, {}, r"gives no prompt_logprobs, so it cannot score.*source teacher"),
        (Manners(raw_logits=True), {}, {}, "numbers above 0 for log-probs: it runs with --logprobs-mode raw_logits"),
        (Manners(spelling={7: "9"}), {}, {}, r"spells tokens 0 to .* \(token 7: '9', here '5'\)"),
        (
            Manners(shift=-0.2),
            {},
            {},
            r"is not the model .*differ by 0\.2 nats on average.*is 0\.05",
        ),
        (
            Manners(),
            {},
            {"rollout": {"temperature": 0.7, "max_new_tokens": 6}},
            r"is 0\.7, and the teacher server",
        ),
    ],
    ids=str,
)
def test_a_server_that_will_not_do_is_refused_before_the_first_step(
    world: Path,
    saved: LoadedModel,
    tmp_path: Path,
    manners: Manners,
    served: dict[str, Any],
    change: dict[str, Any],
    words: str,
):
    with serving(saved, manners) as server, pytest.raises(UserError, match=words):
        run(recipe(world, [server.url], served, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "the folder is free for another try"


def test_another_model_of_the_same_name_is_found_by_parity(world: Path, tmp_path: Path):
    other = toy(11, sharp=8.0)
    other.model.float()
    with serving(other) as server:
        with pytest.raises(UserError, match=r"is not the model .* differ by .* nats on average"):
            run(recipe(world, [server.url]), tmp_path / "run")
        run(recipe(world, [server.url], {"parity": 0}), tmp_path / "unasked")


def test_a_teacher_of_another_tokenizer_is_refused_though_the_server_does_not_spell(
    world: Path, saved: LoadedModel, tmp_path: Path
):
    theirs = {"model": {"architecture": "qwen3", "hidden_size": 16, "layers": 1, "heads": 2}}
    other = load_model(
        ModelConfig.model_validate(theirs | {"tokenizer": {"characters": "0123456789+-=;# zyx"}}),
        "cpu",
        trainable=False,
        seed=0,
    )
    save_final(other, tmp_path / "other")
    with serving(saved, Manners(detokenize=False)) as server:
        raw = recipe(world, [server.url])
        raw["teacher"]["model"] = str(tmp_path / "other")
        with pytest.raises(UserError, match="another tokenizer than the student"):
            run(raw, tmp_path / "run")


def test_what_cannot_be_checked_is_noted(world: Path, saved: LoadedModel, tmp_path: Path):
    said: list[str] = []
    with serving(saved, Manners(detokenize=False)) as server:
        raw = recipe(world, [server.url, "http://127.0.0.1:9"])
        raw["teacher"]["model"] = str(tmp_path / "none")
        train(raw, output=tmp_path / "run", say=lambda text: said.append(str(text)))
    notes = "\n".join(line for line in said if line.startswith("note:"))
    assert "http://127.0.0.1:9 does not answer (Connection refused)" in notes
    assert "end tokens are not compared" in notes
    assert "the server's own tokenizer is not compared" in notes
    assert f"served and local log-probs are not compared: '{tmp_path / 'none'}' is no local folder" in notes


def test_parity_is_told(world: Path, saved: LoadedModel, tmp_path: Path):
    said: list[str] = []
    with serving(saved) as server:
        train(recipe(world, [server.url]), output=tmp_path / "run", say=lambda text: said.append(str(text)))
    assert any(line.startswith("note: served against local: log-probs of") for line in said)


def test_a_server_that_heeds_the_temperature_may_be_asked_at_it(world: Path, saved: LoadedModel, tmp_path: Path):
    rollout = {"rollout": {"temperature": 0.7, "prompts": 3, "group": 4, "max_new_tokens": 6}}
    with serving(saved, Manners(follows_temperature=True)) as server:
        run(recipe(world, [server.url], **rollout), tmp_path / "served")
    local = recipe(world, ["x"], **rollout)
    del local["teacher"]["served"]
    run(local, tmp_path / "local")
    one, other = (rows_of(tmp_path / name)[0] for name in ("local", "served"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)


def test_no_server_at_all_is_told_at_once(world: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no teacher server answers \(http://127.0.0.1:9: .*kdrl serve-teacher MODEL"):
        run(recipe(world, ["127.0.0.1:9"]), tmp_path / "run")


SCORED = {"filtered": {"source": "gold", "keep": {"score": "teacher_logp", "above": -2}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": None, "objective": [{"feature": {}}]}, "inside of the teacher, which no server"),
        ({"source": {"speculative": 3}, "method": "opd"}, "draws every token with the teacher's logits"),
        (
            {"source": SCORED, "method": "sft"},
            "local teacher",
        ),
        ({"teacher.served.api": "chat"}, "gives text alone"),
        ({"teacher.prepare": {"soft_prompt": {}}}, "`prepare` adapts a teacher in this process"),
    ],
    ids=str,
)
def test_what_a_served_teacher_cannot_do_is_refused_without_asking_it(world: Path, change: dict[str, Any], words: str):
    raw = recipe(world, ["127.0.0.1:9"])
    for key, value in change.items():
        *path, last = key.split(".")
        place = raw
        for part in path:
            place = place[part]
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    with pytest.raises(UserError, match=words):
        load_recipe(raw)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"urls": []}, "at least 1"),
        ({"urls": ["ftp://x"]}, "no server's address"),
        ({"urls": ["http://me:secret@x"]}, "more than an address"),
        ({"urls": ["x:1", "http://x:1/v1/"]}, "stands twice"),
        ({"urls": ["x:1"], "api": "chat", "top_k": 3}, "belongs to scoring"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        ServedConfig.model_validate(given)


def test_addresses_are_read_as_people_write_them():
    urls = ["localhost:8000", "http://host:1/v1", "https://api.host/teacher/v1/"]
    assert ServedConfig.model_validate({"urls": urls}).urls == (
        "http://localhost:8000",
        "http://host:1",
        "https://api.host/teacher",
    )


def test_a_served_teacher_stands_in_the_run_s_recipe(world: Path, saved: LoadedModel, tmp_path: Path):
    with serving(saved) as server:
        run(recipe(world, [server.url], {"top_k": 9}), tmp_path / "run")
    stored = load_recipe(tmp_path / "run")
    assert stored.teacher is not None
    assert stored.teacher.served is not None
    assert stored.teacher.served.top_k == 9
