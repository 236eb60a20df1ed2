"""Evaluate a model on held-out problems: avg@n, pass@k, majority@k, tokens, truncation, with intervals over problems.

Left out: log-likelihood (multiple choice) scoring and agreement with a teacher; responses are written and verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from kdrl.config import Config
from kdrl.errors import UserError, nearest
from kdrl.problems import explain_validation
from kdrl.results import Comparison, EvaluationResult, Record, Response, compare, results_table
from kdrl.seeds import derive

if TYPE_CHECKING:
    from kdrl.models import LoadedModel, TeacherModelConfig
    from kdrl.recipe import Recipe
    from kdrl.tasks import Problem, VerifierPool
    from kdrl.tasks.config import TaskConfig

__all__ = [
    "Comparison",
    "EvaluateConfig",
    "EvaluationResult",
    "Record",
    "Response",
    "compare",
    "evaluate",
    "evaluate_loaded",
    "results_table",
]

Split = Literal["train", "development", "test"]


class EvaluateConfig(Config):
    """How often and on what the student is evaluated; the defaults suit evaluation during training."""

    every: int = Field(default=0, ge=0)
    """Evaluate on `split` every this many steps, and after the last one; 0 switches evaluation during training off."""
    problems: int = Field(default=256, ge=1)
    """How many problems of the split: its first ones, so that every evaluation of a run sees the same."""
    samples: int = Field(default=1, ge=1, le=1000)
    """Responses per problem."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Sampling temperature; 0 is greedy and then one sample is all there is."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus: keep the most likely tokens that together reach this probability; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Keep this many most likely tokens; 0 keeps all."""
    k: list[int] = Field(default_factory=list)
    """pass@k and majority@k are reported for these k; each is at most `samples`."""
    split: Split = "development"
    """Which problems: tuning looks at `development` only, `test` is for the end."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Length limit of a response; unset takes the limit of the rollouts."""
    batch: int = Field(default=256, ge=1)
    """Problems asked of the engine at once. With temperature > 0 another value draws other samples."""
    final_problems: int = Field(default=0, ge=0)
    """Problems of the `test` split that the finished model is evaluated on; 0 leaves the held-out evaluation out."""
    baselines: bool = True
    """Evaluate the teacher and the untouched student on the held-out problems too, for the comparison."""

    @model_validator(mode="after")
    def _refuse_nonsense(self) -> EvaluateConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"temperature 0 writes the same response {self.samples} times; set evaluate.samples to 1 or give "
                "evaluate.temperature a value above 0"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("evaluate.top_p and evaluate.top_k change nothing at temperature 0; remove them")
        bad = [k for k in self.k if not 1 <= k <= self.samples]
        if bad:
            raise ValueError(
                f"evaluate.k holds {bad[0]}, but pass@{bad[0]} needs k between 1 and evaluate.samples, "
                f"which is {self.samples}"
            )
        if len(set(self.k)) < len(self.k):
            raise ValueError(f"evaluate.k names a value twice: {self.k}")
        return self

    def final(self) -> EvaluateConfig:
        """The same sampling on `final_problems` problems of the `test` split."""
        if not self.final_problems:
            raise UserError("evaluate.final_problems is 0, so there is no held-out evaluation to make")
        return self.model_copy(update={"split": "test", "problems": self.final_problems})


