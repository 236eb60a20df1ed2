"""`kdrl cache-teacher`: score the responses of a recipe's off-policy source once, and store the scores.

Left out: several processes at once, and a student's weights that are loaded only for its tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kdrl.batch import Response
from kdrl.build import Builder
from kdrl.errors import UserError
from kdrl.models import encode_prompt
from kdrl.pairing import check_gives
from kdrl.recipe import Recipe
from kdrl.sources import kinds
from kdrl.sources.base import Request, Source
from kdrl.sources.config import SourceSettings
from kdrl.sources.keep import Filtered
from kdrl.sources.traces import Take, TraceSource
from kdrl.tasks.base import ProblemStream
from kdrl.tasks.streams import check_split
from kdrl.teachers.base import Teacher
from kdrl.teachers.cache_checks import WRITE_FIRST, check_draws, fixed_text
from kdrl.teachers.cache_config import Stored
from kdrl.teachers.cache_store import key_of
from kdrl.teachers.cached import WritingTeacher, open_writing
from kdrl.teachers.checks import section_of
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.served_checks import check_top_k
from kdrl.vocab.checks import reads_own
from kdrl.vocab.teacher import VocabTeacher

Progress = Callable[[int, int], None]
"""(problems looked at, problems), after every shard."""
PROBLEMS_AT_ONCE = 64
SHARD_TOKENS = 16384


@dataclass(frozen=True)
class CacheSummary:
    """What a finished job did, and what the folder now holds."""

    responses: int
    tokens: int
    found: int
    seconds: float
    stored_tokens: int
    stored_bytes: int

    def lines(self) -> list[str]:
        """The summary in words."""
        rate = self.stored_bytes / max(1, self.stored_tokens)
        speed = self.tokens / max(1e-9, self.seconds)
        return [
            f"{self.responses} responses of {self.tokens} tokens scored in {self.seconds:.1f} s "
            f"({speed:.0f} tokens/s); {self.found} were stored already",
            f"the cache holds {self.stored_tokens} tokens in {self.stored_bytes:,} bytes: {rate:.1f} a token",
        ]


def cache_teacher(
    recipe: Recipe,
    output: Path,
    stored: Stored,
    *,
    teacher: str = "teacher",
    problems: int | None = None,
    split: str = "train",
    shard_tokens: int = SHARD_TOKENS,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> CacheSummary:
    """Score and store what `output` lacks of the recipe's fixed responses; a killed job goes on shard by shard.

    Raises UserError for a source that writes anew, a teacher that cannot give what is asked, and a foreign folder.
    """
    check_split(split)
    recipe = without_cache(recipe, teacher)
    with ExitStack() as stack:
        builder = Builder(recipe, output, stack)
        for note in builder.notes:
            say(f"note: {note}")
        source, stream = _source(builder, split)
        count = _count(stream, problems, split)
        writer = open_cache(builder, teacher, output, stored)
        stack.enter_context(writer.store)
        reader = builder.read_by(teacher, writer)
        for note in [*writer.store.notes, *_unread(builder, teacher, reader, stored)]:
            say(f"note: {note}")
        began, before, found = time.monotonic(), writer.store.tokens, 0
        batch: dict[bytes, Response] = {}
        scored = 0
        for done, written in _responses(source, stream, count):
            # As the teacher reads it: in tokens of its own where terms go by chunks.
            response = reader.as_read(written) if isinstance(reader, VocabTeacher) else written
            if response is None:
                continue
            key = key_of(response.prompt_ids, response.token_ids)
            if key in writer.store.places or key in batch:
                found += key not in batch
                continue
            batch[key] = response
            if sum(len(r.token_ids) for r in batch.values()) >= shard_tokens:
                scored += _flush(writer, batch, builder)
                if progress is not None:
                    progress(done, count)
        scored += _flush(writer, batch, builder)
        store = writer.store
        new = store.tokens - before
        return CacheSummary(scored, new, found, time.monotonic() - began, store.tokens, store.bytes)


def _unread(builder: Builder, name: str, reader: Teacher, stored: Stored) -> list[str]:
    """A note where the recipe's own terms could not be trained from what is stored."""
    try:
        check_gives(name, reader.gives, builder.objective, stored=True)
        check_draws(stored.settings().get("tau"), name, builder.objective)
    except UserError as error:
        return [f"this recipe could not be trained from the cache: {error}"]
    return []


