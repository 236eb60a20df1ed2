"""`kdrl generate` and `kdrl select`: their options and what they print. Heavy imports happen when a command runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdrl.errors import UserError

console = Console(highlight=False, soft_wrap=True)
_PLAIN_EVERY_S = 10.0

GENERATE_HELP = """Write a model's traces to problems, each scored by the task's verifier, one JSON object a line.

RECIPE is a recipe (YAML, or the folder of a run), a YAML file with only `task` (and `teacher`, `student`, `rollout`),
or a data file. The recipe's teacher writes, here or on its server (teacher.served), or the model that --model or
--writer names: a teacher tuned on the task first (Mentor-KD, arXiv 2410.09037) is just --model runs/mentor/final.

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
    inputs = _on_device(open_inputs(recipe, overrides or []), device)

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


SELECT_HELP = """Keep or weigh the rows of a data set by a score, and say what was kept.

DATA is a data file (.jsonl, .json, .csv, .parquet), a `datasets` folder, or a recipe or task file whose task names one.
Rows need prompt and answer; what is scored is `response` (as `kdrl generate` writes it) or `solution`, or the column
that task.columns.solution names. Rows keep their order and columns. Rows that task.holdout keeps from training are
written unscored, so that the splits stay as they are.

\b
--by         keeps                                                          needs
difference   the rows with the largest (or --reverse: smallest) reference   --keep, teacher, reference
             loss minus teacher loss (MiniPLM, 2410.17215)
ddk          all, with a column `weight`; or with --keep a resampled set    --domain, teacher, reference
             whose domains have shares alpha softmax(PPL_S/PPL_T) +
             (1 - alpha)/N (DDK, 2407.16154)
success      prompts whose share of right traces is within --low, --high    --low or --high
perplexity   the least perplexing rows, or those within the bounds          --keep, or --low, --high
length       the shortest rows in tokens, or those within the bounds        --keep, or --low, --high
diversity    the farthest-apart traces of each prompt or of all rows:       --per-prompt or --keep
             greedy k-center, edit distance over words (DED, 2508.09883)
coverage     rows whose first-token probabilities under the teacher cover    --keep, teacher
             those of all: greedy k-center (PCoreSet, 2506.00910)
ngram        rows drawn by hashed n-gram importance (DSIR, 2302.03169)      --target, --keep

Teacher and reference are the recipe's teacher and student where --teacher and --reference do not name others. Losses
are nats over the response's text, without the end token; difference and ddk divide both models' by the tokens of the
teacher's tokenizer, so the two tokenizers may differ; perplexity is per token of its own model.

\b
Examples:
  kdrl select data.jsonl --by difference --keep 0.5 --teacher BIG --reference SMALL --output half.jsonl
  kdrl select data.jsonl --by success --traces student.jsonl --high 0.9 --output unsolved.jsonl
  kdrl select traces.jsonl --by diversity --per-prompt 2 --output apart.jsonl
  kdrl select recipes/mine.yaml --by ddk --domain subject --output weighted.jsonl
      and then: kdrl train ... task.path=weighted.jsonl task.columns.weight=weight
"""


def select_command(
    data: Annotated[Path, typer.Argument(help="Data file or folder, recipe, or task file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. task.columns.solution=text.")] = None,
    output: Annotated[Path, typer.Option(help="New file: .jsonl, .json, .csv or .parquet.")] = ...,  # type: ignore[assignment]
    by: Annotated[str, typer.Option(help="The selector; see above.")] = ...,  # type: ignore[assignment]
    keep: Annotated[str | None, typer.Option(help="A share (0.5) or a number (1000) of rows.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Keep the other end of the scores.")] = False,
    low: Annotated[float | None, typer.Option(help="Least score kept: success, perplexity, length.")] = None,
    high: Annotated[float | None, typer.Option(help="Largest score kept.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder, GGUF file or hub id. Default: the recipe's.")] = None,
    reference: Annotated[str | None, typer.Option(help="The small model. Default: the recipe's student.")] = None,
    of: Annotated[str, typer.Option(help="perplexity: of teacher or reference.")] = "teacher",
    traces: Annotated[
        str | None, typer.Option(help="success: file of `kdrl generate --keep all`. Default: DATA itself.")
    ] = None,
    per_prompt: Annotated[int | None, typer.Option(help="diversity: traces kept of each prompt.")] = None,
    domain: Annotated[str, typer.Option(help="ddk: column that names the domain.")] = "domain",
    alpha: Annotated[float, typer.Option(help="ddk: smoothing; 0 gives equal shares.")] = 0.5,
    probe: Annotated[int, typer.Option(help="ddk: rows scored per domain.")] = 500,
    target: Annotated[str | None, typer.Option(help="ngram: data file that the kept rows should resemble.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Add the scores as columns.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn: ddk, ngram.")] = 0,
) -> None:
    """Options of `kdrl select`; the text of its --help is SELECT_HELP."""
    given = {k: v for k, v in locals().items() if k in _SELECT_OPTIONS}
    from kdrl.data.choosing import SelectConfig, parse_keep
    from kdrl.data.inputs import checked_options, open_inputs
    from kdrl.data.report import numbers, sentence, tables
    from kdrl.data.select import select

    config = checked_options(SelectConfig, {**given, "keep": parse_keep(keep)})
    inputs = _on_device(open_inputs(data, overrides or []), device)
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}.")

    def job(bar: Bar) -> Any:
        def show(what: str, done: int, total: int) -> None:
            bar(done, total, what)

        return select(inputs, config, output, teacher=teacher, reference=reference, progress=show)

    selection = stoppable("scoring", job, "nothing is written")
    for table in tables(selection):
        console.print(table)
    for note in selection.choice.notes:
        say(f"note: {note}")
    say(sentence(selection))
    if selection.choice.weights is not None:
        say("train with task.columns.weight=weight, so that problems are met in proportion to it")
    if json_file is not None:
        json_file.write_text(json.dumps(numbers(selection), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


_SELECT_OPTIONS = {
    *("by", "reverse", "low", "high", "of", "traces", "per_prompt", "domain", "alpha", "probe", "target", "scores"),
    "seed",
}


def _on_device(inputs: Any, device: str | None) -> Any:
    return inputs if device is None else inputs.model_copy(update={"device": device})


def register(app: typer.Typer) -> None:
    """Add both commands to the program."""
    app.command("generate", help=GENERATE_HELP)(generate_command)
    app.command("select", help=SELECT_HELP)(select_command)
