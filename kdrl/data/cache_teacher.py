"""`kdrl cache-teacher`: its options and what it prints. Heavy imports happen when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdrl.data.commands import Bar, say, stoppable

HELP = """Score the responses of a recipe's off-policy source with its teacher once, and store the scores.

What is scored: the text that is there before training, of source gold (and of mixture, buffer, corrupt and pair with
gold), traces, and guided with traces. Text that the teacher is yet to write: `kdrl generate` first, then source traces.

\b
--kind   stored beside the log-prob of each token                       read by
topk     the k likeliest tokens, 8-bit log-probs, the mass of the rest  support {topk: up to k}, {token: ...}
draws    n draws from p^tau, unbiased (RS-KD, arXiv 2503.16870)         forward_kl with {draws: n}, {token: ...}
hidden   last hidden states (2 bytes a number), the head once           everything that a local teacher serves

Then train with teacher.cache=FOLDER: no teacher is loaded. The folder is found by token ids, so prompts, chat template
and rollout.max_new_tokens must be the run's. The same command goes on after a kill and adds what is missing; every
shard is compared with its SHA-256 when it is read.

\b
Examples:
  kdrl cache-teacher recipes/mine.yaml --output scores --kind topk --k 64
  kdrl train recipes/mine.yaml teacher.cache=scores
  kdrl cache-teacher recipes/mine.yaml source='{traces: traces.jsonl}' --output draws --kind draws --draws 12
"""


def cache_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML), or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the cache: new, or one to add to.")] = ...,  # type: ignore[assignment]
    kind: Annotated[str, typer.Option(help="topk, draws or hidden.")] = "topk",
    k: Annotated[int | None, typer.Option("--k", help="topk: how many tokens. Default: 64.")] = None,
    draws: Annotated[int | None, typer.Option(help="draws: how many a token. Default: 12.")] = None,
    tau: Annotated[float | None, typer.Option(help="draws: from p^tau, re-weighted to p. Default: 1.")] = None,
    problems: Annotated[
        int | None, typer.Option(help="How many problems of the training order; default: all of a finite task.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, development or test.")] = "train",
    teacher: Annotated[str, typer.Option(help="Which of the recipe's teachers.")] = "teacher",
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens scored before they are written: the most that a kill loses.", min=1)
    ] = 16384,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: the recipe's.")] = None,
) -> None:
    """Options of `kdrl cache-teacher`; the text of its --help is HELP."""
    from kdrl.data.inputs import checked_options
    from kdrl.recipe import load_recipe
    from kdrl.teachers.cache_command import cache_teacher
    from kdrl.teachers.cache_config import Stored

    stored = checked_options(Stored, {"kind": kind, "k": k, "draws": draws, "tau": tau})
    resolved = load_recipe(recipe, [*(overrides or []), *([] if device is None else [f"device={device}"])])

    def job(bar: Bar) -> Any:
        more: dict[str, Any] = {"teacher": teacher, "problems": problems, "split": split, "shard_tokens": shard_tokens}
        return cache_teacher(resolved, output, stored, **more, say=say, progress=bar)

    summary = stoppable("problems", job, f"what is written to {output} is whole; the same command goes on from there")
    for line in summary.lines():
        say(line)
    say(f"cache: {output}")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("cache-teacher", help=HELP)(cache_command)