def evaluate_loaded(
    engine: Any,
    loaded: LoadedModel,
    problems: Sequence[Problem],
    pool: VerifierPool,
    config: EvaluateConfig,
    seed: int,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Write `config.samples` responses to each problem with `engine`, verify them in `pool`, and sum up.

    `max_new_tokens` is the limit where the config leaves it open; `progress(done, total)` is called after each batch.
    Stop strings stay in the text. Raises UserError without problems or without a length limit.
    """
    limit = config.max_new_tokens or max_new_tokens
    if limit is None:
        raise UserError("the length of a response is not limited; set evaluate.max_new_tokens")
    if not problems:
        raise UserError(f"there are no problems in split {config.split!r} to evaluate on")
    records: list[Record] = []
    for start in range(0, len(problems), config.batch):
        chunk = problems[start : start + config.batch]
        chunk_seed = derive(seed, "evaluate", config.split, start)
        records += _answer(engine, loaded, chunk, pool, config, limit, chunk_seed, stop)
        if progress is not None:
            progress(len(records), len(problems))
    settings = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return EvaluationResult.from_records(
        records,
        model=loaded.config.model if isinstance(loaded.config.model, str) else "new model",
        split=config.split,
        k=config.k,
        seed=seed,
        settings={**settings, "samples": config.samples, "max_new_tokens": limit},
    )


def _answer(
    engine: Any,
    loaded: LoadedModel,
    problems: Sequence[Problem],
    pool: VerifierPool,
    config: EvaluateConfig,
    limit: int,
    seed: int,
    stop: Sequence[str],
) -> list[Record]:
    """Responses and verdicts of one batch of problems."""
    from kdrl.models import encode_prompt
    from kdrl.tasks import ResponseInfo

    def text_of(sample: Any) -> str:
        return str(loaded.tokenizer.decode(sample.token_ids, skip_special_tokens=True))

    samples_BG = engine.generate(
        [encode_prompt(loaded, problem.prompt) for problem in problems],
        samples=config.samples,
        max_new_tokens=limit,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=stop,
        seed=seed,
        done=lambda i, _, sample: pool.send(text_of(sample), problems[i]),
    )
    rows = [(problem, sample) for problem, samples in zip(problems, samples_BG, strict=True) for sample in samples]
    texts = [text_of(sample) for _, sample in rows]
    infos = [ResponseInfo(len(sample.token_ids), not sample.ended, limit) for _, sample in rows]
    items = [(text, problem, info) for (problem, _), text, info in zip(rows, texts, infos, strict=True)]
    verdicts = pool.score(items)
    responses = [
        Response(text, info.tokens, verdict.correct, info.truncated, pool.answer(text), verdict.reward, verdict.status)
        for (text, _, info), verdict in zip(items, verdicts, strict=True)
    ]
    n = config.samples
    return [Record(p.id, p.prompt, tuple(responses[i * n : (i + 1) * n])) for i, p in enumerate(problems)]


def evaluate(
    model: str | Path | LoadedModel,
    task: str | Path | Mapping[str, Any] | Recipe | TaskConfig,
    *,
    config: EvaluateConfig | None = None,
    device: str = "auto",
    seed: int = 0,
    max_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> EvaluationResult:
    """Load `model` and evaluate it on `task`: a recipe (path, mapping or object) or a task section.

    `overrides` are fields of EvaluateConfig (problems, samples, temperature, split, k …; None leaves a field open).
    Without `config` they lie on the recipe's held-out evaluation: `final_problems` of the `test` split. `seed` is 0
    for all, so that two models differ by themselves alone. Raises UserError for what cannot be combined.
    """
    from kdrl.build import resolve_device
    from kdrl.engines import TorchEngine
    from kdrl.models import encode_prompt, load_model
    from kdrl.tasks import VerifierPool, build_task

    recipe = _recipe_of(task)
    task_config: Any = task if recipe is None else recipe.task
    chosen = _chosen_config(config, recipe, overrides)
    limit, stop = (None, ()) if recipe is None else (recipe.rollout.max_new_tokens, recipe.rollout.stop)
    rows = max_rows or (256 if recipe is None else recipe.rollout.rows)
    if isinstance(model, (str, Path)):
        section = _model_config(str(model), recipe)
        loaded = load_model(section, resolve_device(device), trainable=False, seed=seed)
    else:
        loaded = model
    # A limit on the length of prompts (task.max_prompt_tokens) decides which problems there are.
    tasks = build_task(task_config, seed, lambda problem: len(encode_prompt(loaded, problem.prompt)))
    problems = pick_problems(tasks, chosen)
    engine = TorchEngine(loaded, max_rows=rows, filtered_ok=True)
    with VerifierPool(task_config) as pool:
        return evaluate_loaded(
            engine, loaded, problems, pool, chosen, seed, max_new_tokens=limit, stop=stop, progress=progress
        )


def pick_problems(task: Any, config: EvaluateConfig) -> list[Problem]:
    """The first `config.problems` problems of the split (all of a smaller one); UserError when it has none."""
    from kdrl.tasks.base import take

    problems = take(task.problems(config.split), config.problems)
    if not problems:
        raise UserError(
            f"the task has no {config.split!r} problems; give it a share (task.holdout) or a file of its own"
        )
    return list(problems)


def _recipe_of(task: Any) -> Any:
    """The recipe behind a path, mapping or object, None for a task section alone."""
    if isinstance(task, (str, Path, Mapping)):
        from kdrl.recipe import load_recipe

        return load_recipe(task)
    return task if hasattr(task, "task") else None


def _chosen_config(config: EvaluateConfig | None, recipe: Any, overrides: dict[str, Any]) -> EvaluateConfig:
    """The given section, else the recipe's on the `test` split, with overrides checked like a recipe's keys."""
    unknown = sorted(overrides.keys() - EvaluateConfig.model_fields.keys())
    if unknown:
        raise UserError(f"evaluate has no option {unknown[0]!r}{nearest(unknown[0], EvaluateConfig.model_fields)}")
    said = {name: value for name, value in overrides.items() if value is not None}
    base = config
    if base is None:
        base = EvaluateConfig() if recipe is None else recipe.evaluate
        on_test = said.get("split", "test") == "test" and base.final_problems > 0
        base = base.final() if on_test else base.model_copy(update={"split": "test"})
    try:
        return EvaluateConfig.model_validate({**base.model_dump(), **said})
    except ValidationError as error:
        raise UserError("; ".join(explain_validation(error, EvaluateConfig, "evaluate."))) from error


def _model_config(model: str, recipe: Any) -> TeacherModelConfig:
    """How to load `model`: as the recipe loads it when it names it, else with the student's template and precision."""
    from kdrl.models import TeacherModelConfig

    if recipe is None:
        return TeacherModelConfig(model=model)
    for section in (recipe.student, recipe.teacher):
        if section is not None and section.model == model:
            return section
    kept = ("chat_template", "chat_template_kwargs", "eos", "dtype", "autocast", "attention")
    return TeacherModelConfig(model=model, **{name: getattr(recipe.student, name) for name in kept})
