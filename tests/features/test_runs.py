"""Feature terms in a whole run: training, saving, going on, planning, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from tiny import parts_of, raw_recipe, rows_of, run, section, toy, with_teacher

from features.toys import updater_of
from kdrl.checkpoint import load
from kdrl.errors import UserError
from kdrl.features.config import FeatureConfig, layer_pairs
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe, plain
from kdrl.trainer import Trainer
from kdrl.watch import Watch
from kdrl.yamls import load_yaml

LINEAR = {"feature": {"of": "hidden", "projector": {"linear": {"lr_scale": 10.0}}}}
TERMS = [{"distill": {"divergence": "forward_kl"}}, LINEAR, {"feature": {"of": "attention", "loss": "kl"}}]


def recipe(world: Path, *entries: Any, **change: Any) -> dict[str, Any]:
    """A wider student than the teacher of `make_world`, so that hidden states need a projector."""
    student = section(hidden_size=24, head_dim=8)
    objective = list(entries or TERMS)
    return raw_recipe(world, None, objective=objective, **({"student": student} | with_teacher(world) | change))


def names_in(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return set(stored.keys())


def test_a_run_trains_the_projector_and_leaves_it_out_of_final(world: Path, tmp_path: Path):
    result = run(recipe(world, checkpoint={"every": 1}), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
    assert all(row["loss/feature.0"] > 0 and row["loss/feature.1"] > 0 for row in rows)
    # Each of the 12 responses is scored for the distillation and passed once more for the features.
    assert rows[-1]["teacher_calls"] == 2 * 2 * 12
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    names = {name for file in checkpoints[-1].glob("*.safetensors") for name in names_in(file)}
    assert {"feature.0.0.weight", "feature.0.0.bias", "feature.0.0.weight|exp_avg"} <= names
    assert not any(name.startswith("feature") for name in names_in(result.model / "model.safetensors"))


def test_the_projector_has_its_own_rate_and_no_decay(world: Path, tmp_path: Path):
    with parts_of(recipe(world, optimizer={"lr": 1e-3, "weight_decay": 0.1}), tmp_path) as parts:
        group = parts.optimizer.param_groups[-1]
        assert group["params"] == parts.updater.projectors
        assert (group["weight_decay"], group["lr_scale"]) == (0.0, 10.0)
        with Watch(tmp_path, parts.recipe.log, 2) as watch:
            Trainer(parts).run(watch)
        assert [g["lr"] for g in parts.optimizer.param_groups] == [1e-3, 1e-3, 1e-2]


def test_going_on_from_a_checkpoint_gives_the_same_bytes(world: Path, tmp_path: Path):
    """Four steps in one go, and two, a new process's parts, and two more: weights, projector, moments, losses."""
    orthogonal = {"feature": {"projector": "orthogonal", "normalise": "batch"}}
    raw = recipe(world, orthogonal, {"feature": {"of": "embedding", "projector": "mlp"}}, steps=4)
    raw["checkpoint"] = {"every": 2}
    run(raw, tmp_path / "whole")
    with parts_of(raw, tmp_path / "whole") as parts:
        saved = sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))
        loaded = [load(path) for path in saved]
        assert [one.state["progress"]["step"] for one in loaded] == [2, 4]
        trainer = Trainer(parts)
        trainer.restore(loaded[0])
        with Watch(tmp_path / "again", parts.recipe.log, 4) as watch:
            trainer.run(watch)
        want = loaded[1].tensors["student"]
        assert sum(name.startswith("feature.") for name in want) == 5
        found = parts.updater.named_parameters
        for name, value in want.items():
            assert torch.equal(found[name], value), name
        losses = [[row["loss/feature.0"] for row in rows_of(tmp_path / name)] for name in ("whole", "again")]
        assert losses[0][2:] == losses[1]


