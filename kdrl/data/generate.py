"""A model writes traces to a split's problems, each scored by the task's verifier.

Left out: several writers in one file, and tool calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kdrl.build import resolve_device
from kdrl.config import Config
from kdrl.data.inputs import Inputs, loaded_here
from kdrl.data.store import Counts, TraceFile
from kdrl.data.thoughts import FirstThought, parse_first_thought, prefix_ids
from kdrl.data.traces import Keep, Trace, keep_traces, satisfied
from kdrl.engines import Engine, Sample, TorchEngine
from kdrl.errors import UserError
from kdrl.models import TeacherModelConfig, encode_prompt, load_model
from kdrl.models.loading import load_without_weights
from kdrl.seeds import derive
from kdrl.sources.served import ServedEngine, reader_of
from kdrl.tasks import Problem, ProblemStream, ResponseInfo, VerifierPool, build_task
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.served_checks import open_served, writing_checks
from kdrl.teachers.served_config import ServedConfig

Say = Callable[[str], None]
Progress = Callable[[int, int, Counts], None]
"""(problems done, problems, counts so far), after every batch."""


class GenerateConfig(Config):
    """How many traces are written, how, and which are kept."""

    split: Literal["train", "development", "test"] = "train"
    """Whose problems."""
    problems: int | None = Field(default=None, ge=1)
    """How many problems of the split; all of a finite one where it is not given."""
    samples: int = Field(default=1, ge=1)
    """Traces drawn per problem and try."""
    keep: Keep = "all"
    """Which traces of a problem are kept."""
    most: int | None = Field(default=None, ge=1)
    """Keep at most this many right (or wrong) ones of a problem."""
    distinct: bool = False
    """Leave out a problem's repeated texts."""
    tries: int = Field(default=1, ge=1)
    """Rounds of `samples` more for problems that lack what `keep` asks for."""
    temperature: float | None = Field(default=None, ge=0.0)
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Nucleus; 1 keeps all."""
    top_k: int | None = Field(default=None, ge=0)
    """Likeliest k tokens; 0 keeps all."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Length limit of what the writer writes."""
    first_thought: str | None = None
    """MODEL/N: another model writes the first N tokens (or `line`, `sentence`)."""
    seed: int = 0
    """Seed of the draws."""

    @model_validator(mode="after")
    def _consistent(self) -> GenerateConfig:
        if self.keep == "all" and self.tries > 1:
            raise ValueError("--tries does nothing with --keep all; choose another --keep, or raise --samples")
        if self.most is not None and self.keep not in ("right", "wrong"):
            raise ValueError(f"--most belongs to --keep right or wrong; {self.keep} says itself how many are kept")
        drawn = self.samples * self.tries
        if self.keep == "pair" and drawn < 2:
            raise ValueError("--keep pair needs at least two draws; raise --samples or --tries")
        if self.temperature == 0 and drawn > 1:
            raise ValueError(f"--temperature 0 writes the same trace {drawn} times; draw one, or raise it")
        if self.first_thought is not None:
            parse_first_thought(self.first_thought)
        return self


@dataclass(frozen=True)
class Sampling:
    """How the writer draws, the recipe's rollout section under the options."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Inputs, config: GenerateConfig) -> Sampling:
        """The options, and the rollout section where they are not given."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        given = {name: getattr(config, name) for name in names}
        found = {name: getattr(inputs.rollout, name) if value is None else value for name, value in given.items()}
        return cls(**found, stop=inputs.rollout.stop)


@dataclass(frozen=True)
class Summary:
    """What a finished job wrote: over the whole file, whatever number of processes it took."""

    path: Path
    counts: Counts
    seconds: float

    def lines(self) -> list[str]:
        """The summary in words; the time is that of this process."""
        c = self.counts
        drawn = c["drawn"]
        out = [
            f"{c['problems']} problems, {c['solved']} of them with a right trace; {c['kept']} traces kept of {drawn}",
            f"accuracy of the first draws {c['right'] / c['first']:.3f}, {c['tokens'] / drawn:.1f} tokens a trace, "
            f"{c['cut'] / drawn:.1%} cut at the limit; {c['tokens']} tokens written, {self.seconds:.1f} s",
        ]
        for status in ("timeout", "crash", "printed"):
            if c.get(status):
                out.append(f"{c[status]} verdicts ended with status {status} and count as wrong")
        return out


def writer_section(inputs: Inputs, model: str | None, writer: str | None) -> TeacherModelConfig:
    """Who writes: the model named, else the recipe's `writer` (teacher or student); a teacher may be on a server."""
    if model is not None:
        if writer is not None:
            raise UserError("--model and --writer both say who writes; keep one of the two.")
        return inputs.model_section(model)
    writer = writer or "teacher"
    if writer not in ("teacher", "student"):
        raise UserError(f"--writer is teacher or student, not {writer!r}; any other model is named with --model.")
    section = inputs.teacher if writer == "teacher" else inputs.student
    if section is None:
        raise UserError(f"there is no {writer} to write: name a model with --model PATH_OR_ID or {writer}.model=...")
    return section if _on_server(section) is not None else loaded_here(section, "--model")


