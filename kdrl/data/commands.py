"""`kdrl generate` and `kdrl select`: their options and what they print. Heavy imports happen when a command runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
_PLAIN_EVERY_S = 10.0

GENERATE_HELP = """Write a model's traces to problems, each scored by the task's verifier, one JSON object a line.

RECIPE is a recipe (YAML, or the folder of a run), a YAML file with only `task` (and `teacher`, `student`, `rollout`),
or a data file. The recipe's teacher writes, or the model that --model or --writer names: a teacher tuned on the task
first (Mentor-KD, arXiv 2410.09037) is just --model runs/mentor/final.

A line holds id, prompt, answer, response, reward, correct, tokens, ended, sample, seed, model. Train on it with
task.path=FILE and source gold: of a line that is correct the response is the worked solution.

The file grows batch by batch; after a kill or Ctrl-C the same command goes on and ends with the same bytes. More
--problems later add to it. FILE.state.json beside it holds the settings.

Kept traces (--keep): all; right (rejection sampling; with --tries, problems without one are drawn again); wrong;
best (one a problem: highest reward, then fewest tokens); pair (for problems that have both, the best right one and a
wrong one, for contrastive objectives such as REDI, arXiv 2505.24850).

\b
Examples:
  kdrl generate recipes/demo.yaml --problems 1000 --samples 4 --keep right --output traces.jsonl
  kdrl generate data.jsonl task.verifier=numeric --model PATH --samples 8 --keep pair --output pairs.jsonl
  kdrl generate recipes/demo.yaml --writer student --problems 1000 --samples 8 --output student.jsonl
"""


class Bar:
    """Progress of a job: a bar on a terminal, else a line every ten seconds. A context manager."""

    def __init__(self, what: str) -> None:
        self.what = what
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`; `note` stands behind it."""
        text = f"{self.what}{f' ({note})' if note else ''}"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(text, total=total)
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif time.monotonic() - self._said >= _PLAIN_EVERY_S:
            self._said = time.monotonic()
            say(f"{done}/{total} {text}")


def say(text: Any) -> None:
    """Print without markup."""
    console.print(text, markup=False)


def generate_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, task file (YAML), folder of a run, or data file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe, e.g. task.limit=100.")] = None,
    output: Annotated[Path, typer.Option(help="JSON lines file to write, or to go on with.")] = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option(help="Who writes: folder, GGUF file or hub id.")] = None,
    writer: Annotated[str | None, typer.Option(help="teacher (default) or student of the recipe.")] = None,
    split: Annotated[str, typer.Option(help="train, development or test.")] = "train",
    problems: Annotated[int | None, typer.Option(help="How many problems; default: all of a finite split.")] = None,
    samples: Annotated[int, typer.Option(help="Traces drawn per problem and try.")] = 1,
    keep: Annotated[str, typer.Option(help="all, right, wrong, best or pair.")] = "all",
    most: Annotated[int | None, typer.Option(help="Keep at most so many right or wrong ones, best first.")] = None,
    distinct: Annotated[bool, typer.Option("--distinct", help="Leave out a problem's repeated texts.")] = False,
    tries: Annotated[int, typer.Option(help="Rounds of --samples for problems that lack what --keep asks for.")] = 1,
    first_thought: Annotated[
        str | None,
        typer.Option(
            help="MODEL/N, MODEL/line or MODEL/sentence: another model begins each response with its first N tokens, "
            "first line or first sentence (arXiv 2505.17612)."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the recipe's; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; 1 keeps all.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Likeliest k tokens; 0 keeps all.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of what is written. Default: the recipe's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Options of `kdrl generate`; the text of its --help is GENERATE_HELP."""
    given = {k: v for k, v in locals().items() if k in _GENERATE_OPTIONS}
    from kdrl.data.generate import GenerateConfig, generate
    from kdrl.data.inputs import checked_options, open_inputs

    config = checked_options(GenerateConfig, given)
    inputs = open_inputs(recipe, overrides or [])
    if device is not None:
        inputs = inputs.model_copy(update={"device": device})

    def job(bar: Bar) -> Any:
        def show(done: int, total: int, counts: dict[str, int]) -> None:
            bar(done, total, f"accuracy {counts['right'] / max(1, counts['first']):.2f}, {counts['kept']} kept")

        return generate(inputs, config, output, model=model, writer=writer, say=say, progress=show)

    summary = stoppable("problems", job, f"what is written to {output} is whole; the same command goes on from there")
    for line in summary.lines():
        say(line)
    say(f"traces: {output}")


_GENERATE_OPTIONS = {
    *("split", "problems", "samples", "keep", "most", "distinct", "tries", "first_thought", "temperature"),
    *("top_p", "top_k", "max_new_tokens", "seed"),
}


def stoppable(what: str, job: Callable[[Bar], Any], after: str) -> Any:
    """Run a job under a bar; a Ctrl-C becomes a sentence that ends with `after`, exit status 1."""
    try:
        with Bar(what) as bar:
            return job(bar)
    except KeyboardInterrupt:
        print(f"kdrl: stopped; {after}.", file=sys.stderr)
        raise typer.Exit(1) from None


def register(app: typer.Typer) -> None:
    """Add both commands to the program."""
    app.command("generate", help=GENERATE_HELP)(generate_command)
