"""Optimizers: each steps as its plain form does, is resumed to the byte, and is refused where it cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same_run
from tiny import parts_of, raw_recipe, run
from torch import Tensor
from torch.nn import Parameter

from kdrl.errors import UserError
from kdrl.optimizers import MasterWeights, build_optimizer, state_bytes
from kdrl.pairing import check_numbers
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe
from kdrl.run import resume

OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
# Of the tiny model only this has matrices of 4,096 weights, which are what 8-bit moments are for.
WIDE = {"student": {"model": {"hidden_size": 64, "intermediate_size": 96}}}


def stepped(kind: Any, parameter: Parameter, gradients: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.1}], kind, **OPTIONS, **options)
    for gradient in gradients:
        optimizer.param_groups[0]["lr"] = 1e-3
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


def gradients(count: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(96, 64, generator=draw) for _ in range(count)]


def start(dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_adamw_is_fused_and_decays_matrices_only(world: Path, tmp_path: Path) -> None:
    with parts_of(raw_recipe(world, optimizer={"weight_decay": 0.1}), tmp_path / "r") as parts:
        groups = parts.optimizer.param_groups
        assert type(parts.optimizer) is torch.optim.AdamW
        assert all(group["fused"] for group in groups)
        assert {(p.ndim > 1, g["weight_decay"]) for g in groups for p in g["params"]} == {(True, 0.1), (False, 0.0)}


def test_master_weights_are_the_float32_run_rounded() -> None:
    """With gradients that bfloat16 holds, the copy takes the float32 optimizer's steps to the bit."""
    exact = [g.bfloat16().float() for g in gradients()]
    low = start(torch.bfloat16)
    full = Parameter(low.detach().float())
    optimizer = stepped("adamw", low, exact, master_weights=True)
    stepped("adamw", full, exact)
    assert torch.equal(optimizer.state[low]["master"], full)
    assert torch.equal(low, full.bfloat16())
    assert low.dtype == torch.bfloat16
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_master_weights_keep_what_bfloat16_rounds_away() -> None:
    """A weight of 1 with steps of 1e-3: bfloat16 alone never moves, and 20 steps of copies make 0.02."""
    moved = {}
    for master in (False, True):
        p = Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        optimizer = build_optimizer([{"params": [p], "weight_decay": 0.0}], "adamw", **OPTIONS, master_weights=master)
        for _ in range(20):
            optimizer.param_groups[0]["lr"] = 1e-3
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[master] = 1.0 - float(p.detach()[0, 0])
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(0.02, abs=2**-8)


def stop_at(run_dir: Path, at: int) -> None:
    """Take a run back to a checkpoint, as a kill right after it would."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"))[at:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def assert_resumed_equals_whole(raw: dict[str, Any], folder: Path) -> None:
    for name in ("whole", "stopped"):
        run(raw, folder / name)
    stop_at(folder / "stopped", 2)
    resume(folder / "stopped", say=lambda text: None)
    assert_same_run(folder / "whole", folder / "stopped")


EVERY = {"steps": 4, "checkpoint": {"every": 1, "keep": 9}}


@pytest.mark.parametrize("extragradient", [False, True])
def test_a_run_with_master_weights_is_resumed_to_the_byte(extragradient: bool, world: Path, tmp_path: Path) -> None:
    optimizer = {"lr": 1e-4, "master_weights": True, "extragradient": extragradient}
    raw = raw_recipe(world, student={"dtype": "bfloat16"}, optimizer=optimizer, **EVERY)
    with parts_of(raw, tmp_path / "parts") as parts:
        assert isinstance(parts.optimizer, MasterWeights)
    assert_resumed_equals_whole(raw, tmp_path)


def test_what_cannot_be_used_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, **change: Any) -> None:
        with pytest.raises(UserError, match=words), parts_of(raw_recipe(world, **change), tmp_path / "r"):
            pass

    refused("weights that are trained here are float32 already", optimizer={"master_weights": True})
    lora = {"dtype": "bfloat16", "lora": {"rank": 2}}
    refused("adapters that are trained here are float32", student=lora, optimizer={"master_weights": True})
    refused("memory that a GPU pages out", optimizer={"kind": "paged_adamw_8bit"})
    refused("copies are not paged", optimizer={"kind": "paged_adamw_32bit", "extragradient": True})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(r"pip install 'kdrl\[gpu\]'", optimizer={"kind": "adamw_8bit"})


def test_adapters_of_a_bfloat16_student_are_float32(world: Path, tmp_path: Path) -> None:
    with parts_of(raw_recipe(world, student={"dtype": "bfloat16", "lora": {"rank": 2}}), tmp_path / "r") as parts:
        assert {p.dtype for p in parts.updater.parameters} == {torch.float32}


def test_the_note_on_rounding_ends_with_master_weights(world: Path) -> None:
    low = raw_recipe(world, student={"dtype": "bfloat16"})
    assert "optimizer.master_weights" in check_numbers(load_recipe(low))[0]
    assert check_numbers(load_recipe(low, ["optimizer.master_weights=true"])) == []


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a state's tensors that grow with the weights."""
    tensors = [t for state in optimizer.state.values() for key, t in state.items() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1 and t.numel() != 256)


