"""Replicas of a served teacher: checked before their use: at the start, when they come late, when they are back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_doctor import good
from tiny import raw_recipe, rows_of, run, toy

from kdrl.doctor import Effort, examine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, load_model
from kdrl.recipe import load_recipe
from kdrl.run import train
from served.server import Manners, ToyServer, serving


@pytest.fixture(scope="module")
def saved(world: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(world / "teacher")), "cpu", trainable=False, seed=0)


@pytest.fixture(scope="module")
def other() -> LoadedModel:
    """The same tokenizer, other weights."""
    found = toy(11, sharp=8.0)
    found.model.float()
    return found


TOPK = {"objective": [{"distill": {"divergence": "forward_kl", "support": {"topk": 5}}}], "method": None}


@pytest.fixture(scope="module")
def undisturbed(world: Path, saved: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses with one server that does nothing odd."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with serving(saved) as server:
        run(recipe(world, server.url), folder)
    return losses(folder)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder)]


def recipe(world: Path, *urls: str, weights: bool = True, **change: Any) -> dict[str, Any]:
    settings = {"urls": list(urls), "backoff_s": 0.01, "wait_s": 5, "retries": 1, "batch": 1, "concurrency": 2}
    raw = raw_recipe(world, change.pop("method", "kdrl"), steps=3, checkpoint={"every": 0}, **change)
    return raw | {"teacher": {"model": str(world / ("teacher" if weights else "none")), "served": settings}}


@pytest.mark.parametrize(
    ("manners", "change", "words"),
    [
        (Manners(shift=-0.2), {}, "the served teacher URL is not the model .* differ by 0.2 nats"),
        (Manners(max_logprobs=2), TOPK, r"its 5 likeliest .*URL refuses .*max allowed: 2\. Start it with --max-lo"),
        (Manners(spelling={7: "9"}), {}, r"the served teacher URL spells tokens .* \(token 7: '9', here '5'\)"),
        (Manners(context=12), {}, "the teacher server URL reads at most 12 tokens"),
        (Manners(prompt_logprobs=False), {}, "URL: the teacher server gives no prompt_logprobs"),
        (Manners(name="else"), {}, "the replicas serve different models .*URL: else"),
        (
            Manners(),
            {"rollout": {"temperature": 0.7, "max_new_tokens": 6}},
            "the teacher server URL gives log-probs at 1",
        ),
    ],
    ids=["weights", "top-k", "tokenizer", "context", "no scores", "name", "temperature"],
)
def test_the_second_replica_is_checked_like_the_first(
    world: Path, saved: LoadedModel, tmp_path: Path, manners: Manners, change: dict[str, Any], words: str
):
    with serving(saved, Manners(follows_temperature=True)) as one, serving(saved, manners) as two:
        with pytest.raises(UserError, match=words.replace("URL", two.url)) as caught:
            run(recipe(world, one.url, two.url, **change), tmp_path / "run")
        assert one.url not in str(caught.value) or "different models" in words


@pytest.mark.parametrize("weights", [True, False])
def test_another_model_of_the_same_name_is_no_replica(
    world: Path, saved: LoadedModel, other: LoadedModel, tmp_path: Path, weights: bool
):
    with serving(saved) as one, serving(other) as two:
        unlike = f"the model '{world / 'teacher'}'" if weights else f"the model that {one.url} serves"
        with pytest.raises(UserError, match=f"the served teacher {two.url} is not {unlike}: log-probs of"):
            run(recipe(world, one.url, two.url, weights=weights), tmp_path / "run")


def test_all_that_are_wrong_are_named_at_once(world: Path, saved: LoadedModel, tmp_path: Path):
    wrong = Manners(shift=-0.2)
    with serving(saved, wrong) as one, serving(saved, wrong) as two, pytest.raises(UserError, match=one.url) as caught:
        run(recipe(world, one.url, two.url), tmp_path / "run")
    assert two.url in str(caught.value)


def test_parity_of_each_replica_is_told(world: Path, saved: LoadedModel, tmp_path: Path):
    said: list[str] = []
    with serving(saved) as one, serving(saved) as two:
        train(recipe(world, one.url, two.url), output=tmp_path / "run", say=lambda text: said.append(str(text)))
        for url in (one.url, two.url):
            assert sum(line.startswith(f"note: served against local at {url}: log-probs of") for line in said) == 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def after(server: ToyServer, requests: int, act: Callable[[], None]) -> Iterator[None]:
    """Act when a server is asked for the so manieth time; it then answers as before."""
    answer, lock, done = server.answer, threading.Lock(), [0]

    def counted(path: str, body: dict[str, Any]) -> Any:
        if path != "/detokenize":
            with lock:
                done[0] += 1
                if done[0] == requests:
                    act()
        return answer(path, body)

    server.answer = counted  # type: ignore[method-assign]
    yield
    assert done[0] >= requests, "else the test shows nothing"


BAD = {
    "weights": (Manners(), r"is not the model .* log-probs of .* differ"),
    "name": (Manners(name="else"), "serves 'else' and not 'toy'"),
    "limit": (Manners(max_logprobs=2), "likeliest tokens, which the server does not give"),
    "tokenizer": (Manners(spelling={7: "9"}), "spells tokens"),
    "context": (Manners(context=12), "reads at most 12 tokens"),
    "key": (Manners(key="k"), "it wants a key"),
}


@pytest.mark.parametrize("fault", [None, *BAD])
def test_a_replica_that_comes_late_is_checked_before_its_first_use(
    world: Path,
    saved: LoadedModel,
    other: LoadedModel,
    tmp_path: Path,
    undisturbed: list[float],
    fault: str | None,
    caplog: pytest.LogCaptureFixture,
):
    port, late = free_port(), []
    manners, words = (Manners(), "") if fault is None else BAD[fault]
    change = TOPK if fault == "limit" else {}
    with serving(saved) as one, ExitStack() as stack:

        def come() -> None:
            late.append(stack.enter_context(serving(other if fault == "weights" else saved, manners, port)))

        raw = recipe(world, one.url, f"http://127.0.0.1:{port}", weights=fault != "limit", **change)
        with after(one, 9, come):
            run(raw, tmp_path / "run")
    if fault != "limit":
        assert losses(tmp_path / "run") == undisturbed
    checks = 1 + 4
    told = [r.getMessage() for r in caplog.records if "left out for the rest" in r.getMessage()]
    if fault is None:
        assert len(late[0].asked) > checks
        assert not told
    else:
        assert len(late[0].asked) <= checks
        assert len(told) == 1
        assert late[0].url in told[0]
        assert words.partition(" .*")[0] in told[0]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_a_server_that_comes_back_is_checked_again(
    world: Path, saved: LoadedModel, other: LoadedModel, tmp_path: Path, right: bool, weights: bool
):
    """An only one: what is wrong ends the run."""
    port = free_port()
    with ExitStack() as stack:
        first = ToyServer(saved, Manners(), port)
        threading.Thread(target=first.serve_forever, args=(0.01,), daemon=True).start()
        lives: list[ToyServer] = []

        def change() -> None:
            def again() -> None:
                first.shutdown()
                first.server_close()
                lives.append(stack.enter_context(serving(saved if right else other, Manners(), port)))

            first.manners.faults = dict.fromkeys(range(1000), 503)
            threading.Thread(target=again).start()

        raw = recipe(world, f"http://127.0.0.1:{port}", weights=weights)
        with after(first, 9, change):
            if right:
                run(raw, tmp_path / "run")
                assert len(lives[0].asked) > 5
                return
            words = f"http://127.0.0.1:{port}: what answers there after it was away will not do: .* is not the model"
            with pytest.raises(UserError, match=rf"{words}.*kdrl train --resume"):
                run(raw, tmp_path / "run")
            assert len(lives[0].asked) <= 5


def test_a_model_that_is_gone_from_one_replica_sets_that_one_aside(
    world: Path, saved: LoadedModel, tmp_path: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture
):
    with serving(saved) as one, serving(saved) as two:

        def rename() -> None:
            two.manners.name = "else"

        with after(two, 8, rename):
            run(recipe(world, one.url, two.url), tmp_path / "run")
        told = [r.getMessage() for r in caplog.records]
        assert len([line for line in told if two.url in line and "does not exist" in line]) == 1
        assert losses(tmp_path / "run") == undisturbed
    with serving(saved) as only:

        def leave() -> None:
            only.manners.name = "else"

        with after(only, 8, leave), pytest.raises(UserError, match=rf"{only.url} refuses .*does not exist"):
            run(recipe(world, only.url), tmp_path / "ended")


def test_the_doctor_tells_a_wrong_temperature_once(world: Path, saved: LoadedModel):
    with serving(saved) as server:
        change = {"teacher": {"served": {"urls": [server.url]}}, "rollout": {"temperature": 0.7}}
        found = examine(load_recipe(good(world, **change)), effort=Effort(problems=4, prompts=2, group=2))
    assert [f.what for f in found if f.verdict == "wrong"] == ["served temperature"]
    texts = {f.what: f.text for f in found}
    assert texts["parity"] == "served and local log-probs are not compared: the temperatures differ"
    assert texts["temperature"] == "0.7: samples and policy are taken at it, a served teacher is not"


def test_an_address_alone_is_read_and_what_is_none_is_told(world: Path):
    raw = recipe(world, "x")
    raw["teacher"]["served"] = "http://127.0.0.1:9"
    teacher = load_recipe(raw).teacher
    assert teacher is not None
    assert teacher.served is not None
    assert teacher.served.urls == ("http://127.0.0.1:9",)
    raw["teacher"]["served"] = 9
    with pytest.raises(UserError, match=r"teacher\.served: write it as \{urls: \[http://HOST:8000\]\}.*, not 9"):
        load_recipe(raw)
    raw["teacher"] |= {"served": "x", "offload": True}
    with pytest.raises(UserError, match="remove it, or `served`"):
        load_recipe(raw)
