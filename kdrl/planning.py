"""The memory plan of a recipe, from model configurations alone: no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig, PretrainedConfig

from kdrl.build import resolve_device
from kdrl.checks import build_objective
from kdrl.errors import UserError
from kdrl.features.plan import feature_items
from kdrl.memory import Item, MemoryPlan, Phase, plan
from kdrl.model_shape import ModelShape, adapter_parameters
from kdrl.models.compressed import BITS
from kdrl.models.config import NewModel, TeacherModelConfig
from kdrl.models.loading import LoadedModel, load_tokenizer, quiet
from kdrl.models.prompts import encode_prompt
from kdrl.models.scratch import new_model_config
from kdrl.models.sources import explain, find_origin
from kdrl.objectives.objective import Objective
from kdrl.optimizers import state_bytes
from kdrl.recipe import Recipe
from kdrl.sources.kinds import Gold
from kdrl.tasks import build_task
from kdrl.tasks.base import take
from kdrl.teachers.checks import asked_models, same_model, section_of, shares_student
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.plan import teacher_items
from kdrl.vocab.plan import space_items

_BYTES = {"float32": 4, "bfloat16": 2}
# Problems whose prompts are counted where no limit is stated.
_LOOKED_AT = 64


def config_of(section: TeacherModelConfig) -> PretrainedConfig:
    """The transformers configuration of a model section, without its weights; raises UserError when there is none."""
    if isinstance(section.model, NewModel):
        tokenizer = load_tokenizer(section)
        return new_model_config(section.model, len(tokenizer), tokenizer)
    origin = find_origin(section)
    try:
        with quiet():
            return AutoConfig.from_pretrained(origin.name, **origin.options)
    except Exception as error:
        raise UserError(explain(error, origin.label, "model")) from error


def _prompt_tokens(recipe: Recipe) -> int:
    """The limit of prompts, or the longest of the problems that training begins with.

    As long as a response where neither can be had: a task that cannot be read is for the builder to refuse.
    """
    if recipe.task.max_prompt_tokens is not None:
        return recipe.task.max_prompt_tokens
    section = recipe.student
    try:
        with quiet():
            reader = LoadedModel(None, load_tokenizer(section), section, (), 0, 0)
            problems = take(build_task(recipe.task, recipe.seed).problems("train"), _LOOKED_AT)
        return max(len(encode_prompt(reader, problem.prompt)) for problem in problems)
    except (UserError, ValueError):
        return recipe.rollout.max_new_tokens


def _look_ahead(recipe: Recipe, trainable: int) -> tuple[Item, ...]:
    """Weights and optimizer state from before a look-ahead."""
    if not recipe.optimizer.extragradient:
        return ()
    size = _trained_bytes(recipe)
    state, why = _optimizer_state(recipe, trainable)
    return (Item("before the look-ahead", trainable * size + state, "always", f"weights, {why}"),)


def _balance(recipe: Recipe, objective: Objective, trainable: int) -> tuple[Item, ...]:
    """The gradient of one side while that of the other is measured."""
    if not recipe.log.gradients_every or not {"kd", "rl"} <= {term.family for term in objective.terms}:
        return ()
    size = _trained_bytes(recipe)
    return (Item("gradient of one side", trainable * size, "update", f"for the balance: {trainable:,} x {size} B"),)


def _group(recipe: Recipe) -> int:
    """Responses to a prompt; of some sources as many as the data has, or a pair."""
    return 1 if isinstance(recipe.source.settings, Gold) else max(2, recipe.rollout.group)


def _problems(recipe: Recipe) -> int:
    return recipe.rollout.prompts * (1 + recipe.rollout.dynamic_sampling)


def _step_tokens(recipe: Recipe, prompt: int) -> int:
    """Most tokens of an optimizer step, as `pack_rows` counts them: an eighth more for what responses attend to."""
    response, group = recipe.rollout.max_new_tokens, _group(recipe)
    tokens = prompt + group * response + (group * (prompt + response) // 8 if group > 1 else 0)
    return _problems(recipe) * tokens // recipe.optimizer.minibatches


def _rows(recipe: Recipe) -> tuple[int, int]:
    """Most responses that are written at once, in training and in evaluation, and how many of them to a prompt."""
    rollout, evaluate = recipe.rollout, recipe.evaluate
    asked = [(rollout.prompts * rollout.group, rollout.group)] if recipe.source.settings.generates else []
    for wanted, problems in ((evaluate.every, evaluate.problems), (evaluate.final_problems, evaluate.final_problems)):
        asked += [(problems * evaluate.samples, evaluate.samples)] if wanted else []
    rows, samples = max(((min(rollout.rows, rows), -samples) for rows, samples in asked), default=(0, -1))
    return rows, -samples


def _trained_bytes(recipe: Recipe) -> int:
    """Bytes of a weight that is trained: adapters are float32 whatever their base is."""
    return 4 if recipe.student.lora is not None else _BYTES[recipe.student.dtype]


def _optimizer_state(recipe: Recipe, trainable: int) -> tuple[int, str]:
    config = recipe.optimizer
    return state_bytes(config.kind, trainable, _trained_bytes(recipe), master_weights=config.master_weights)


def _teacher_cache(recipe: Recipe, teacher: ModelShape | None, rows: int, longest: int) -> tuple[Item, ...]:
    """The teacher's own key-value cache where it writes along with the student."""
    if teacher is None or recipe.teacher is None or not recipe.source.settings.joint:
        return ()
    width = _BYTES[recipe.teacher.dtype] if recipe.teacher.autocast is None else 2
    size = rows * longest * teacher.kv_width * 2 * width * teacher.layers
    why = f"{rows} rows x {longest} tokens x {teacher.layers} layers, as the student's"
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
        hidden = tokens * shape.width * size
        yield Item(f"{name} hidden states", hidden, "update", f"{tokens:,} tokens x {shape.width:,} x {size} B")