@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_the_plan_counts_the_state_that_is_held(dtype: torch.dtype, master: bool) -> None:
    optimizer = stepped("adamw", start(dtype), gradients(1), master_weights=master)
    counted, why = state_bytes("adamw", 96 * 64, dtype.itemsize, master_weights=master)
    assert held(optimizer) == counted
    assert "6,144" in why


def test_the_plan_names_the_optimizer(world: Path) -> None:
    def states(**change: Any) -> dict[str, int]:
        items = memory_plan(load_recipe(raw_recipe(world, **change))).items
        return {i.name: i.bytes for i in items if i.name in ("optimizer state", "student weights")}

    plain = states()
    assert plain["optimizer state"] == 2 * plain["student weights"]
    assert states(optimizer={"kind": "adamw_8bit"})["optimizer state"] < 0.26 * plain["optimizer state"]
    low = states(student={"dtype": "bfloat16"}, optimizer={"master_weights": True})
    assert low["optimizer state"] == 6 * low["student weights"]


class TestEightBit:
    """With bitsandbytes, where it is installed; its 8-bit AdamW works on the CPU too."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-kernels")

    def test_it_is_adamw_within_the_precision_of_its_moments(self) -> None:
        eight, full = start(), start()
        optimizer = stepped("adamw_8bit", eight, gradients())
        stepped("adamw", full, gradients())
        moved = (full - start()).norm()
        assert 0 < (eight - full).norm() < 0.1 * moved
        assert held(optimizer) == state_bytes("adamw_8bit", 96 * 64, 4, master_weights=False)[0]

    @pytest.mark.parametrize("low", [False, True])
    def test_a_run_is_resumed_to_the_byte(self, low: bool, world: Path, tmp_path: Path) -> None:
        raw = raw_recipe(world, optimizer={"lr": 1e-3, "kind": "adamw_8bit"}, **EVERY, **WIDE)
        if low:
            raw["student"]["dtype"], raw["optimizer"]["master_weights"] = "bfloat16", True
        with parts_of(raw, tmp_path / "parts") as parts:
            assert "AdamW8bit" in type(parts.optimizer).__name__
        assert_resumed_equals_whole(raw, tmp_path)

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
    def test_a_run_on_a_gpu_is_resumed_to_the_byte(self, kind: str, world: Path, tmp_path: Path) -> None:
        raw = raw_recipe(world, optimizer={"lr": 1e-3, "kind": kind}, **EVERY, **WIDE) | {"device": "cuda"}
        assert_resumed_equals_whole(raw, tmp_path)