def test_another_projector_than_the_checkpoints_is_refused(world: Path, tmp_path: Path):
    run(recipe(world, checkpoint={"every": 2}), tmp_path / "run")
    other = recipe(world, TERMS[0], {"feature": {"projector": "mlp"}}, TERMS[2])
    with parts_of(other, tmp_path / "run") as parts:
        latest = parts.checkpoints.latest()
        assert latest is not None
        with pytest.raises(UserError, match=r"saved with another list of trained parameters.*feature\.0\."):
            Trainer(parts).restore(latest)


def test_lora_and_autocast_students_have_features_too(world: Path, tmp_path: Path):
    student = section(hidden_size=24, head_dim=8) | {"lora": {"rank": 2}, "autocast": "bfloat16"}
    for checkpointing in (False, True):
        raw = recipe(world, student=student | {"gradient_checkpointing": checkpointing})
        run(raw, tmp_path / str(checkpointing))
        rows = rows_of(tmp_path / str(checkpointing))
        assert all(row["loss/feature.1"] >= 0 and row["grad_norm"] > 0 for row in rows)


def test_the_plan_counts_projectors_and_maps(world: Path):
    bare = memory_plan(load_recipe(recipe(world, TERMS[0])))
    full = memory_plan(load_recipe(recipe(world)))
    more = {item.name: item.bytes for item in full.items if item not in bare.items}
    count = 24 * 16 + 16
    assert more["feature.0: projectors"] == 12 * count
    assert more["feature.0: projector gradients"] == 4 * count
    assert more.keys() >= {"feature.0: vectors", "feature.1: attention maps"}
    assert full.peak > bare.peak
    assert any(item.name == "teacher forward" for item in full.items)


@pytest.mark.parametrize(
    "projector", ["linear", "orthogonal", "mlp", {"mlp": {"width": 5}}, {"linear": {"shared": True}}]
)
def test_the_planned_parameters_are_those_made(projector: Any):
    from kdrl.features.projectors import projector_parameters, sizes_of
    from kdrl.model_shape import ModelShape

    student, teacher = toy(1, trainable=True, layers=2), toy(2, layers=2, hidden_size=24, head_dim=8)
    config = FeatureConfig.model_validate({"projector": projector})
    _, sizes = sizes_of(config, *(ModelShape.from_model(m.model) for m in (student, teacher)))
    made = updater_of(student, teacher, [{"feature": {"projector": projector}}]).projectors
    assert projector_parameters(config, sizes) == sum(p.numel() for p in made)


WRONG_MODELS = [
    (
        {"of": "hidden"},
        r"objective\.feature\.projector: hidden has 24 dimensions .* set projector: linear",
    ),
    (
        {"of": "hidden", "layers": {2: 1}, "projector": "mlp"},
        r"objective\.feature\.layers: the student has layers 1 to 1",
    ),
    ({"of": "attention", "loss": "kl"}, r"has 3 heads in the student and 2 in the teacher; set projector: head_map"),
    ({"of": {"relation": {"of": "hidden", "heads": 5}}}, r"objective\.feature\.of: .* width 24 cannot be cut in 5"),
]


@pytest.mark.parametrize(("term", "message"), WRONG_MODELS)
def test_models_that_do_not_fit_are_refused(term: dict[str, Any], message: str, world: Path, tmp_path: Path):
    raw = recipe(world, {"feature": term})
    raw["student"] = section(hidden_size=24, head_dim=8, heads=3)
    with pytest.raises(UserError, match=message), parts_of(raw, tmp_path):
        pass
    with pytest.raises(UserError, match=message):
        memory_plan(load_recipe(raw))


def test_without_a_teacher_it_is_refused(world: Path):
    with pytest.raises(UserError, match=r"there is no teacher, but the feature term asks it; add teacher\.model="):
        load_recipe(raw_recipe(world, None, objective=[LINEAR]))


def test_a_prepared_teacher_is_refused(world: Path):
    teacher = with_teacher(world)["teacher"] | {"prepare": "soft_prompt"}
    with pytest.raises(UserError, match=r"teacher\.prepare=soft_prompt .* a feature term reads the inside"):
        load_recipe(recipe(world, teacher=teacher))


