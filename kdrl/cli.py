"""The command line: exit status 0 for success, 2 for a mistake that the user can mend, 1 otherwise."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from kdrl.bench.command import register as register_bench
from kdrl.data.cache_teacher import register as register_cache
from kdrl.data.commands import register
from kdrl.errors import UserError
from kdrl.serving import register as register_serving
from kdrl.yamls import read_recipe

app = typer.Typer(
    name="kdrl",
    help="Post-train reasoning language models by unified knowledge distillation and reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)


def _say(text: Any) -> None:
    console.print(text, markup=False)


class _TrainCommand(TyperCommand):
    """`kdrl train --help` goes on with every recipe key, its default and its documentation."""

    def get_help(self, ctx: Any) -> str:
        from kdrl.recipe import (
            describe_combinations,
            describe_fields,
            describe_preparations,
            describe_sources,
            describe_terms,
        )

        lines = [super().get_help(ctx), "", "Recipe keys (in the YAML file, or as key=value):"]
        rows = (
            describe_fields()
            + describe_combinations()
            + describe_sources()
            + describe_terms()
            + describe_preparations()
        )
        for name, default, text in rows:
            lines.append(f"  {name}" + (f" [{default}]" if default else ""))
            lines.append(f"      {text}")
        return "\n".join(lines)


def _version(asked: bool) -> None:
    if asked:
        from kdrl import __version__

        _say(f"kdrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Post-train reasoning language models by unified knowledge distillation and reinforcement learning."""


@app.command(cls=_TrainCommand)
def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML), or the folder of a run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. steps=50 student.model=PATH.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; new or empty. Default: runs/RECIPE.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, exactly.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print resolved recipe, expanded method and memory plan; run nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the memory plan does not fit.")] = False,
) -> None:
    """Train a student by a recipe."""
    if resume is not None:
        if recipe is not None or overrides or output is not None or dry_run:
            raise UserError("--resume takes no recipe, override or other option: a run goes on as it was started.")
        from kdrl.run import resume as resume_run

        resume_run(resume, say=_say, force=force)
        return
    if recipe is None:
        raise UserError("give a recipe, as in `kdrl train recipes/kdrl.yaml student.model=PATH`, or --resume RUN.")
    if "=" in str(recipe) and not recipe.exists():
        raise UserError(f"{str(recipe)!r} looks like an override; the recipe file comes first.")
    read_recipe(recipe)  # before imports that take seconds
    if dry_run:
        if output is not None:
            from kdrl.run import check_output

            check_output(output)
        _dry_run(recipe, overrides or [])
        return
    from kdrl.run import train as train_run

    train_run(recipe, overrides or [], output=output, say=_say, force=force)


