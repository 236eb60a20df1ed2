"""Bytes a token, error and throughput of each kind of teacher cache, on a real teacher and worked sums.

    python benchmarks/cache.py [RECIPE] [--problems 16] [--output benchmarks/results/cache.txt]

RECIPE's student is the teacher here and its worked solutions are the responses. Throughput is response tokens per
second of processor time on one thread, so that other work on the machine hardly counts. Left out: a GPU.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdrl.batch import Response, Rollouts
from kdrl.models import LoadedModel, head_of, load_model
from kdrl.objectives.head import Head
from kdrl.recipe import load_recipe
from kdrl.sources.base import Request
from kdrl.sources.text import GoldSource
from kdrl.tasks import build_task
from kdrl.teachers import LocalTeacher
from kdrl.teachers.base import Evidence
from kdrl.teachers.cache_codec import Scored, TopK, codec_of, head_tensors
from kdrl.teachers.cache_command import SHARD_TOKENS
from kdrl.teachers.cache_store import CacheStore, key_of
from kdrl.teachers.cached import CachedTeacher

KINDS = {
    "topk, k 64": {"kind": "topk", "k": 64},
    "topk, k 16": {"kind": "topk", "k": 16},
    "draws, n 12": {"kind": "draws", "draws": 12, "tau": 1.0},
    "hidden": {"kind": "hidden"},
}
WIDE = 151_936
"""A vocabulary of 18-bit ids, as Qwen's."""


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def gold(recipe_path: str, problems: int) -> tuple[LoadedModel, list[Response]]:
    """The teacher, and worked solutions."""
    recipe = load_recipe(recipe_path, ["device=cpu", "student.autocast=null"])
    loaded = load_model(recipe.student, "cpu", trainable=False, seed=0)
    stream = build_task(recipe.task, recipe.seed, lambda problem: 0).problems("train")
    source = GoldSource(loaded, recipe.rollout.max_new_tokens)
    return loaded, source.write(Request.of([stream[i] for i in range(problems)]))


def measure(
    kind: dict, loaded: LoadedModel, evidence: Evidence, rollouts: Rollouts, score_s: float, folder: Path
) -> str:
    """One line of the table."""
    codec = codec_of(kind, loaded.vocab_size, 0)
    lengths = tuple(len(r.token_ids) for r in rollouts.responses)
    keys = tuple(key_of(r.prompt_ids, r.token_ids) for r in rollouts.responses)
    content: dict = {**kind, "temperature": 1.0, "vocab": loaded.vocab_size, "seed": 0}
    head = None
    if kind["kind"] == "hidden":
        head, content["head"] = head_tensors(head_of(loaded))
    with CacheStore.write(folder, content, head) as store:
        write_s = timed(lambda: store.add(keys, lengths, codec.encode(Scored(evidence, lengths, keys))))
    size = bytes_a_token(codec.encode(Scored(evidence, lengths, keys)), lengths, folder / "full")
    reader = CachedTeacher(CacheStore.read(folder))
    need = "distribution" if reader.gives.distribution else "few"
    everything = torch.ones_like(rollouts.trained_N)
    first_s = timed(lambda: reader.score(rollouts, everything, need, 1.0))
    again_s = timed(lambda: [reader.score(rollouts, everything, need, 1.0) for _ in range(2)]) / 2
    n = rollouts.tokens
    found = errors(reader.score(rollouts, everything, need, 1.0), evidence)
    speeds = "  ".join(f"{n / seconds:9.0f}" for seconds in (score_s + write_s, write_s, first_s, again_s))
    return f"{size:7.1f}  {speeds}  {found}"


