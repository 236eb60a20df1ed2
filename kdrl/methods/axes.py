"""Where a method stands: source, vocabulary, support, target, divergence, weight and schedule, read off its recipe.

A default is a dot. p is the teacher, q the student, M(a, share) the power mean of both, and a dagger says that it is
data; r is an assistant, rho a label's share. Several terms are joined by plus signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from kdrl.methods import Method, all_methods, get_method
from kdrl.objectives.distill import DistillConfig
from kdrl.objectives.schedules import schedules_in
from kdrl.objectives.specs import KINDS
from kdrl.objectives.terms import TERMS, ChunkDistill
from kdrl.recipe import Entry, plain, read_entry
from kdrl.sources.config import SourceConfig
from kdrl.teachers.config import SelfTeacherConfig

DOT = "·"
PLAIN = {"forward_kl": "p||q", "reverse_kl": "q||p", "tv": "TV", "rank": "rank"}
SIGNS = {"cross_entropy": "-log q", "policy_gradient": "reward", "entropy": "-H(q)", "chunk_kl": "q||p"}
SIGNS |= {"sorted_distill": "sorted L1", "group_distill": "J(0.5) + sorted L1", "multilevel_distill": "L1 + Sinkhorn"}
VOCABULARY = {"chunk_kl": "chunk", "overlap_distill": "overlap", "sorted_distill": "sort", "group_distill": "group"}
VOCABULARY |= {"multilevel_distill": "sort + ot", "dual_distill": "hidden(projector)"}


@dataclass(frozen=True)
class Axes:
    """A method as one point."""

    source: str
    vocabulary: str
    support: str
    target: str
    divergence: str
    weight: str
    schedule: str

    def cells(self) -> tuple[str, ...]:
        """The seven in order."""
        return tuple(getattr(self, field.name) for field in fields(self))


NAMES = tuple(field.name for field in fields(Axes))


@lru_cache
def axes_of(name: str) -> Axes:
    """The point of a method; raises UserError for an unknown name."""
    method = get_method(name)
    entries = [read_entry(raw) for raw in method.recipe["objective"]]
    distills = [e.config for e in entries if isinstance(e.config, DistillConfig)]
    return Axes(
        source=_source(method, distills),
        vocabulary=_vocabulary(method, entries),
        support=_joined(_support(plain(c)["support"]) for c in distills),
        target=_adapted(method) or _joined(_target(c) for c in distills),
        divergence=" + ".join(_comparison(e) for e in entries),
        weight=_joined((_weight(e) for e in entries), "; "),
        schedule=_joined(_moving(entries, method), "; "),
    )


def words(spec: Any) -> str:
    """A score, schedule or number in a few words: `top_share(one_minus(label_p), 0.5)`."""
    if isinstance(spec, Mapping):
        return ", ".join(f"{name}({_settings(given)})" if given else str(name) for name, given in spec.items())
    return f"{spec:g}" if isinstance(spec, int | float) else str(spec)


def _settings(given: Any) -> str:
    if not isinstance(given, Mapping):
        return words(given)
    # A ramp reads as from -> to; of a score's settings the values say enough.
    if {"from", "to"} <= set(given):
        return f"{words(given['from'])} to {words(given['to'])}"
    return ", ".join(key if value is True else words(value) for key, value in given.items() if value is not False)


def _joined(parts: Iterable[str], by: str = " + ") -> str:
    """Parts without repetition; a dot where all are dots."""
    found = list(dict.fromkeys(parts))
    said = [part for part in found if part not in (DOT, "")]
    if not said:
        return DOT
    return by.join(said if by != " + " else [part for part in found if part])


def _read_source(method: Method) -> SourceConfig:
    return SourceConfig.model_validate(method.recipe.get("source", "student"))


def _source(method: Method, distills: list[DistillConfig]) -> str:
    source = _read_source(method)
    text = _writer(source.model_dump(mode="json"))
    if any(c.teacher == "self" for c in distills):
        own = SelfTeacherConfig.model_validate(method.recipe.get("self_teacher", {}))
        seen = " with context" if own.context or source.kind == "privileged" else ""
        text += f"; teacher: self, {own.kind}{seen}"
    return text


def _writer(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    (kind, given), *_ = spec.items()
    if kind == "filtered":
        kept = [rule if isinstance(rule, str) else rule["score"] for rule in given["keep"]]
        return f"filtered({_writer(given['source'])}: {', '.join(kept)})"
    shown = [words(v) for k, v in given.items() if k not in ("template", "path", "other", "size")]
    return f"{kind}({', '.join(shown)})" if shown else kind


def _vocabulary(method: Method, entries: list[Entry]) -> str:
    terms = [TERMS.get(e.name)(e.config) for e in entries]
    own = [f"chunk({t.config.tau})" if isinstance(t, ChunkDistill) else VOCABULARY.get(t.name) for t in terms]
    if any(own):
        return _joined(part for part in own if part)
    asked = any(t.needs.teacher is not None or t.needs.features for t in terms)
    return "text" if not asked and "teacher" in _read_source(method).origins else DOT


def _support(spec: Any) -> str:
    if spec == "full":
        return DOT
    (kind, given), *_ = spec.items()
    given = given if isinstance(given, Mapping) else {"": given}
    return f"{kind}({', '.join(words(v) for v in given.values())})"


def _target(config: DistillConfig) -> str:
    target, parts = config.target, []
    teacher, student = target.teacher_temperature, target.student_temperature
    if teacher is not None and teacher == student:
        parts.append(f"T {words(teacher.spec)}" + (", T^2" if target.rescale else ""))
    else:
        parts += [f"T_p {words(teacher.spec)}"] if teacher is not None else []
        parts += [f"T_q {words(student.spec)}"] if student is not None else []
    if target.decouple is not None:
        cut = target.decouple
        parts.append(f"decouple({words(cut.label.spec)}, {words(cut.rest.spec)}{', label' if cut.label_only else ''})")
    named = {"power": target.power, "rho": target.label_mix, "product": target.product}
    parts += [f"{name} {words(value.spec)}" for name, value in named.items() if value is not None]
    parts += [f"boost {target.label_boost:g}"] if target.label_boost is not None else []
    parts += ["standardise"] if target.standardise else []
    return ", ".join(parts) or DOT


def _adapted(method: Method) -> str:
    prepare = (method.recipe.get("teacher") or {}).get("prepare")
    return f"adapt({next(iter(prepare))})" if prepare else ""


def _comparison(entry: Entry) -> str:
    shown = plain(entry.config)
    if entry.name in ("distill", "chunk_distill", "overlap_distill"):
        text = _divergence(shown["divergence"])
    elif entry.name == "dual_distill":
        text = f"{_divergence(shown['divergence'])} in q's space + {_divergence(shown['in_teacher'])} in p's"
    elif entry.name == "batch_distill":
        text = words(shown["loss"])
    else:
        text = SIGNS.get(entry.name, entry.name)
    weight = shown["weight"]
    if weight == 1.0:
        return text
    many = " + " in text and not text.startswith("(")
    return f"{words(weight) if isinstance(weight, int | float) else 'c(t)'} {f'({text})' if many else text}"


def _divergence(spec: Any) -> str:
    if isinstance(spec, str):
        return PLAIN[spec]
    if "arms" in spec:
        arms = " + ".join(_arm(arm) for arm in spec["arms"])
        return f"{arms}, r = {_assistant(spec['assistant'])}" if "assistant" in spec else arms
    (kind, given), *_ = spec.items()
    # {symmetric: {calibrated: ...}} holds a schedule, {jsd: {beta: ...}} settings.
    settings = isinstance(given, Mapping) and bool(set(given) & set(KINDS[kind]))
    inner = given if settings else {KINDS[kind][0]: given}
    first = next(iter(inner.values()))
    if kind in ("skew_kl", "skew_reverse_kl"):
        share = first if kind == "skew_kl" or not isinstance(first, int | float) else 1.0 - first
        mean = f"M(-1, {words(share)}){'†' if inner.get('detach') else ''}"
        return f"{'p' if kind == 'skew_kl' else 'q'}||{mean}"
    if kind == "symmetric":
        return f"g p||q + (1-g) q||p, g {words(first)}"
    if kind == "alpha_beta":
        return f"p||q ({words(inner['alpha'])}, {words(inner['beta'])})"
    names = {"jsd": "J", "pair": "pair", "preference": "BT"}
    return f"{names.get(kind, kind)}({', '.join(map(str, first)) if isinstance(first, list) else words(first)})"


def _arm(arm: Mapping[str, Any]) -> str:
    text = arm["of"]
    if (arm["alpha"], arm["beta"]) != (1.0, 0.0):
        text += f" ({words(arm['alpha'])}, {words(arm['beta'])})"
    if arm["gate"] != 1.0:
        text += f" [{words(arm['gate'])}]"
    return text if arm["weight"] == 1.0 else f"{words(arm['weight'])} {text}"


def _assistant(spec: Mapping[str, Any]) -> str:
    dagger = "†" if spec.get("detach") else ""
    if spec.get("tilt") is not None:
        return f"p q^{words(spec['tilt'])}{dagger}"
    return f"M({words(spec['a'])}, {words(spec['share'])}){dagger}"


def _weight(entry: Entry) -> str:
    config, parts = entry.config, []
    if config.mask != "all":
        parts.append(f"mask {words(config.mask)}")
    if config.scale.constant != 1.0:
        parts.append(words(config.scale.spec))
    return " x ".join(parts) or DOT


def _moving(entries: list[Entry], method: Method) -> Iterable[str]:
    """Every scalar that is not constant, by the last part of its key, once."""
    for config in [*(e.config for e in entries), _read_source(method).settings]:
        for path, schedule in schedules_in(config):
            if not isinstance(schedule.spec, int | float):
                key = [part for part in path.split(".") if part][-1]
                yield f"{key} {words(schedule.spec)}"


def table() -> list[tuple[str, ...]]:
    """Name and seven axes of every method, under a head."""
    return [("method", *NAMES), *((name, *axes_of(name).cells()) for name in all_methods())]