def _shapes(teachers: list[tuple[str, TeacherModelConfig]]) -> dict[str, ModelShape]:
    return {name: ModelShape.from_config(config_of(section)) for name, section in teachers}


def memory_plan(recipe: Recipe) -> MemoryPlan:
    """Plan a recipe's memory; raises UserError when a model's configuration cannot be read."""
    student_config = config_of(recipe.student)
    lora = recipe.student.lora
    objective = build_objective(recipe)
    teachers = _teachers(recipe, objective)
    teacher = teachers[0][1] if teachers else None
    rows, samples = _rows(recipe)
    prompt = _prompt_tokens(recipe)
    longest = prompt + recipe.rollout.max_new_tokens
    states = _problems(recipe) * _group(recipe) * recipe.rollout.max_new_tokens
    whole = any(term.needs.teacher == "distribution" for term in objective.terms)
    shape = ModelShape.from_config(student_config)
    teacher_shape = None if teacher is None else ModelShape.from_config(config_of(teacher))
    trainable = shape.parameters if lora is None else adapter_parameters(student_config, lora)
    device = resolve_device(recipe.device)
    tokens = max(min(recipe.optimizer.micro_batch_tokens, _step_tokens(recipe, prompt)), longest)
    return plan(
        shape,
        teacher_shape,
        trainable_parameters=None if lora is None else trainable,
        micro_batch_tokens=recipe.optimizer.micro_batch_tokens,
        step_tokens=_step_tokens(recipe, prompt),
        max_length=longest,
        prompt_tokens=prompt,
        group=_group(recipe),
        rollout_rows=rows,
        samples=samples,
        teacher_states=states if whole else tokens,
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
        + _balance(recipe, objective, trainable)
        + tuple(_further(recipe, teachers[1:], states if whole else tokens))
        + tuple(_saved(teachers))
        + _teacher_cache(recipe, teacher_shape, rows, longest)
        + feature_items(objective, shape, teacher_shape, tokens, longest)
        + space_items(objective, shape, _shapes(teachers), tokens, longest)
        + teacher_items(recipe, objective, shape, teacher_shape, trainable, tokens, longest, device),
    )