def _on_server(section: TeacherModelConfig) -> ServedConfig | None:
    return section.served if isinstance(section, TeacherConfig) else None


def generate(
    inputs: Inputs,
    config: GenerateConfig,
    output: Path,
    *,
    model: str | None = None,
    writer: str | None = None,
    say: Say = print,
    progress: Progress | None = None,
) -> Summary:
    """Write traces to `output` (JSON lines), going on where an earlier process with the same settings stopped.

    The bytes follow from settings and weights, however often it was stopped (on one device; of a served teacher, as far
    as the server writes the same again). Raises UserError, and RunError where a server answers no more.
    """
    section = writer_section(inputs, model, writer)
    _check_server(section, config)
    sampling = Sampling.of(inputs, config)
    if sampling.temperature == 0 and (sampling.top_p < 1 or sampling.top_k > 0):
        raise UserError("--top-p and --top-k change nothing at temperature 0; leave them out.")
    began = time.monotonic()
    with ExitStack() as stack:
        file = stack.enter_context(TraceFile(output, _settings(inputs, config, section, sampling), say))
        maker = _Maker(inputs, config, section, sampling, stack)
        for note in maker.notes:
            say(f"note: {note}")
        problems = maker.problems()
        if file.problems:
            say(f"{output} holds {min(file.problems, len(problems))} of {len(problems)} problems already; going on")
        for first, last in _batches(file.problems, len(problems), maker.batch):
            rows, counts = maker.batch_of(problems[first:last])
            file.write(rows, last, counts)
            if progress is not None:
                progress(last, len(problems), file.counts)
        return Summary(output, file.counts, time.monotonic() - began)


def _check_server(section: TeacherModelConfig, config: GenerateConfig) -> None:
    served = _on_server(section)
    if served is not None and served.api == "chat" and config.first_thought is not None:
        raise UserError(
            "--first-thought needs a writer that goes on with a text, and teacher.served.api=chat answers messages; "
            "set teacher.served.api=completions or tokens."
        )


def _settings(
    inputs: Inputs, config: GenerateConfig, section: TeacherModelConfig, sampling: Sampling
) -> dict[str, Any]:
    """What must be the same to go on with a file. The number of problems may grow; device, rows, server may change."""
    own = config.model_dump(mode="json", exclude={"problems", "temperature", "top_p", "top_k", "max_new_tokens"})
    where = {"served": set(ServedConfig.model_fields) - {"model", "api"}}
    return {
        "model": section.model_dump(mode="json", exclude=where),
        **own,
        **vars(sampling),
        "batch": batch_size(inputs, config),
        "task": inputs.task.model_dump(mode="json"),
        "order": inputs.seed,
    }


