"""What the benchmark scripts share: options, a budget, models and prompts made from a seed, memory, the result file."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from kdrl import heap
from kdrl.bench.machine import machine, peak_bytes, reset_peak, write_results
from kdrl.models import LoadedModel, ModelConfig, NewModel, NewTokenizer, load_model, save_final

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SMOLLM = HERE.parent / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0
# Width, layers, heads, key-value heads, width of a head, of the MLP; named by the parameters without vocabulary.
_SHAPES = {
    "0.3M": (96, 3, 4, 2, 24, 288),
    "1M": (128, 5, 4, 2, 32, 352),
    "5M": (256, 6, 8, 4, 32, 704),
    "20M": (512, 6, 8, 4, 64, 1408),
    "0.5B": (1024, 28, 16, 8, 64, 4096),
    "1.7B": (2048, 28, 16, 8, 128, 6144),
}
_SPECIAL = 2


def parser(doc: str | None, result: str) -> argparse.ArgumentParser:
    """Options that every script has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--budget", type=float, default=600.0, help="seconds for all cases; each has at least two turns")
    made.add_argument("--quick", action="store_true", help="one turn of few cases, to see that it runs")
    made.add_argument("--only", default="", help="cases whose name holds this")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, default=RESULTS / result, help="cases of other names in it are kept")
    return made


def begin(options: argparse.Namespace) -> None:
    """Threads, the heap as kdrl has it, for all sides, and libraries that say less."""
    torch.set_num_threads(options.threads)
    heap.settle(tight=False)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def chosen(names: Sequence[str], options: argparse.Namespace, quick: int = 2) -> list[str]:
    """Names of cases to run."""
    found = [name for name in names if options.only in name]
    if not found:
        sys.exit(f"no case's name holds {options.only!r}; there are: {'; '.join(names)}")
    return found[:quick] if options.quick and not options.only else found


def shares(names: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Each case with the seconds that it may take: what is left of the budget over the cases that are left."""
    end = time.monotonic() + options.budget
    for n, name in enumerate(names):
        yield name, max(0.0, end - time.monotonic()) / (len(names) - n)


def repeats(options: argparse.Namespace, most: int = 5) -> int:
    """Turns of a case."""
    return 1 if options.quick else most


def save(options: argparse.Namespace, cases: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write the result file; cases of other names that the same machine measured before stay, with their threads."""
    about = machine()
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
    stamp = {"commit": about.pop("commit"), "date": about.pop("date"), "command": command}
    stamp |= {name: about["machine"].pop(name, None) for name in ("threads", "load_at_start")}
    fresh = {case["case"]: case | stamp for case in cases}
    kept: dict[str, Any] = {}
    if options.json.is_file():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        if before.get("machine") == about["machine"]:
            kept = {case["case"]: case for case in before.get("cases", [])}
    write_results(options.json, {**about, "seed": SEED, **more, "cases": list((kept | fresh).values())})
    print(f"written: {options.json}")


def settle() -> int | None:
    """Give free memory back, count the process's peak from now on, and say what is resident; None but on Linux."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    reset_peak("cpu")
    return peak_bytes("cpu")


def mib(size: float) -> float:
    """Bytes as mebibytes."""
    return round(size / 2**20, 1)


def characters(vocabulary: int) -> str:
    """Characters of a tokenizer with so many tokens; the first are printable ASCII."""
    plain = [chr(n) for n in range(32, 127)]
    wide = [chr(n) for n in range(0x4E00, 0x9FFF)] + [chr(n) for n in range(0x20000, 0x20000 + 150_000)]
    return "".join((plain + wide)[: vocabulary - _SPECIAL])


def sized(size: str, vocabulary: int, *, max_positions: int = 2048, **more: Any) -> ModelConfig:
    """A random Qwen3 of a size, with a tokenizer of characters."""
    width, layers, heads, kv_heads, head_dim, mlp = _SHAPES[size]
    new = NewModel(
        architecture="qwen3",
        hidden_size=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        max_positions=max_positions,
    )
    return ModelConfig(model=new, tokenizer=NewTokenizer(characters=characters(vocabulary)), **more)


def make(config: ModelConfig, *, trainable: bool = False, device: str = "cpu") -> LoadedModel:
    """The model with the scripts' seed."""
    return load_model(config, device, trainable=trainable, seed=SEED)


def make_folder(config: ModelConfig, folder: Path) -> Path:
    """The same as a Hugging Face folder."""
    save_final(make(config, trainable=True), folder)
    return folder


def smollm(**more: Any) -> ModelConfig | None:
    """SmolLM2-135M-Instruct, where `make smollm` has put it."""
    if not SMOLLM.is_file():
        print(f"cases with SmolLM2 are skipped: {SMOLLM.name} is not there (make smollm)")
        return None
    return ModelConfig(model=str(SMOLLM), **more)


def token_prompts(loaded: LoadedModel, count: int, least: int, most: int) -> list[list[int]]:
    """Prompts of random tokens, lengths from least to most."""
    rng = random.Random(SEED)
    lengths = [least + (most - least) * n // max(1, count - 1) for n in range(count)]
    return [[rng.randrange(_SPECIAL, loaded.vocab_size) for _ in range(n)] for n in lengths]


def times(ratio: dict[str, float]) -> str:
    """A ratio for people."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
