"""What becomes of freed arrays, and which runs ask for which."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from transformers import Qwen3Config

from kdrl.batch import _even
from kdrl.memory import plan
from kdrl.model_shape import ModelShape

CONFIG = Qwen3Config(
    hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, vocab_size=4096
)
RUN = {"micro_batch_tokens": 1024, "step_tokens": 4096, "max_length": 128, "rollout_rows": 0, "device": "cpu"}
FREED = """
import json
from kdrl.heap import settle
settle(tight=TIGHT)
import torch
def resident():
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1])
held = [torch.ones(1 << 21) for _ in range(16)]  # 8 MiB each
full = resident()
del held
print(json.dumps([full, resident()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("tight", [True, False])
def test_freed_arrays_go_back_to_the_system_or_stay(tight: bool) -> None:
    script = FREED.replace("TIGHT", str(tight))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    full, after = json.loads(done.stdout)
    assert (full - after > 100 << 20) == tight


def test_a_plan_without_room_for_gaps_gives_arrays_back_and_one_without_room_at_all_says_so() -> None:
    shape = ModelShape.from_config(CONFIG)
    roomy = plan(shape, **RUN, available=10**12)
    assert roomy.fits
    assert not roomy.tight
    just = plan(shape, **RUN, available=roomy.peak - 1)
    assert just.fits
    assert just.tight
    assert just.peak < roomy.peak
    assert "given back at once" in just.verdict
    short = plan(shape, **RUN, available=just.peak - 1)
    assert not short.fits
    assert short.advice
    # On a GPU there is no such heap.
    assert plan(shape, **RUN | {"device": "meta"}, available=10).tight is False


def test_a_run_of_many_lengths_keeps_few_shapes() -> None:
    """oneDNN's cache of shapes is bounded before torch can read how large it may be."""
    script = "import os, kdrl; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    env = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["128", "128"]
    assert {_even(n) for n in (1, 31, 63)} == {1}
    for tokens in (64, 100, 4000, 16384, 100_000):
        assert -tokens % _even(tokens) <= tokens // 32
    assert len({n + -n % _even(n) for n in range(8192, 16384)}) <= 33