def _dry_run(recipe: Path, overrides: list[str]) -> None:
    from kdrl.explain import explain_objective
    from kdrl.planning import memory_plan
    from kdrl.recipe import load_recipe
    from kdrl.tasks import build_task
    from kdrl.teachers.checks import check_named_models

    resolved = load_recipe(recipe, overrides)
    check_named_models(resolved)
    build_task(resolved.task, resolved.seed, lambda problem: 0)
    console.print(resolved.to_yaml(), markup=False)
    console.print(explain_objective(resolved), markup=False)
    console.print(memory_plan(resolved).table())


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.")],
    task: Annotated[Path, typer.Option(help="Recipe whose task and prompts are used.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write result and every response here.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Second model, or an earlier --json file: paired bootstrap of the difference.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, development or test. Default: test.")] = None,
    problems: Annotated[int | None, typer.Option(help="How many problems of the split.")] = None,
    samples: Annotated[int | None, typer.Option(help="Responses per problem.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; 1 keeps all.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Likeliest k tokens; 0 keeps all.")] = None,
    k: Annotated[list[int] | None, typer.Option("--k", help="Report pass@k and majority@k; repeatable.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a response.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Evaluate a model on a recipe's held-out problems: avg@n, pass@k, majority@k, tokens, truncation."""
    read_recipe(task)  # before imports that take seconds
    from kdrl.evaluation import EvaluationResult, compare, evaluate, results_table

    given = {
        "split": split,
        "problems": problems,
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "k": k or None,
        "max_new_tokens": max_new_tokens,
    }
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}.")

    def run(name: str) -> EvaluationResult:
        return evaluate(name, task, device=device, seed=seed, **given)

    results = [run(model)]
    if against is not None:
        earlier = Path(against)
        results.append(EvaluationResult.load(earlier) if earlier.suffix == ".json" else run(against))
    console.print(results_table(results))
    if len(results) == 2:
        _say(compare(results[1], results[0]).sentence())
    if json_file is not None:
        results[0].save(json_file)
        _say(f"json: {json_file}")


DOCTOR_HELP = """Examine a recipe before training: one line a check, each ok, note or wrong, with what to do.

First everything that `kdrl train` would refuse: tokenizers by content, end and padding ids, chat templates, vocabulary
rows, context length, what each teacher gives, splits, memory; and whether the verifier scores right answers right and
empty ones wrong. Then, unless something is wrong, a small step is written and scored, and nothing is trained: accuracy
of student and teachers, their overlap and log-ratios, entropies, every term's gradient norm and what the seconds of a
step are made of. Exit status 0 when nothing is wrong, 2 otherwise.

\b
Examples:
  kdrl doctor recipes/demo.yaml
  kdrl doctor recipes/kdrl.yaml student.model=PATH teacher.model=PATH task.path=data.jsonl --problems 32
"""


@app.command(help=DOCTOR_HELP)
def doctor(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML), or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `kdrl train`.")] = None,
    problems: Annotated[
        int, typer.Option(min=1, help="Problems that the verifier and the models' accuracy are tried on.")
    ] = 16,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the step that is tried.")] = 4,
    group: Annotated[int, typer.Option(min=1, help="Responses to each, where the student alone writes.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings here too.")] = None,
) -> None:
    """Options of `kdrl doctor`; the text of its --help is DOCTOR_HELP."""
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}.")
    from kdrl.doctor import Effort, examine, to_json

    findings = examine(recipe, overrides or [], effort=Effort(problems, prompts, group), say=lambda f: _say(str(f)))
    if json_file is not None:
        json_file.write_text(to_json(findings), encoding="utf-8")
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("ok", "note", "wrong")}
    _say("; ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["wrong"]:
        raise typer.Exit(2)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method.")] = None,
    axes: Annotated[
        bool, typer.Option("--axes", help="Every method's place on the seven axes, as a wide table.")
    ] = False,
) -> None:
    """List the published methods, or show one: formula, recipe, citation, what is not known."""
    from kdrl.methods import all_methods, expanded, get_method

    if axes:
        from kdrl.methods.axes import axes_of, table

        lines = table() if name is None else [table()[0], (name, *axes_of(name).cells())]
        console.print("\n".join(" | ".join(line) for line in lines), markup=False)
        return
    if name is None:
        width = max(map(len, all_methods()))
        for method in all_methods().values():
            console.print(f"{method.name:<{width}}  {method.title}", markup=False)
        console.print(
            "\n`kdrl methods NAME` shows formula, recipe, citation and what is not known, --axes the table.",
            markup=False,
        )
        return
    method = get_method(name)
    parts = [f"{method.name}: {method.title}", f"citation: {method.citation}", f"formula:\n{_indent(method.formula)}"]
    parts += [f"recipe:\n{_indent(expanded(method))}", f"defaults: {method.defaults}", f"unknown: {method.unknown}"]
    console.print("\n".join(parts), markup=False)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of a comparison. Default: that which holds the runs.")
    ] = None,
) -> None:
    """Write report.html of a run, or compare several in one table."""
    from kdrl.report import report_run, report_runs

    if len(runs) == 1:
        if output is not None:
            raise UserError("--output is for comparing several runs; one run's report lies in its own folder.")
        console.print(f"report: {report_run(runs[0])}", markup=False)
        return
    table, path = report_runs(runs, output or runs[0].parent)
    console.print(table)
    console.print(f"report: {path}", markup=False)


register(app)
register_cache(app)
register_serving(app)
register_bench(app)


def _fail(text: str, status: int) -> None:
    print(f"kdrl: {text}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Run the command line and turn errors into sentences and exit statuses."""
    logging.basicConfig(format="kdrl: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(standalone_mode=True)
    except UserError as error:
        _fail(str(error), 2)
    except SystemExit as end:
        # typer's own answer to a Ctrl-C that nothing else caught
        if end.code == 130:
            _fail("stopped.", 1)
        raise
    except Exception as error:
        if type(error).__name__ in ("RunError", "InterruptedRunError"):
            _fail(str(error), 1)
        raise
