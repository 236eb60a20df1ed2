"""The page of one run: headline numbers, curves, sample rollouts, recipe and versions, in one file of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from kdrl.errors import UserError
from kdrl.report.folder import Run, read_run
from kdrl.report.svg import Level, Series, chart_css, line_chart, short
from kdrl.results import NO_RIGHT_ANSWER, EvaluationResult
from kdrl.watch import clock

# Title, keys, words under the title. A key that ends in / stands for all metrics that start with it.
_CHARTS: list[tuple[str, list[str], str]] = [
    ("Accuracy on development problems", ["eval/accuracy"], "of the responses, at each evaluation"),
    ("Reward", ["reward"], "mean over the step's responses"),
    ("Accuracy in training", ["accuracy"], "share of the step's responses that the verifier accepts"),
    ("KL to the teacher", ["kl_teacher"], "per token of the student's own responses, in nats"),
    ("Log-ratio R", ["log_ratio_mean"], "mean of log teacher − log student per sampled token"),
    ("R beyond the clamp", ["log_ratio_beyond_clamp"], "share of tokens whose coefficient is clamped"),
    ("Entropy", ["entropy"], "of the student per token, in nats"),
    ("Response length", ["tokens", "eval/tokens"], "mean tokens, in training and at evaluations"),
    ("Truncated", ["truncated", "eval/truncated"], "share of responses cut at the limit"),
    ("Gradient norms KD : RL", ["kd_rl_norm_ratio"], "above 1 distillation pulls harder"),
    ("Gradient cosine KD, RL", ["kd_rl_cosine"], "below 0 the two pull apart"),
    ("Zero-advantage groups", ["zero_advantage_share"], "share of groups with equal rewards: no RL signal"),
    ("Groups without a right answer", ["groups_without_right"], "share of the step's groups"),
    ("Clipped tokens", ["clipped_share"], "share held back by the policy gradient's clip"),
    ("Masked tokens", ["masked_share"], "share of response tokens that distillation leaves out"),
    ("Teacher calls", ["teacher_calls", "teacher_calls_saved"], "responses scored so far, and spared by masking"),
    ("Loss", ["loss", "loss/"], "as minimised, and its terms"),
    ("Weights of the terms", ["weight/"], ""),
    ("Gradient norm", ["grad_norm"], "before clipping"),
    ("Learning rate", ["lr"], ""),
    ("Skipped updates", ["skipped_updates"], "non-finite loss or gradient"),
    ("Verifier mishaps", ["verifier/timeout", "verifier/crash", "verifier/printed"], "scored 0"),
    ("Tokens per second", ["tokens_per_second"], ""),
    ("Time per phase", ["time/"], "seconds per step"),
]


def report_run(run_dir: str | Path) -> Path:
    """Write RUN/report.html and return its path; raises UserError when the folder is no run or cannot be written."""
    run = read_run(run_dir)
    text = render(
        "run.html",
        run=run,
        tiles=tiles(run),
        charts=charts(run),
        rollouts=_chosen(run.rollouts),
        held_out=_held_out(run.final),
        facts=_facts(run),
        environment=json.dumps(run.environment, indent=1, ensure_ascii=False) if run.environment else "",
    )
    return write_file(run.path / "report.html", text)


def render(template: str, **values: Any) -> str:
    """A template of this folder with everything escaped that is not Markup."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    pages.filters["words"] = words
    pages.filters["number"] = _number
    return pages.get_template(template).render(css=Markup(chart_css()), **values)


def write_file(path: Path, text: str) -> Path:
    """Write text, turning an OSError into a sentence that names the file."""
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    return path


def words(prompt: Any) -> str:
    """A prompt as text: chat messages become `role: content` lines."""
    if isinstance(prompt, list):
        return "\n".join(
            f"{m.get('role', '?')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in prompt
        )
    return str(prompt)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def share(value: float | None, digits: int = 1) -> str:
    """A share in percent, a dash when unknown."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def interval(result: EvaluationResult, name: str, show: Callable[[float], str]) -> str:
    """`low – high` of a metric's interval, empty without one."""
    if name not in result.intervals:
        return ""
    low, high = result.intervals[name]
    return f"{show(low)} – {'∞' if high is None else show(high)}"


def per_correct(result: EvaluationResult) -> str:
    """Tokens per correct answer, or the word for a division by zero."""
    value = result.metrics.get("tokens_per_correct")
    return NO_RIGHT_ANSWER if value is None else f"{value:.1f}"


