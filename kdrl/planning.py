"""The memory plan of a recipe, from model configurations alone: no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from kdrl.build import resolve_device
from kdrl.checks import build_objective
from kdrl.errors import UserError
from kdrl.features.plan import feature_items
from kdrl.memory import Item, MemoryPlan, Phase, plan
from kdrl.model_shape import ModelShape, adapter_parameters
from kdrl.models.compressed import BITS
from kdrl.models.config import NewModel, NewTokenizer, TeacherModelConfig
from kdrl.models.loading import quiet
from kdrl.models.scratch import character_tokenizer, new_model_config
from kdrl.models.sources import explain, find_origin
from kdrl.objectives.objective import Objective
from kdrl.optimizers import state_bytes
from kdrl.recipe import Recipe
from kdrl.teachers.checks import asked_models, same_model, section_of, shares_student
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.plan import teacher_items
from kdrl.vocab.plan import space_items

_BYTES = {"float32": 4, "bfloat16": 2}


def config_of(section: TeacherModelConfig) -> PretrainedConfig:
    """The transformers configuration of a model section, without its weights; raises UserError when there is none."""
    if isinstance(section.model, NewModel):
        if isinstance(section.tokenizer, NewTokenizer):
            tokenizer = character_tokenizer(section.tokenizer)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(section.tokenizer))
        return new_model_config(section.model, len(tokenizer), tokenizer)
    origin = find_origin(section)
    try:
        with quiet():
            return AutoConfig.from_pretrained(origin.name, **origin.options)
    except Exception as error:
        raise UserError(explain(error, origin.label, "model")) from error


def _longest(recipe: Recipe) -> int:
    # Without a stated prompt limit a prompt as long as the response is assumed.
    prompt = recipe.task.max_prompt_tokens or recipe.rollout.max_new_tokens
    return prompt + recipe.rollout.max_new_tokens


def _look_ahead(recipe: Recipe, trainable: int) -> tuple[Item, ...]:
    """Weights and optimizer state from before a look-ahead."""
    if not recipe.optimizer.extragradient:
        return ()
    size = _trained_bytes(recipe)
    state, why = _optimizer_state(recipe, trainable)
    return (Item("before the look-ahead", trainable * size + state, "always", f"weights, {why}"),)


def _step_tokens(recipe: Recipe) -> int:
    """Most tokens of a step: each prompt once, where responses share it, and an eighth for each more (`pack_rows`)."""
    rollout, response = recipe.rollout, recipe.rollout.max_new_tokens
    prompt = _longest(recipe) - response
    rounds, per_prompt = 1 + rollout.dynamic_sampling, max(2, rollout.group)
    return rounds * rollout.prompts * (prompt + per_prompt * (response + prompt // 8))


def _rows(recipe: Recipe) -> int:
    """Most responses that are written at once, in training and in evaluation."""
    rollout, evaluate = recipe.rollout, recipe.evaluate
    asked = rollout.prompts * rollout.group if recipe.source.settings.generates else 0
    for wanted, problems in ((evaluate.every, evaluate.problems), (evaluate.final_problems, evaluate.final_problems)):
        asked = max(asked, problems * evaluate.samples if wanted else 0)
    return min(rollout.rows, asked)


def _trained_bytes(recipe: Recipe) -> int:
    """Bytes of a weight that is trained: adapters are float32 whatever their base is."""
    return 4 if recipe.student.lora is not None else _BYTES[recipe.student.dtype]


def _optimizer_state(recipe: Recipe, trainable: int) -> tuple[int, str]:
    config = recipe.optimizer
    return state_bytes(config.kind, trainable, _trained_bytes(recipe), master_weights=config.master_weights)


def _teacher_cache(recipe: Recipe, teacher: ModelShape | None, rows: int) -> tuple[Item, ...]:
    """The teacher's own key-value cache where it writes along with the student."""
    if teacher is None or recipe.teacher is None or not recipe.source.settings.joint:
        return ()
    width = _BYTES[recipe.teacher.dtype] if recipe.teacher.autocast is None else 2
    size = rows * _longest(recipe) * teacher.kv_width * 2 * width * teacher.layers
    why = f"{rows} rows x {_longest(recipe)} tokens x {teacher.layers} layers, as the student's"
    return (Item("teacher KV cache", size, "rollout", why),)


