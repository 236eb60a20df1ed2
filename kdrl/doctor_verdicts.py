"""What the doctor says of what it measured: a verdict on each, with what to do where it is not `ok`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrl.doctor_samples import Gap, Measured
from kdrl.objectives.schedules import schedules_in
from kdrl.recipe import Recipe
from kdrl.vocab.align import HALF, MOST

if TYPE_CHECKING:
    from kdrl.doctor import Doctor, Verdict


def judge(doctor: Doctor, recipe: Recipe, found: Measured) -> None:
    """Write down a verdict on each thing that was measured."""
    _accuracies(doctor, found)
    _responses(doctor, recipe, found)
    for name, gap in found.gaps.items():
        _gap(doctor, name, gap, found.entropy)
    _alignment(doctor, found)
    _gradients(doctor, found)
    _balance(doctor, recipe, found)
    rows = recipe.rollout.prompts * recipe.rollout.group
    seconds = {k: v * rows / max(1, found.rows) for k, v in found.seconds.items()}
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    whole = total * recipe.steps / 60
    long = f"{whole:.0f} min" if whole < 120 else f"{whole / 60:.1f} h"
    doctor.find("time", "ok", f"at most about {total:.1f} s a step ({parts}), {long} for {recipe.steps} steps")


def _gap(doctor: Doctor, name: str, gap: Gap, entropy: float) -> None:
    far = gap.beyond > 0.05 or gap.ratio < -2.0
    advice = "; most of the signal is clamped or rough: train on the teacher's text first" if far else ""
    if gap.alike:
        advice = "; the teacher is the student as it starts, which pulls back and teaches nothing new"
    what = "mean log p - log q"
    if gap.covered is not None:
        what += f" of a chunk, over {gap.covered:.0%} of the trained tokens,"
    doctor.find(
        f"{name}'s R",
        "note" if far or gap.alike else "ok",
        f"{what} is {gap.ratio:+.3f}, mean |R| {gap.magnitude:.3f}, {gap.beyond:.1%} beyond the clamp{advice}",
    )
    if gap.overlap is not None:
        low = gap.overlap < 0.4
        advice = "; below 40 % on-policy distillation seldom works: train on the teacher's text first" if low else ""
        text = f"teacher and student share {gap.overlap:.0%} of their {gap.top} likeliest tokens{advice}"
        doctor.find(f"{name}'s overlap", "note" if low else "ok", text)
    if gap.entropy is not None:
        doctor.find(f"{name}'s entropy", "ok", f"{gap.entropy:.3f} nats a token, the student's {entropy:.3f}")


def _alignment(doctor: Doctor, found: Measured) -> None:
    """How much of what the student wrote do teachers of other tokenizers read?"""
    if not found.alignment:
        return
    text = ", ".join(f"{key.removeprefix('vocabulary/')} {value:.3g}" for key, value in found.alignment.items())
    least = min(value for key, value in found.alignment.items() if key.endswith("covered"))
    verdict: Verdict = "wrong" if least < HALF else "note" if least < MOST else "ok"
    if verdict != "ok":
        text += (
            f"; the terms that ask the teacher train on {least:.0%} of the student's tokens alone: its tokenizer lacks "
            "characters that the student writes, or its context is short; choose a teacher that writes this text, or "
            "its own text (kdrl generate)"
        )
    doctor.find("alignment", verdict, text)


def _accuracies(doctor: Doctor, found: Measured) -> None:
    for name, accuracy in found.accuracy.items():
        text = f"{accuracy.right} of {accuracy.problems} {accuracy.split} problems right, {accuracy.tokens:.0f} tokens"
        verdict: Verdict = "ok"
        own = found.accuracy["student"]
        if name != "student" and accuracy.right < own.right:
            verdict, text = "note", f"{text}, fewer than the student's {own.right}; it may have little to teach here"
        elif accuracy.right == 0:
            verdict = "note"
            text += (
                "; rewards alone teach nothing from there, so distill first"
                if name == "student"
                else "; is it shown prompts in the form that it knows?"
            )
        doctor.find(f"{name}'s accuracy", verdict, text)


def _responses(doctor: Doctor, recipe: Recipe, found: Measured) -> None:
    text = f"{found.rows} written, {found.tokens:.0f} tokens on average, {found.truncated:.0%} cut at the limit"
    long = found.truncated > 0.5
    doctor.find("responses", "note" if long else "ok", text + ("; raise rollout.max_new_tokens" if long else ""))
    if any(entry.name == "policy_gradient" for entry in recipe.objective):
        flat = f"{found.flat:.0%} of the groups have equal rewards, which teach a policy gradient nothing"
        doctor.find("groups", "note" if found.flat > 0.8 else "ok", flat)


def _gradients(doctor: Doctor, found: Measured) -> None:
    for term in found.terms:
        if term.kept == 0:
            doctor.find(f"objective.{term.name}", "note", "its mask keeps no token of these samples")
            continue
        text = f"gradient norm {term.norm:.3g} as weighted ({term.weight:g}), {term.kept} tokens"
        if term.mass is not None:
            text += f", its support holds {term.mass:.0%} of the teacher's mass"
        if term.norm == 0.0:
            flat = term.family == "rl" and found.flat == 1.0
            equal = term.teacher in found.gaps and found.gaps[term.teacher].alike
            # Another term moves the student away, and then this one pulls it back.
            moved = any(other.family != term.family for other in found.terms)
            why = "all rewards of a group are equal here" if flat else "it would teach nothing"
            if equal:
                why = "student and teacher are equal at the start" + ("" if moved else ", and no other term moves it")
            fine = flat or (equal and moved)
            doctor.find(f"objective.{term.name}", "note" if fine else "wrong", f"{text}: the gradient is zero, {why}")
        elif term.mass is not None and term.mass < 0.9:
            doctor.find(f"objective.{term.name}", "note", f"{text}; raise k")
        else:
            doctor.find(f"objective.{term.name}", "ok", text)


def _balance(doctor: Doctor, recipe: Recipe, found: Measured) -> None:
    """Distillation against rewards, for which order 1 is usual: beta x length x KL, else the gradients' norms."""
    sides = {family: [t for t in found.terms if t.family == family and t.norm > 0] for family in ("kd", "rl")}
    if not (sides["kd"] and sides["rl"]):
        return
    kd, rl = (max(sides[family], key=lambda t: t.norm) for family in ("kd", "rl"))
    ratio = kd.norm / rl.norm
    looked, text = [(ratio, 10.0)], f"distillation to reward {ratio:.2g} in gradient norm"
    gap = next((gap for gap in found.gaps.values() if gap.covered is None), None)
    if gap is not None and not gap.alike and gap.ratio:
        beta = kd.weight / rl.weight
        size = beta * found.tokens * abs(gap.ratio)
        # Of a few responses the norms say less: many groups of equal rewards make that of the rewards small.
        looked = [(abs(size), 10.0), (ratio, 50.0)]
        text += f"; beta x length x KL is {beta:.3g} x {found.tokens:.0f} x {abs(gap.ratio):.2g} = {size:.2g}"
    off = next((value for value, most in looked if not 1 / most <= value <= most), 1.0)
    if off == 1.0:
        doctor.find("balance", "ok", text)
    elif any(s.adaptive is not None for path, s in schedules_in(recipe.objective) if path.endswith(".weight")):
        doctor.find("balance", "ok", f"{text} at the start; a weight of the recipe follows the run")
    else:
        what = "the teacher hardly counts; raise" if off < 1 else "the rewards hardly count; lower"
        meant = " (more is right while the student should first become like its teacher)" if off > 1 else ""
        advice = f"{what} objective.{kd.name}.weight from {kd.weight:g} to about {kd.weight / off:.2g}, for order 1"
        doctor.find("balance", "note", f"{text}: {advice}{meant}")