def bytes_a_token(tensors: dict, lengths: tuple[int, ...], folder: Path) -> float:
    """On the disk, in a shard of the usual size: these tokens again and again."""
    times = -(-SHARD_TOKENS // sum(lengths))
    repeated = {name: torch.cat([tensor] * times) for name, tensor in tensors.items()}
    with CacheStore.write(folder, {"kind": "any"}) as store:
        keys = [number.to_bytes(16, "little") for number in range(times * len(lengths))]
        store.add(keys, lengths * times, repeated)
        return store.bytes / (times * sum(lengths))


def errors(read: Evidence, local: Evidence) -> str:
    """Mean over p and largest absolute error of stored log-probs."""
    index = torch.arange(len(local.logp_N))
    total, most = 0.0, 0.0
    for part in index.split(64):
        exact = local.logp(part, torch.empty(0))
        if read.few is None:
            off = (read.logp(part, torch.empty(0)) - exact).abs()
            weight = exact.exp()
        else:
            few = read.few.at(read.where_N[part])
            want = exact.gather(-1, few.ids_NK)
            real = torch.ones_like(want, dtype=torch.bool) if few.weight_NK is None else few.weight_NK > 0
            off, weight = (few.logp_NK - want).abs() * real, want.exp() * real
        total += float((off * weight).sum())
        most = max(most, float(off.max()))
    return f"{total / len(index):.5f}    {most:.4f}"


def wide_bytes(folder: Path) -> list[str]:
    """Bytes a token at a vocabulary of 18 bits, on a nearly flat teacher: draws at their worst."""
    tokens, lengths = 100, (100,)
    head = Head(torch.randn(WIDE, 8, generator=torch.Generator().manual_seed(0)) * 0.1)
    hidden = torch.eye(8)[torch.arange(tokens) % 8]
    data = Scored(Evidence(torch.zeros(tokens), torch.arange(tokens), 1, hidden, head), lengths, (bytes(16),))
    lines = []
    for name, kind in KINDS.items():
        if kind["kind"] == "hidden":
            continue
        tensors = codec_of(kind, WIDE, 0).encode(data)
        lines.append(f"{name:12}  {bytes_a_token(tensors, lengths, folder / name[-2:]):7.1f}")
    return lines


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/smollm-teacher.yaml")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cache.txt"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded, responses = gold(given.recipe, given.problems)
    rollouts = Rollouts.of(responses)
    teacher, everything = LocalTeacher(loaded, 2048), torch.ones_like(rollouts.trained_N)
    held: list[Evidence] = []
    score_s = timed(lambda: held.append(teacher.score(rollouts, everything, "distribution", 1.0)))
    evidence = held[0]
    mass = float(1 - TopK(64, loaded.vocab_size).encode(_scored(evidence))["tail"].float().exp().mean())
    lines = [
        f"python benchmarks/cache.py {given.recipe} --problems {given.problems}",
        f"teacher {loaded.config.model}, vocabulary {loaded.vocab_size}, width {evidence.head.weight_VD.shape[1]}"  # type: ignore[union-attr]
        f", float32; {rollouts.rows} responses of {rollouts.tokens} tokens; mass of its 64 likeliest tokens {mass:.4f}",
        f"{platform.machine()}, one thread, torch {torch.__version__}; tokens per second of processor time",
        f"local scoring alone: {rollouts.tokens / score_s:.0f} tokens/s",
        "",
        "kind          B/token  score+store  store     read, hash  read again  error over p, largest (nats)",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in KINDS.items():
            line = measure(kind, loaded, evidence, rollouts, score_s, Path(folder) / kind["kind"] / name[-2:])
            lines.append(f"{name:12}  {line}")
        lines += [
            "",
            f"B/token at a vocabulary of {WIDE} (18-bit ids), a nearly flat teacher, responses of 100 tokens:",
        ]
        lines += wide_bytes(Path(folder) / "wide")
    text = "\n".join(lines) + "\n"
    given.output.write_text(text)
    print(text)


def _scored(evidence: Evidence) -> Scored:
    return Scored(evidence, (len(evidence.logp_N),), (b"",))


if __name__ == "__main__":
    main()