def _teachers(recipe: Recipe, objective: Objective) -> list[tuple[str, TeacherModelConfig]]:
    """Models beside the student that are held, each checkpoint once; the one called teacher first."""
    first = ["teacher"] if recipe.teacher is not None else []
    found: list[tuple[str, TeacherModelConfig]] = []
    for name in first + [name for name in asked_models(recipe, objective) if name not in first]:
        section = section_of(recipe, name)
        if section.served is not None or section.reads_cache:
            continue
        twin = any(same_model(section, other) for _, other in found)
        if not twin and not shares_student(recipe, objective, name):
            found.append((name, section))
    return found


def _saved(teachers: list[tuple[str, TeacherModelConfig]]) -> Iterator[Item]:
    """What compression and offloading take off the teachers' weights, as negative sizes."""
    for name, section in teachers:
        shape, size = ModelShape.from_config(config_of(section)), _BYTES[section.dtype]
        if section.load is not None:
            linear = shape.parameters - shape.vocabulary * shape.width
            each = BITS[section.load] / 8
            why = f"{linear:,} weights of linear layers x {each:g} B in place of {size} B"
            yield Item(f"{name} in {section.load}", -int(linear * (size - each)), "always", why)
        if isinstance(section, TeacherConfig) and section.offload:
            phases: tuple[Phase, ...] = ("rollout", "optimizer step")
            for phase in phases:
                why = "the weights are in main memory while it does not score"
                yield Item(f"{name} offloaded", -shape.parameters * size, phase, why)


def _further(recipe: Recipe, teachers: list[tuple[str, TeacherModelConfig]], tokens: int) -> Iterator[Item]:
    """Teachers beyond the first: their weights, and the hidden states that are kept of them."""
    for name, section in teachers:
        shape = ModelShape.from_config(config_of(section))
        size = _BYTES[section.dtype]
        yield Item(f"{name} weights", shape.parameters * size, "always", f"{shape.parameters:,} x {size} B")
        hidden = 2 * 4 * tokens * shape.width
        yield Item(f"{name} hidden states", hidden, "update", f"{tokens:,} tokens x {shape.width:,} x 2 x 4 B")


def _shapes(teachers: list[tuple[str, TeacherModelConfig]]) -> dict[str, ModelShape]:
    return {name: ModelShape.from_config(config_of(section)) for name, section in teachers}


def memory_plan(recipe: Recipe) -> MemoryPlan:
    """Plan a recipe's memory; raises UserError when a model's configuration cannot be read."""
    student_config = config_of(recipe.student)
    here = recipe.teacher is not None and recipe.teacher.served is None and not recipe.teacher.reads_cache
    teacher: TeacherModelConfig | None = recipe.teacher if here else None
    lora = recipe.student.lora
    objective = build_objective(recipe)
    teachers = _teachers(recipe, objective)
    teacher = teachers[0][1] if teachers else None
    rows = _rows(recipe)
    shape = ModelShape.from_config(student_config)
    teacher_shape = None if teacher is None else ModelShape.from_config(config_of(teacher))
    trainable = shape.parameters if lora is None else adapter_parameters(student_config, lora)
    device = resolve_device(recipe.device)
    tokens = max(min(recipe.optimizer.micro_batch_tokens, _step_tokens(recipe)), _longest(recipe))
    return plan(
        shape,
        teacher_shape,
        trainable_parameters=None if lora is None else trainable,
        micro_batch_tokens=recipe.optimizer.micro_batch_tokens,
        step_tokens=_step_tokens(recipe),
        max_length=_longest(recipe),
        rollout_rows=rows,
        dtype_bytes=_BYTES[recipe.student.dtype],
        teacher_dtype_bytes=None if teacher is None else _BYTES[teacher.dtype],
        autocast=recipe.student.autocast is not None,
        lora=lora is not None,
        reference=lora is None and any(t.needs.reference for t in objective.terms),
        checkpointing=recipe.student.gradient_checkpointing,
        optimizer=recipe.optimizer.kind,
        master_weights=recipe.optimizer.master_weights,
        device=device,
        more=_look_ahead(recipe, trainable)
        + tuple(_further(recipe, teachers[1:], tokens))
        + tuple(_saved(teachers))
        + _teacher_cache(recipe, teacher_shape, rows)
        + feature_items(objective, shape, teacher_shape, tokens, _longest(recipe))
        + space_items(objective, shape, _shapes(teachers), tokens, _longest(recipe))
        + teacher_items(recipe, objective, shape, teacher_shape, trainable, tokens, _longest(recipe), device),
    )
