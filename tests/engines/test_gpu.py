from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kdrl.engines import TorchEngine
from kdrl.models import encode_prompt

from .toys import toy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("static", [True, False])
def test_a_gpu_writes_what_a_cpu_writes(static: bool):
    loaded = toy("qwen3")
    prompts = [encode_prompt(loaded, text) for text in ("1+2=", "34-5+6=", "7=", "12+34+56=")]
    ask = {"samples": 6, "max_new_tokens": 40, "seed": 3}
    want = TorchEngine(loaded, 4).generate(prompts, **ask)
    loaded.model.to("cuda")
    engine = TorchEngine(loaded, 4)
    assert engine.plan.fused
    engine.plan = replace(engine.plan, static=static)
    same = 0
    for a, b in zip(itertools.chain(*engine.generate(prompts, **ask)), itertools.chain(*want), strict=True):
        same += a.token_ids == b.token_ids
        if a.token_ids == b.token_ids:
            torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=5e-3, rtol=1e-2)
    assert same >= 20  # a draw at the edge of two tokens may fall to either side