WRONG_SETTINGS = [
    ({"of": "hiden"}, "did you mean 'hidden'"),
    ({"of": {"relation": "attention"}}, "a relation is of vectors"),
    ({"of": {"relation": {"of": "keys", "head": 3}}}, "head"),
    ({"of": "hidden", "loss": "kl"}, "loss kl cannot compare hidden; it takes mse"),
    ({"of": {"relation": "hidden"}, "loss": "nd"}, "cannot compare a relation of hidden"),
    ({"of": "attention_scores", "loss": "kl"}, "use `of: attention`"),
    ({"loss": {"mse": {"temperature": 2}}}, "temperature belongs to kl and infonce and mi_alpha, not to mse"),
    ({"loss": {"infonce": 3}}, "takes settings by name"),
    ({"projector": "head_map"}, "head_map maps attention heads"),
    ({"of": "attention", "projector": "linear"}, "projector linear maps vectors"),
    ({"projector": {"linear": {"width": 3}}}, "width belongs to mlp, not to linear"),
    ({"projector": {"none": {"lr_scale": 3}}}, "lr_scale belongs to"),
    ({"layers": "all"}, "belongs to projector head_map"),
    ({"layers": "first"}, "uniform, last or all"),
    ({"layers": {"a": 1}}, "maps student layers to teacher layers"),
    ({"of": "embedding", "layers": {1: 1}}, "there is one embedding"),
    ({"of": "values", "layers": {0: 1}}, "layer 0 is the embedding, which has no values"),
    ({"of": "attention", "bits": 4}, "normalise and bits change"),
    ({"loss": "nd", "normalise": "token"}, "nd compares norms"),
]


@pytest.mark.parametrize(("term", "message"), WRONG_SETTINGS)
def test_settings_that_cannot_work_are_refused(term: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        FeatureConfig.model_validate(term)


WRITTEN = [
    {
        "of": "attention",
        "loss": {"kl": {"temperature": 4.0}},
        "projector": {"head_map": {"lr_scale": 2.0}},
        "layers": "all",
    },
    {"of": {"relation": {"of": "queries", "heads": 3, "scale": "dot", "neighbours": 2}}, "loss": "kl"},
    {"layers": {1: -1, -1: 2}, "projector": {"mlp": {"width": 5, "shared": True}}, "normalise": "whiten", "bits": 4},
    {"loss": {"nd": {"centre": "batch"}}, "layers": "last", "mask": "right_response", "weight": 0.5},
]


@pytest.mark.parametrize("term", WRITTEN)
def test_a_term_reads_back_as_it_was_written(term: dict[str, Any], world: Path):
    first = load_recipe(recipe(world, {"feature": term}))
    back = load_recipe(load_yaml(first.to_yaml(), "stored"))
    assert plain(back) == plain(first)
    assert back.objective[0].config == first.objective[0].config


def test_layer_maps():
    def pairs(layers: Any, student: int, teacher: int, **more: Any) -> list[Any]:
        return layer_pairs(FeatureConfig.model_validate({"layers": layers, **more}), student, teacher)

    assert pairs("uniform", 4, 12) == [((1,), (3,)), ((2,), (6,)), ((3,), (9,)), ((4,), (12,))]
    assert pairs("uniform", 3, 4) == [((1,), (1,)), ((2,), (3,)), ((3,), (4,))]
    assert pairs("uniform", 3, 1) == [((1,), (1,)), ((2,), (1,)), ((3,), (1,))]
    assert pairs("last", 4, 12) == [((4,), (12,))]
    assert pairs({0: 0, -1: -2, "2": 6}, 4, 12) == [((0,), (0,)), ((4,), (11,)), ((2,), (6,))]
    whole = pairs("all", 2, 3, of="attention", loss="kl", projector="head_map")
    assert whole == [((1, 2), (1, 2, 3))]