def _metric(result: EvaluationResult, name: str) -> float | None:
    return result.metrics.get(name)


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Headline numbers as (name, value, words below)."""
    out: list[tuple[str, str, str]] = []
    final, start, teacher = (run.evaluations.get(name) for name in ("final", "start", "teacher"))
    if final is not None:
        below = f"{interval(final, 'accuracy', share)} at 95 %, {len(final.records)} problems"
        out.append(("Held-out accuracy", share(final.accuracy), below))
    if start is not None:
        out.append(("Student before", share(start.accuracy), interval(start, "accuracy", share)))
    if teacher is not None:
        out.append(("Teacher", share(teacher.accuracy), interval(teacher, "accuracy", share)))
    if final is not None:
        mean, cut = _metric(final, "tokens"), _metric(final, "truncated")
        out.append(("Mean tokens", "–" if mean is None else f"{mean:.1f}", "per held-out response"))
        out.append(("Tokens per correct", per_correct(final), "all tokens written / right answers"))
        out.append(("Truncated", share(cut), "of the held-out responses"))
    if run.rows:
        seconds = run.total("time/step")
        responses = run.last("responses")
        below = f"{responses:,.0f} responses" if responses is not None else ""
        out.append(("Steps", f"{run.rows[-1]['step']:,.0f}", below))
        if seconds is not None:
            out.append(("Training time", clock(seconds), "sum of the steps"))
    if run.teacher_calls_saved is not None:
        out.append(("Teacher calls saved", share(run.teacher_calls_saved), "by masking"))
    return out


def charts(run: Run) -> list[dict[str, Any]]:
    """Every chart that the run has numbers for: title, words, last values, and the SVG."""
    teacher = run.evaluations.get("teacher")
    out = []
    for title, keys, about in _CHARTS:
        names = [name for key in keys for name in (run.keys(key) if key.endswith("/") else [key])]
        series = [
            Series(_label(name), *run.column(name), dots=name.startswith("eval/") or name.startswith("kd_rl"), colour=i)
            for i, name in enumerate(name for name in names if run.column(name)[0])
        ]
        if not series:
            continue
        levels = [Level("teacher, held-out", teacher.accuracy)] if teacher and keys == ["eval/accuracy"] else []
        picture = line_chart(series, levels=levels, name=title)
        legend = [(s.colour, s.label, short(s.y[-1])) for s in series]
        out.append({"title": title, "about": about, "legend": legend, "svg": Markup(picture)})
    return out


def _label(name: str) -> str:
    head, _, tail = name.partition("/")
    if head == "eval":
        return f"{tail} at evaluations"
    return (tail or head).replace("_", " ")


def _chosen(rollouts: Sequence[dict[str, Any]], most_steps: int = 6) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Rollouts of the first, the last and evenly chosen steps between, the last step first."""
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for row in rollouts:
        by_step.setdefault(row.get("step"), []).append(row)
    steps = list(by_step)
    if len(steps) > most_steps:
        steps = [steps[round(i * (len(steps) - 1) / (most_steps - 1))] for i in range(most_steps)]
    return [(step, by_step[step]) for step in reversed(steps)]


def _held_out(result: EvaluationResult | None, most: int = 6) -> list[dict[str, Any]]:
    """Some wrong and some right held-out responses."""
    if result is None:
        return []
    every = [(record, response) for record in result.records for response in record.responses]
    wrong = [pair for pair in every if not pair[1].correct][:most]
    right = [pair for pair in every if pair[1].correct][:most]
    return [
        {
            "prompt": record.prompt,
            "response": r.text,
            "correct": r.correct,
            "tokens": r.tokens,
            "truncated": r.truncated,
        }
        for record, r in [*wrong, *right]
    ]


def _facts(run: Run) -> list[tuple[str, str]]:
    """Where the run comes from, in a few words."""
    env, recipe = run.environment, run.recipe
    packages = env.get("packages") if isinstance(env.get("packages"), dict) else {}
    git = env.get("source_git") or env.get("git") or {}
    commit = str(git.get("commit") or "")[:10] + (" with uncommitted changes" if git.get("dirty") else "")
    device = env.get("device") if isinstance(env.get("device"), dict) else {}
    facts = [
        ("method", recipe.get("method")),
        ("seed", recipe.get("seed")),
        ("kdrl", env.get("kdrl")),
        ("commit", commit),
        ("python", env.get("python")),
        ("torch", (packages or {}).get("torch")),
        ("transformers", (packages or {}).get("transformers")),
        ("device", " ".join(str(v) for v in (device or {}).values() if v)[:80]),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
