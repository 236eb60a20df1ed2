"""`kdrl bench`: its options and what it prints. Heavy imports happen when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kdrl.errors import UserError
from kdrl.yamls import read_recipe

HELP = """Measure a recipe on this machine: a few steps in a folder that is thrown away.

Seconds and response tokens a second of writing, verifying, teacher and update, with their spread and share of the step;
operations a second of the update against a large matrix product on the same device (and against the data sheet of a
known GPU); the peak of memory beside the plan. A step goes before that is not counted. Evaluation, checkpoints and
trackers are left out, and a teacher's cache is not written to.

--parts also measures, in turns, the engine against transformers' `generate` and the chunked head against full logits,
at the recipe's own sizes.

\b
Examples:
  kdrl bench recipes/demo.yaml
  kdrl bench recipes/kdrl.yaml student.model=PATH teacher.model=PATH task.path=data.jsonl --steps 10 --parts
  kdrl bench runs/first student.autocast=bfloat16 --json bfloat16.json
"""

_console = Console(highlight=False, soft_wrap=True)


def bench_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML), or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `kdrl train`.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are counted.")] = 5,
    parts: Annotated[bool, typer.Option("--parts", help="Also engine and head against the plain way.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured here too.")] = None,
) -> None:
    """Options of `kdrl bench`; the text of its --help is HELP."""
    if steps < 1:
        raise UserError(f"--steps is {steps}; at least one step must be counted.")
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}.")
    if "=" in str(recipe) and not recipe.exists():
        raise UserError(f"{str(recipe)!r} looks like an override; the recipe file comes first.")
    read_recipe(recipe)  # before imports that take seconds
    from kdrl.bench.machine import write_results
    from kdrl.bench.recipe import measure_recipe, phase_table, sentences
    from kdrl.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    result = measure_recipe(resolved, steps)
    _console.print(phase_table(result))
    for line in sentences(result):
        _console.print(line, markup=False)
    if parts:
        from kdrl.bench.parts import measure_parts, part_lines

        result["parts"] = measure_parts(resolved)
        for line in part_lines(result["parts"]):
            _console.print(line, markup=False)
    if json_file is not None:
        write_results(json_file, result)
        _console.print(f"json: {json_file}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("bench", help=HELP)(bench_command)
