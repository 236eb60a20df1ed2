"""Tokens a second of kdrl's engine and of transformers' `generate`, in one run, alternating, on equal work.

    python benchmarks/engine.py [--repeats 5] [--threads 2] [--gguf PATH]

Equal work: the same model object, prompts, rows and number of new tokens; no end token for either; whole vocabulary at
temperature 1. The engine also returns log-probs, which `generate` is not asked for. Prompts of one length and of mixed
lengths (left padding) are timed apart. Writes benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from kdrl.engines import TorchEngine
from kdrl.models import LoadedModel, ModelConfig, NewModel, NewTokenizer, load_model

HERE = Path(__file__).parent
SMOLLM = HERE.parent / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0


@dataclass(frozen=True)
class Case:
    """One comparison: rows = prompts x samples."""

    name: str
    model: str
    prompts: int
    samples: int
    prompt_tokens: tuple[int, int]
    new_tokens: int


CASES = [
    Case("0.34M, 64 rows, 96 tokens", "tiny", 8, 8, (12, 12), 96),
    Case("0.34M, 64 rows, 96 tokens, padded", "tiny", 8, 8, (8, 15), 96),
    Case("0.34M, 128 rows, 32 tokens, padded", "tiny", 16, 8, (8, 15), 32),
    Case("0.34M, 128 rows, 96 tokens, padded", "tiny", 16, 8, (8, 15), 96),
    Case("SmolLM2-135M bf16, 32 rows, 32 tokens", "smollm", 8, 4, (60, 72), 32),
]


def tiny() -> LoadedModel:
    """0.34M parameters, 50 tokens."""
    new = NewModel(
        architecture="qwen3", hidden_size=96, layers=3, heads=4, kv_heads=2, head_dim=24, intermediate_size=288
    )
    characters = "0123456789+-*/=;#()., abcdefghijklmnopqrstuvwxyz"
    config = ModelConfig(model=new, tokenizer=NewTokenizer(characters=characters))
    return load_model(config, "cpu", trainable=True, seed=SEED)


def time_case(case: Case, loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Seconds of both, in turns that swap who goes first; tokens/s medians, spreads and the ratio of paired turns."""
    rng = random.Random(SEED)
    low, high = case.prompt_tokens
    lengths = [low + (high - low) * n // max(1, case.prompts - 1) for n in range(case.prompts)]
    prompts = [[rng.randrange(2, loaded.vocab_size) for _ in range(n)] for n in lengths]
    tokens = case.prompts * case.samples * case.new_tokens
    runs = {"kdrl": engine_run(case, loaded, prompts), "generate": generate_run(case, loaded, prompts)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        runs[name]()  # warm up
    for turn in range(repeats):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            written = runs[name]()
            seconds[name].append(time.perf_counter() - start)
            assert written == tokens, (name, written, tokens)
    rates = {name: [tokens / s for s in each] for name, each in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["kdrl"], seconds["generate"], strict=True)]
    return {
        "case": case.name,
        "tokens": tokens,
        **{f"{name}_tokens_per_s": summary(each) for name, each in rates.items()},
        "ratio": summary(ratios),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def engine_run(case: Case, loaded: LoadedModel, prompts: list[list[int]]) -> Callable[[], int]:
    """A call that writes with kdrl and returns how many tokens."""
    endless = replace(loaded, eos_ids=(-1,))
    engine = TorchEngine(endless, max_rows=case.prompts * case.samples)

    def run() -> int:
        out = engine.generate(prompts, samples=case.samples, max_new_tokens=case.new_tokens, seed=SEED)
        return sum(len(sample.token_ids) for samples in out for sample in samples)

    return run


def generate_run(case: Case, loaded: LoadedModel, prompts: list[list[int]]) -> Callable[[], int]:
    """A call that writes with transformers and returns how many tokens."""
    width = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(case.samples)]
    ids = torch.tensor([[loaded.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def run() -> int:
        torch.manual_seed(SEED)
        loaded.model.eval()
        with torch.inference_mode():
            out = loaded.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=case.new_tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                eos_token_id=None,
                pad_token_id=loaded.pad_id,
            )
        return len(rows) * (out.shape[1] - width)

    return run


def main() -> None:
    """Run every case whose model is there, print a line each, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gguf", type=Path, default=SMOLLM)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    models: dict[str, LoadedModel] = {"tiny": tiny()}
    if options.gguf.is_file():
        config = ModelConfig(model=str(options.gguf), dtype="bfloat16")
        models["smollm"] = load_model(config, "cpu", trainable=False, seed=SEED)
    results = []
    for case in CASES:
        if case.model not in models:
            print(f"{case.name}: skipped, {options.gguf} is not there (make smollm)")
            continue
        repeats = options.repeats if case.model == "tiny" else min(3, options.repeats)
        results.append(time_case(case, models[case.model], repeats))
        r = results[-1]
        rates = f"{r['kdrl_tokens_per_s']['median']:,.0f} against {r['generate_tokens_per_s']['median']:,.0f} tokens/s"
        print(f"{case.name}: {rates}, ratio {r['ratio']['median']} ({r['ratio']['min']} to {r['ratio']['max']})")
    write(options, results)


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """The results with what they were measured on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    cpu = next((s.split(":")[1].strip() for s in cpu_info() if s.startswith("model name")), platform.processor())
    machine = {"cpu": cpu, "threads": options.threads}
    content = {"machine": machine, "versions": versions, "seed": SEED, "repeats": options.repeats, "results": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=2) + "\n")


def cpu_info() -> list[str]:
    """Lines of /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
