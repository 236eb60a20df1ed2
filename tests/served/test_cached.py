"""A served teacher behind a cache: written through, read back with no server, and filled by `kdrl cache-teacher`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tiny import raw_recipe, rows_of, run

from kdrl.errors import RunError, UserError
from kdrl.models import LoadedModel, ModelConfig, load_model
from kdrl.recipe import load_recipe
from kdrl.run import resume
from kdrl.teachers.cache_command import cache_teacher
from kdrl.teachers.cache_config import Stored
from kdrl.teachers.cache_store import CacheStore
from served.server import Manners, serving

K = 8
# 8-bit log-probs of 8 of 45 tokens; docs/teachers.md states the bound of one.
CLOSE = 0.02


@pytest.fixture(scope="module")
def saved(world: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(world / "teacher")), "cpu", trainable=False, seed=0)


def recipe(world: Path, **teacher: Any) -> dict[str, Any]:
    distill = {"divergence": "forward_kl", "support": {"topk": K}, "on": ["gold"]}
    raw = raw_recipe(world, None, source="gold", objective=[{"distill": distill}], steps=3, optimizer={"lr": 1e-2})
    raw["rollout"] = {"prompts": 4, "group": 1, "max_new_tokens": 20}
    return raw | {"teacher": {"model": str(world / "teacher")} | teacher}


def served(url: str, **change: Any) -> dict[str, Any]:
    return {"urls": [url], "backoff_s": 0.02, "wait_s": 0.1, "batch": 2} | change


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder)]


def test_local_served_and_cached_agree(world: Path, saved: LoadedModel, tmp_path: Path):
    """Written through by a run, and by the command; both folders are read with the server gone."""
    cache = {"path": str(tmp_path / "cache"), "write": True, "kind": "topk", "k": K}
    with serving(saved) as server:
        run(recipe(world, served=served(server.url)), tmp_path / "served")
        run(recipe(world, served=served(server.url), cache=cache), tmp_path / "written")
        asked = len(server.asked)
        run(recipe(world, served=served(server.url, parity=0), cache=cache), tmp_path / "again")
        checks = 1  # the request that tries the top-k limit
        assert len(server.asked) == asked + checks, "what is stored is asked of no server"
        command = load_recipe(recipe(world, served=served(server.url)))
        cache_teacher(command, tmp_path / "command", Stored(kind="topk", k=K), say=lambda text: None)
    run(recipe(world), tmp_path / "local")
    run(recipe(world, cache=str(tmp_path / "cache")), tmp_path / "read")
    run(recipe(world, cache=str(tmp_path / "command")), tmp_path / "read command")
    local = losses(tmp_path / "local")
    assert losses(tmp_path / "served") == pytest.approx(local, rel=1e-4)
    assert losses(tmp_path / "written") == losses(tmp_path / "again") == losses(tmp_path / "read")
    assert losses(tmp_path / "read") == pytest.approx(local, rel=CLOSE)
    assert losses(tmp_path / "read command") == pytest.approx(losses(tmp_path / "read"), rel=1e-6)


def test_a_server_that_dies_leaves_what_is_stored_and_the_run_is_resumed_to_the_same_bytes(
    world: Path, saved: LoadedModel, tmp_path: Path
):
    def raw(name: str, url: str) -> dict[str, Any]:
        cache = {"path": str(tmp_path / f"{name} cache"), "write": True, "kind": "topk", "k": K}
        return recipe(world, served=served(url, parity=0), cache=cache) | {"checkpoint": {"every": 1}}

    with serving(saved, Manners(faults=dict.fromkeys(range(5, 1000), 503))) as server:
        with pytest.raises(RunError, match="no teacher server has answered"):
            run(raw("stopped", server.url), tmp_path / "stopped")
        kept = len(CacheStore.read(tmp_path / "stopped cache").places)
        server.manners.faults = {}
        resume(tmp_path / "stopped", say=lambda text: None)
        run(raw("whole", server.url), tmp_path / "whole")
    assert kept == 8, "two whole steps"
    for folder, pattern in (("{}/final", "*"), ("{} cache", "shard*")):
        files = [
            {p.name: p.read_bytes() for p in (tmp_path / folder.format(name)).glob(pattern)}
            for name in ("stopped", "whole")
        ]
        assert files[0] == files[1]
        assert files[0]


@pytest.mark.parametrize("kind", ["draws", "hidden"])
def test_kinds_that_a_server_cannot_give_are_refused(world: Path, saved: LoadedModel, tmp_path: Path, kind: Any):
    words = rf"kind {kind} cannot be stored of a teacher that gives .*; store topk with k up to"
    with serving(saved) as server:
        raw = recipe(world, served=served(server.url))
        with pytest.raises(UserError, match=words):
            cache_teacher(load_recipe(raw), tmp_path / "cache", Stored(kind=kind), say=lambda text: None)
        assert not (tmp_path / "cache").exists()
        raw = copy.deepcopy(raw)
        raw["teacher"]["cache"] = {"path": str(tmp_path / "cache"), "write": True, "kind": kind}
        with pytest.raises(UserError, match=words):
            run(raw, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_than_the_server_s_limit_is_refused_with_its_flag(world: Path, saved: LoadedModel, tmp_path: Path):
    with serving(saved, Manners(max_logprobs=K)) as server:
        raw = recipe(world, served=served(server.url))
        with pytest.raises(UserError, match=r"12 likeliest tokens.*--max-logprobs 12"):
            cache_teacher(load_recipe(raw), tmp_path / "cache", Stored(kind="topk", k=12), say=lambda text: None)
