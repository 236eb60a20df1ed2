"""A teacher that is moved away between steps scores as one that stays; what a CPU cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import made_responses, raw_recipe, section, toy

from kdrl.batch import Rollouts
from kdrl.errors import UserError
from kdrl.models.compressed import compression
from kdrl.models.config import ModelConfig, TeacherModelConfig
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe
from kdrl.run import train
from kdrl.teachers import LocalTeacher, TeacherConfig
from kdrl.teachers.offloaded import OffloadedTeacher, check_offload


class Gone(OffloadedTeacher):
    """Leaves nothing behind: its parameters hold NaN while it is away."""

    moves = 0

    def _move(self, device: torch.device) -> None:
        self.moves += 1
        if not hasattr(self, "stored"):
            self.stored = {name: p.data.clone() for name, p in self.loaded.model.named_parameters()}
        for name, p in self.loaded.model.named_parameters():
            p.data = self.stored[name].clone() if self.moves % 2 else torch.full_like(p, float("nan"))


def test_evidence_outlives_the_weights_that_made_it():
    rollouts = Rollouts.of(made_responses())
    teacher, index = toy(4), torch.arange(5)
    like = torch.empty(5, 45, dtype=torch.float64)
    want = LocalTeacher(toy(4), 60).score(rollouts, rollouts.trained_N, "distribution", 1.0)
    away = Gone(teacher, 60)
    for _ in range(2):
        found = away.score(rollouts, rollouts.trained_N, "distribution", 1.0)
        assert all(bool(p.isnan().all()) for p in teacher.model.parameters())
        torch.testing.assert_close(found.logp_N, want.logp_N)
        torch.testing.assert_close(found.logp(index, like), want.logp(index, like))
    assert away.moves == 4


def recipe_with(world: Path, **teacher: Any) -> dict[str, Any]:
    raw = raw_recipe(world, "opd", evaluate={"baselines": False})
    return raw | {"teacher": {"model": str(world / "teacher")} | teacher}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"offload": True}, r"teacher\.offload moves weights between a GPU and main memory, and the device is cpu"),
        ({"load": "int8"}, "load=int8 keeps weights for CUDA kernels, and the device is cpu; leave it out"),
    ],
)
def test_a_cpu_refuses_in_a_sentence(world: Path, tmp_path: Path, settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        train(recipe_with(world, **settings), output=tmp_path / "run", say=lambda text: None)


def test_what_cannot_be_moved_or_compressed_is_refused(world: Path):
    with pytest.raises(UserError, match=r"cannot move weights that teacher\.load has compressed"):
        check_offload("cuda", True)
    with pytest.raises(ValueError, match="`load` is for a frozen model"):
        ModelConfig(model="x", load="int8")
    with pytest.raises(ValueError, match="not a new one nor GGUF"):
        TeacherConfig.model_validate(section() | {"load": "int4"})
    with pytest.raises(UserError, match="only scores, and this one writes"):
        load_recipe(recipe_with(world, offload=True) | {"source": "teacher", "method": "seqkd"})


def test_the_plan_counts_what_is_saved(world: Path):
    sizes = {
        name: {item.name: item.bytes for item in memory_plan(load_recipe(recipe_with(world, **settings))).items}
        for name, settings in {"plain": {}, "int8": {"load": "int8"}, "away": {"offload": True}}.items()
    }
    weights = sizes["plain"]["teacher weights"]
    assert -weights < sizes["int8"]["teacher in int8"] < 0
    assert sizes["away"]["teacher offloaded"] == -weights


def test_what_the_loader_is_told():
    assert compression(TeacherModelConfig(model="x"), "cuda") == {}
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-kernels")
    told = compression(TeacherModelConfig(model="x", load="int4", dtype="bfloat16"), "cuda:0")
    assert told["device_map"] == {"": "cuda:0"}
    assert told["quantization_config"].load_in_4bit