def batch_size(inputs: Inputs, config: GenerateConfig) -> int:
    """Problems that are written together, and the most that a kill loses."""
    return max(1, inputs.rollout.rows // config.samples)


def _batches(done: int, total: int, size: int) -> Iterator[tuple[int, int]]:
    """Pieces of [done, total) that end at multiples of `size`, wherever an earlier job stopped."""
    while done < total:
        last = min(total, done - done % size + size)
        yield done, last
        done = last


def distinct_problems(stream: ProblemStream, count: int | None, split: str) -> list[Problem]:
    """The first `count` problems of different text; raises UserError for an endless stream without a count."""
    if count is None and stream.size is None:
        raise UserError(f"the {split} problems of this task have no end; say how many with --problems.")
    found: dict[str, Problem] = {}
    index = misses = 0
    while (count is None or len(found) < count) and (stream.size is None or index < stream.size):
        problem = stream[index]
        index += 1
        misses = misses + 1 if problem.id in found else 0
        if misses > 1000 + len(found):
            break  # a generator that has no more texts
        found.setdefault(problem.id, problem)
    return list(found.values())


class _Maker:
    """Draws, scores and keeps the traces of a batch of problems."""

    def __init__(
        self,
        inputs: Inputs,
        config: GenerateConfig,
        section: TeacherModelConfig,
        sampling: Sampling,
        stack: ExitStack,
    ) -> None:
        self.config, self.sampling, self.batch = config, sampling, batch_size(inputs, config)
        self.name = section.model if isinstance(section.model, str) else "new model"
        self.notes: list[str] = []
        self.engine: Callable[[Sequence[Problem]], Engine]
        if isinstance(section, TeacherConfig) and section.served is not None:
            self._ask(section, inputs)
        else:
            self._load(section, inputs)
        self.thought = self._first_thought(inputs)
        self.task = build_task(inputs.task, inputs.seed, lambda p: len(encode_prompt(self.loaded, p.prompt)))
        self.pool = stack.enter_context(VerifierPool(inputs.task))

    def _load(self, section: TeacherModelConfig, inputs: Inputs) -> None:
        self.loaded = load_model(section, resolve_device(inputs.device), trainable=False, seed=inputs.seed)
        engine = TorchEngine(self.loaded, inputs.rollout.rows, filtered_ok=True)
        self.engine = lambda problems: engine
        context = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = context if isinstance(context, int) else None

    def _ask(self, section: TeacherConfig, inputs: Inputs) -> None:
        student = inputs.student
        named = student is not None and isinstance(student.model, str)
        self.loaded = reader_of(section, load_without_weights(student) if student is not None and named else None)
        teacher = open_served(section, self.loaded, 0)
        self.notes += writing_checks(teacher, self.loaded)
        self.engine = lambda problems: ServedEngine(teacher, self.loaded, problems)
        self.context = teacher.context

    def _first_thought(self, inputs: Inputs) -> FirstThought | None:
        if self.config.first_thought is None:
            return None
        device = resolve_device(inputs.device)
        named, amount = parse_first_thought(self.config.first_thought)
        loaded = load_model(inputs.model_section(named), device, trainable=False, seed=inputs.seed)
        return FirstThought(loaded, TorchEngine(loaded, inputs.rollout.rows, filtered_ok=True), amount)

    def problems(self) -> list[Problem]:
        """The problems of the job, each of which fits the writer's context with its response."""
        config = self.config
        found = distinct_problems(self.task.problems(config.split), config.problems, config.split)
        more = self.sampling.max_new_tokens + (self.thought.tokens if self.thought else 0)
        context = self.context
        longest = max(len(encode_prompt(self.loaded, problem.prompt)) for problem in found)
        if context is not None and longest + more > context:
            raise UserError(
                f"{self.name} reads at most {context} tokens, but a prompt of {longest} and a response of {more} make "
                f"{longest + more}; lower --max-new-tokens or set task.max_prompt_tokens."
            )
        return found

    def batch_of(self, problems: Sequence[Problem]) -> tuple[list[dict[str, Any]], Counts]:
        """The rows of a batch in the order of the problems, and what is counted of them."""
        config = self.config
        before = dict(self.pool.counts)
        traces: dict[str, list[Trace]] = {problem.id: [] for problem in problems}
        for number in range(config.tries):
            open_ones = [p for p in problems if number == 0 or not satisfied(traces[p.id], config.keep)]
            for trace in self._round(open_ones, number) if open_ones else []:
                traces[trace.problem.id].append(trace)
        kept = [t for found in traces.values() for t in keep_traces(found, config.keep, config.most, config.distinct)]
        drawn = [t for found in traces.values() for t in found]
        counts = {
            "problems": len(problems),
            "solved": sum(any(t.correct for t in found) for found in traces.values()),
            "drawn": len(drawn),
            "first": len(problems) * config.samples,
            "right": sum(t.correct for t in drawn if t.sample < config.samples),
            "tokens": sum(t.tokens for t in drawn),
            "cut": sum(not t.ended for t in drawn),
            "kept": len(kept),
        }
        counts |= {name: n - before[name] for name, n in self.pool.counts.items() if name != "ok"}
        return [trace.row(self.name, config.seed) for trace in kept], counts

    def _round(self, problems: Sequence[Problem], number: int) -> list[Trace]:
        seed = derive(self.config.seed, "generate", number)
        written = self._plain(problems, seed) if self.thought is None else self._led(self.thought, problems, seed)
        n, limit = self.config.samples, self.sampling.max_new_tokens
        drawn: list[tuple[Problem, int, str, int, bool, str | None]] = []
        items = []
        for i, (ids, sample, thought) in enumerate(written):
            problem = problems[i // n]
            text = str(self.loaded.tokenizer.decode(ids + sample.token_ids, skip_special_tokens=True))
            tokens = len(ids) + len(sample.token_ids)
            drawn.append((problem, number * n + i % n, text, tokens, sample.ended, thought))
            items.append((text, problem, ResponseInfo(tokens, not sample.ended, limit + len(ids))))
        return [
            Trace(problem, place, text, tokens, ended, verdict.reward, verdict.correct, thought)
            for (problem, place, text, tokens, ended, thought), verdict in zip(
                drawn, self.pool.score(items), strict=True
            )
        ]

    def _plain(self, problems: Sequence[Problem], seed: int) -> list[tuple[list[int], Sample, None]]:
        prompts = [encode_prompt(self.loaded, problem.prompt) for problem in problems]
        engine = self.engine(problems)
        written = engine.generate(prompts, samples=self.config.samples, seed=seed, **vars(self.sampling))
        return [([], sample, None) for samples in written for sample in samples]

    def _led(
        self, thought: FirstThought, problems: Sequence[Problem], seed: int
    ) -> list[tuple[list[int], Sample, str | None]]:
        """(prefix ids, what the writer added, prefix text) for every problem and sample."""
        texts = thought.write(problems, self.config.samples, seed, self.sampling.temperature)
        pairs = [(problem, text) for problem, group in zip(problems, texts, strict=True) for text in group]
        prefixes = [prefix_ids(self.loaded, text) for _, text in pairs]
        prompts = [
            encode_prompt(self.loaded, problem.prompt) + ids for (problem, _), ids in zip(pairs, prefixes, strict=True)
        ]
        written = self.engine(problems).generate(prompts, samples=1, seed=seed, **vars(self.sampling))
        return [(ids, sample, text) for ids, (sample,), (_, text) in zip(prefixes, written, pairs, strict=True)]