def _flush(writer: WritingTeacher, batch: dict[bytes, Response], builder: Builder) -> int:
    count = len(batch)
    writer.put(batch, builder.device)
    batch.clear()
    return count


def without_cache(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the teacher itself in place of its cache; raises UserError when there is no such teacher."""
    section = recipe.teachers.get(name, recipe.teacher if name == "teacher" else None)
    if not isinstance(section, TeacherConfig):
        known = ", ".join(n for n, s in recipe.teachers.items() if isinstance(s, TeacherConfig))
        raise UserError(
            f"the recipe has no teacher called {name} that is a model; "
            + (f"it has {known}." if known else "add teacher.model=PATH_OR_ID.")
        )
    if section.prepare is not None:
        raise UserError("teacher.prepare changes what the teacher answers with every step; leave it out, or the cache.")
    plain = section.model_copy(update={"cache": None})
    if name in recipe.teachers:
        return recipe.model_copy(update={"teachers": {**recipe.teachers, name: plain}})
    return recipe.model_copy(update={"teacher": plain})


def open_cache(builder: Builder, name: str, folder: Path, stored: Stored) -> WritingTeacher:
    """The teacher of a builder, storing what it scores; raises UserError when no term asks for it."""
    recipe = builder.recipe
    members = builder.members()
    if name not in members:
        raise UserError(f"no term of the recipe asks {name}, so there is nothing to score; add a distill term.")
    if name in builder.served:
        asked = builder.served[name]
        asked.k = max(asked.k, stored.settings().get("k", 0))
        check_top_k(asked, encode_prompt(builder.reader(name), builder.stream[0].prompt))
    return open_writing(
        members[name],
        section_of(recipe, name),
        builder.models.get(name),
        builder.reader(name),
        folder,
        stored,
        temperature=recipe.rollout.temperature,
        seed=recipe.seed,
        own=reads_own(recipe, builder.objective, name),
    )


def _source(builder: Builder, split: str) -> tuple[Source, ProblemStream]:
    """Who gives the fixed responses, and the problems that training meets."""
    settings = builder.recipe.source.settings
    while isinstance(settings, Filtered):
        settings = settings.source.settings
    writers, traces = builder.writers, _traces(settings)
    if traces is None:
        if not fixed_text(settings):
            raise UserError(
                f"source {builder.recipe.source.kind} writes its responses during training, so there is nothing to "
                f"score beforehand: choose source gold, or {WRITE_FIRST}; or let the run store what it scores with "
                "teacher.cache={path: FOLDER, write: true}."
            )
        return writers.fixed("gold"), builder.stream if split == "train" else builder.task.problems(split)
    if split != "train":
        raise UserError(f"the traces are those of a file and have no split {split}; leave --split out.")
    path, take = traces
    source = TraceSource(writers.book(path), builder.student, writers.limit, take)
    return source, writers.book(path).stream(take, builder.recipe.seed)


def _traces(settings: SourceSettings) -> tuple[str, Take] | None:
    """File and choice of stored traces; a pair is any of them."""
    if isinstance(settings, kinds.Traces):
        return settings.path, "all" if settings.take == "pair" else settings.take
    if isinstance(settings, kinds.Guided) and settings.traces is not None:
        return settings.traces, "right"
    return None


def _count(stream: ProblemStream, asked: int | None, split: str) -> int:
    """Positions of the stream to go through."""
    if asked is None and stream.size is None:
        raise UserError(f"the {split} problems of this task have no end; say how many with --problems.")
    return stream.size or 0 if asked is None else asked


def _responses(source: Source, stream: ProblemStream, count: int) -> Iterator[tuple[int, Response]]:
    """(problems looked at, response) in the order that training first meets the problems."""
    for start in range(0, count, PROBLEMS_AT_ONCE):
        last = min(count, start + PROBLEMS_AT_ONCE)
        found = [stream[position] for position in range(start, last)]
        for response in source.write(Request.of(found, start)):
            if response.token_ids:
                yield last, response
