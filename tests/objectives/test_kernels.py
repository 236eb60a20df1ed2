"""Rows of logits: what is read of them and their gradient in place, against autograd, plain and by Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl.objectives import kernels
from kdrl.objectives.kernels import Pulls, Rows
from kdrl.objectives.logspace import entropy, relative_entropy

SHAPES = [(0, 5), (1, 1), (1, 7), (5, 300), (3, 10_001)]
GIVEN = [
    {"logp_C"},
    {"entropy_C"},
    {"logp_C", "entropy_C"},
    {"more_CV"},
    {"logp_C", "entropy_C", "more_CV"},
]


def case(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Pulls]:
    random = torch.Generator().manual_seed(rows * width)
    z = torch.randn(rows, width, generator=random, dtype=dtype) * 5
    pulls = [torch.randn(*shape, generator=random, dtype=dtype) for shape in ((rows,), (rows,), (rows, width))]
    target = torch.randint(width, (rows,), generator=random)
    return z.to(device), Pulls(target.to(device), *(pull.to(device) for pull in pulls))


def expected(z: Tensor, pulls: Pulls) -> tuple[list[Tensor], Tensor]:
    """Log-probs, entropies, and the gradient of their sum with the upstream gradients."""
    leaf = z.double().detach().clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    values = [logp.gather(-1, pulls.target_C[:, None]).squeeze(-1), entropy(logp)]
    terms = [(values[0], pulls.logp_C), (values[1], pulls.entropy_C), (logp, pulls.more_CV)]
    sum((value * pull.double()).sum() for value, pull in terms if pull is not None).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    return [value.detach() for value in values], leaf.grad


def check(found_by: Any, device: str, dtype: torch.dtype, bound: float) -> None:
    for shape in SHAPES:
        for given in GIVEN:
            z, pulls = case(*shape, dtype, device)
            pulls = Pulls(pulls.target_C, **{name: getattr(pulls, name) for name in given})
            values, gradient = expected(z, pulls)
            for normalised in (False, True):
                work = z.clone()
                rows: Rows = found_by.read_rows(work)
                assert torch.equal(work, z), "reading changes nothing"
                assert torch.allclose(rows.logp(work, pulls.target_C).double(), values[0], rtol=bound, atol=bound)
                assert torch.allclose(rows.entropy_C.double(), values[1], rtol=bound, atol=bound)
                if normalised:
                    rows.normalise_(work)
                found = found_by.gradient_(work, rows, pulls, normalised=normalised)
                assert found.data_ptr() == work.data_ptr(), "in place"
                assert torch.allclose(found.double(), gradient, rtol=bound, atol=bound)


def test_rows_and_their_gradient_equal_autograd():
    check(kernels, "cpu", torch.float64, 1e-11)
    check(kernels, "cpu", torch.float32, 3e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_outcomes_of_no_probability_count_nothing(normalised: bool):
    z = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 2.0, -torch.inf]], dtype=torch.float64)
    pulls = Pulls(torch.tensor([2, 1]), *torch.ones(2, 2, dtype=torch.float64))
    values, gradient = expected(z, pulls)
    rows = kernels.read_rows(z)
    assert torch.allclose(rows.entropy_C, values[1])
    if normalised:
        rows.normalise_(z)
    assert torch.allclose(kernels.gradient_(z, rows, pulls, normalised=normalised), gradient)


def test_log_softmax_in_place():
    z = torch.randn(40, 30_000, dtype=torch.float64)
    expected = z.log_softmax(-1)
    assert torch.equal(kernels.log_softmax_(z), expected)
    assert torch.equal(z, expected)


def test_relative_entropy_equals_the_plain_sum_in_value_and_gradient():
    random = torch.Generator().manual_seed(0)
    for shape in ((0, 3), (4, 7), (2, 3, 5), (3, 300_000)):
        sides = [torch.randn(*shape, generator=random, dtype=torch.float64).log_softmax(-1) for _ in "pq"]
        if shape == (4, 7):
            sides[0][0, 1], sides[1][1, 2], sides[1][2, 3] = -torch.inf, -torch.inf, -2.0e4
        pull = torch.randn(shape[:-1], generator=random, dtype=torch.float64)
        found, plain = [], []
        for results, way in ((found, relative_entropy), (plain, plainly)):
            leaves = [side.clone().requires_grad_() for side in sides]
            value = way(*leaves)
            (value * pull).sum().backward()
            results += [value.detach(), *(leaf.grad for leaf in leaves)]
        for one, other in zip(found, plain, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def plainly(logx: Tensor, logy: Tensor) -> Tensor:
    x, y = logx.clamp(min=-1e4), logy.clamp(min=-1e4)
    return (x.exp() * (x - y)).sum(-1)


# --- Triton -----------------------------------------------------------------------------------------------------------


INTERPRETED = """
import torch
from objectives import test_kernels
from kdrl.objectives import kernels, kernels_triton

kernels._fused, kernels._triton = lambda z: True, lambda: kernels_triton
test_kernels.check(kernels, "cpu", torch.float32, 3e-5)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: make test-kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested where there is a GPU")
def test_triton_kernels_in_its_interpreter_equal_autograd():
    # In a process of its own: Triton reads the variable when it is first imported.
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.gpu
def test_on_a_gpu_rows_and_their_gradient_equal_autograd():
    check(kernels, "cuda", torch.float32, 3e-5)
    check(kernels, "cuda", torch.float64, 1e-11)
