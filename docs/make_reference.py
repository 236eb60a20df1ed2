"""Write docs/recipe-keys.md and docs/methods.md from the code; with --check, say which of them is out of date."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdrl.methods import all_methods, axes, expanded
from kdrl.objectives.adaptive import ADAPTIVE
from kdrl.objectives.blocks import BLOCK_LOSSES
from kdrl.objectives.masks import MASKS
from kdrl.objectives.policy import NAMED_ADVANTAGES
from kdrl.objectives.schedules import SCHEDULES
from kdrl.objectives.scores import SCORES
from kdrl.objectives.terms import TERMS, TermConfig
from kdrl.recipe import describe_combinations, describe_fields
from kdrl.registry import Registry
from kdrl.sources import SOURCES
from kdrl.sources.scores import RESPONSE_SCORES
from kdrl.tasks.solutions import WRITERS
from kdrl.tasks.verifiers import VERIFIERS
from kdrl.teachers.cache_config import CacheConfig
from kdrl.teachers.prepare import PREPARATIONS

FOLDER = Path(__file__).parent
MADE = "<!-- Made by docs/make_reference.py; edit the docstrings in kdrl/ and run it again. -->\n"

AXES = """\
## All methods by axis

A dot is the default: same vocabulary, all entries, no transform, no weight, nothing that moves. `p||q` is KL(p||q),
with two numbers the alpha-beta divergence; `M(a, s)` is the power mean of p (share s) and q, `r` an assistant, a dagger
says that it is data; `-log q` is likelihood, `reward` a policy gradient; brackets hold a gate. A method with several
terms has them joined by plus signs. `kdrl methods --axes` prints the same.
"""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    """Inline code, nothing for nothing."""
    return f"`{text}`" if text else ""


def keys(rows: Iterable[tuple[str, str, str]]) -> str:
    """A table of recipe keys."""
    return table(("key", "default", "meaning"), ((code(k), code(default), text) for k, default, text in rows))


def settings(function: Callable[..., Any], skip: int) -> str:
    """The keyword arguments of a registered function, as a recipe names them."""
    parts = []
    for p in list(inspect.signature(function).parameters.values())[skip:]:
        name = "from" if p.kind is p.VAR_KEYWORD else p.name
        parts.append(name if p.default is p.empty else f"{name}={p.default}")
    return code(", ".join(parts))


def summary(thing: Any) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def recipe_keys() -> str:
    """Every key of a recipe, section by section, and every name that can stand in one."""
    top, sections = [], {}
    rows = describe_fields()
    parents = {key.split(".")[0] for key, _, _ in rows if "." in key}
    for row in rows:
        home = row[0].split(".")[0]
        if home in parents:
            sections.setdefault(home, []).append(row)
        else:
            top.append(row)
    parts = [MADE, "# Recipe keys\n", "How a recipe is written is in [recipe.md](recipe.md).\n", keys(top)]
    for home, found in sections.items():
        rest = found[1:]
        if home == "teacher":
            shared = {row[0].removeprefix("student.") for row in sections["student"]}
            rest = [row for row in rest if row[0].removeprefix("teacher.") not in shared]
            rest += describe_fields(CacheConfig, "teacher.cache.")
            found[0] = (
                *found[0][:2],
                f"{found[0][2]} Its keys are those of `student`, without `lora` and what follows it.",
            )
        parts += [f"## {home}\n", found[0][2] + "\n", *([keys(rest)] if rest else [])]
        if home == "teacher":
            told = "Each of `teachers` has the keys of `teacher`, or (as `teacher` may too) is made of others:\n"
            parts += ["### teachers\n", told, keys(describe_combinations())]
    parts += ["## Sources\n", "Values of `source`; overrides reach them as `source.NAME.KEY`.\n"]
    for name in SOURCES:
        own = describe_fields(SOURCES.get(name))
        parts += [f"### {name}\n", summary(SOURCES.get(name)) + "\n", *([keys(own)] if own else [])]
    scores = ((code(n), summary(RESPONSE_SCORES.get(n))) for n in RESPONSE_SCORES)
    parts += ["### Scores of responses\n", "What a filter can name.\n", table(("name", "value"), scores)]
    parts += ["## Objective terms\n", "Entries of `objective`; overrides reach them as `objective.NAME.KEY`.\n"]
    shared = describe_fields(TermConfig)
    parts += ["### every term\n", keys(shared)]
    for name in TERMS:
        own = [row for row in describe_fields(TERMS.get(name).Config) if row not in shared]
        parts += [f"### {name}\n", summary(TERMS.get(name)) + "\n", *([keys(own)] if own else [])]
    return "\n".join([*parts, *names()])


def parts_of(registry: Registry[type[Any]]) -> list[str]:
    """A heading, a summary and the keys of every section in a registry."""
    found = []
    for name in registry:
        found += [f"#### {name}\n", summary(registry.get(name)) + "\n", keys(describe_fields(registry.get(name)))]
    return found


def score_settings(name: str) -> str:
    """The settings of a score; one over the whole step has `of` besides."""
    kind = SCORES.get(name)
    own = settings(kind.function, 2 if kind.reads in ("entries", "batch") else 1)
    return code(", ".join(filter(None, ["of", own.strip("`")]))) if kind.reads == "batch" else own


def names() -> list[str]:
    """The registries: what can be named in a recipe."""
    schedules = ((code(n), settings(SCHEDULES.get(n), 2), summary(SCHEDULES.get(n))) for n in SCHEDULES)
    masks = ((code(n), settings(MASKS.get(n).function, 1), summary(MASKS.get(n).function)) for n in MASKS)
    advantages = ((code(n), spec["baseline"], spec["scale"]) for n, spec in NAMED_ADVANTAGES.items())
    # The reasoning_gym verifier is given the task's own settings.
    own = {n: "" if n == "reasoning_gym" else settings(VERIFIERS.get(n), 2) for n in VERIFIERS}
    verifiers = ((code(n), text, summary(VERIFIERS.get(n))) for n, text in own.items())
    preparations = [
        part
        for n in PREPARATIONS
        for part in (
            f"### {n}\n",
            summary(PREPARATIONS.get(n)) + "\n",
            keys(describe_fields(PREPARATIONS.get(n).Config)),
        )
    ]
    writers = ((code(n), summary(WRITERS.get(n))) for n in WRITERS)
    scores = ((code(n), score_settings(n), SCORES.get(n).reads, summary(SCORES.get(n).function)) for n in SCORES)
    blocks = ((code(n), settings(BLOCK_LOSSES.get(n), 2), summary(BLOCK_LOSSES.get(n))) for n in BLOCK_LOSSES)
    return [
        "## Schedules\n",
        table(("name", "settings", "meaning"), schedules),
        "### Schedules with a memory\n",
        "They follow a metric of the run and are saved with every checkpoint.\n",
        *parts_of(ADAPTIVE),
        "## Scores\n",
        "p is the teacher, q the student, y the response's token; `of`, `where` and `by` are again scores.\n",
        table(("name", "settings", "reads", "value"), scores),
        "## Masks\n",
        table(("name", "settings", "what it keeps"), masks),
        "## Block losses\n",
        table(("name", "settings", "loss"), blocks),
        "## Advantages\n",
        table(("name", "baseline", "scale"), advantages),
        "## Preparations of the teacher\n",
        "Entries of `teacher.prepare`; overrides reach them as `teacher.prepare.NAME.KEY`.\n",
        *preparations,
        "## Verifiers\n",
        table(("name", "settings", "right when"), verifiers),
        "## Worked solutions\n",
        table(("name", "what it writes"), writers),
    ]


def methods() -> str:
    """Every published method: formula, recipe, citation, what is not known."""
    notation = (
        "`p` is the teacher, `q` the student, `q_old` the student that wrote the rollouts, `y_t` the sampled token,\n"
        "`s_t` what stands before it, `A` the advantage, `R_t = log p(y_t | s_t) - log q(y_t | s_t)`, `sg` without\n"
        "gradient, `z` logits, `H` the entropy, `e_y` all mass on `y`, `p_rest` p without `y` renormalised,\n"
        "`J_b = b KL(p || m) + (1-b) KL(q || m)` with `m = b p + (1-b) q`, `D_ab` the divergence of `abkd`.\n"
        "`kdrl methods NAME` prints one of them.\n"
    )
    head, *rows = axes.table()
    links = ((f"[{row[0]}](#{row[0]})", *(code(cell) if cell != "·" else cell for cell in row[1:])) for row in rows)
    parts = [MADE, "# Methods\n", notation, AXES, table(head, links)]
    for method in all_methods().values():
        parts += [
            f"## {method.name}\n",
            f"{method.title[0].upper()}{method.title[1:]}. {method.citation}.\n",
            f"```text\n{method.formula.rstrip()}\n```\n",
            f"```yaml\n{expanded(method)}\n```\n",
            f"Defaults: {' '.join(method.defaults.split())}\n",
            f"Not known, or different here: {' '.join(method.unknown.split())}\n",
        ]
    return "\n".join([*parts, (FOLDER / "traps.md").read_text(encoding="utf-8")])


def main() -> int:
    """Write the files, or with --check compare them."""
    stale = []
    for name, text in (("recipe-keys.md", recipe_keys()), ("methods.md", methods())):
        path = FOLDER / name
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"out of date: {', '.join(stale)}; run python docs/make_reference.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
