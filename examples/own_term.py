"""An objective term of one's own: distil only where student and teacher are far apart.

kdrl train examples/tiny.yaml plugins=examples/own_term.py 'objective=[{far_distill: {margin: 0.05, weight: 0.1}}]' \
  --output runs/own-term

Keyword arguments are recipe keys of the term, beside `weight`, `mask`, `reduce` and `on`; types and names are checked.
"""

import torch

import kdrl


@kdrl.register_term("far_distill", teacher=True)
def far_distill(view, margin: float = 0.0):
    """R^2 / 2 where |R| is above `margin` nats, R = log p - log q of the sampled token (gradient: -R grad log q)."""
    gap_N = view.teacher_N - view.logq_N
    return torch.where(gap_N.abs() > margin, gap_N.square() / 2, 0.0)
