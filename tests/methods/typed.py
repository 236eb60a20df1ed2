"""Recipes as published, typed a second time: all beside an objective, and objectives whose formulas are not here.

Formulas of hidden states and attention are checked, with other numbers, by tests/features/test_step.py
(test_value_and_gradient_from_transformers_own_outputs, test_nd_centres_are_means_of_equal_labels,
test_statistics_are_of_the_whole_step, test_projectors_learn_and_stay_orthogonal); those across tokenizers by
tests/vocab: test_terms.py (test_against_a_reference, test_every_token_of_a_chunk_carries_the_chunks_log_ratio) and the
references of test_likelihood.py, test_multilevel.py and test_dual.py.
"""

from __future__ import annotations

from typing import Any

GRPO = {"policy_gradient": {
    "advantage": "grpo", "ratio": "token", "clip": {"low": 0.2, "high": 0.2}, "reduce": "token_global",
}}  # fmt: skip
FORWARD_KL = {"divergence": "forward_kl", "support": "full"}

SPACES = {"divergence": "forward_kl", "in_teacher": "forward_kl", "temperature": 2.0, "weight": 0.5}

OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "align-to-distill": [
        {"cross_entropy": {"weight": 0.5, "on": ["gold"]}},
        {"distill": FORWARD_KL | {"weight": 0.5}},
        {"feature": {
            "of": "attention", "loss": "kl", "layers": "all", "projector": "head_map",
            "weight": {"cosine": {"from": 1.0, "to": 0.0}},
        }},
    ],
    "nd": [
        {"cross_entropy": {"on": ["gold"]}},
        {"distill": FORWARD_KL},
        {"feature": {"of": "hidden", "loss": "nd", "layers": "last", "projector": "linear"}},
    ],
    "qat-kd": [
        {"distill": FORWARD_KL},
        {"feature": {"of": "attention", "loss": "kl", "layers": "uniform", "weight": 0.5}},
        {"feature": {"of": "attention_output", "loss": "mse", "layers": "uniform", "weight": 0.5}},
    ],
    "tinybert": [
        {"feature": {"of": "attention_scores", "loss": "mse", "layers": "uniform", "projector": "head_map"}},
        {"feature": {"of": "hidden", "loss": "mse", "layers": "uniform", "projector": {"linear": {"shared": True}}}},
        {"feature": {"of": "embedding", "loss": "mse", "projector": "linear"}},
        {"distill": FORWARD_KL},
    ],
    "vkd": [
        {"cross_entropy": {"on": ["gold"]}},
        {"feature": {
            "of": "hidden", "loss": "mse", "layers": "last", "projector": "orthogonal", "normalise": "batch",
        }},
    ],
    "alm": [{"chunk_distill": {"divergence": "forward_kl", "tau": 100.0, "reduce": "token_global"}}],
    "alm-debiased": [{"chunk_distill": {
        "divergence": "forward_kl", "tau": 100.0, "debias": True, "threshold": 0.1, "reduce": "token_global",
    }}],
    "multilevelot": [{"cross_entropy": {}}, {"multilevel_distill": {
        "top": 50, "cross": 0.1, "transport": 1.0e-4, "weight": 1.5, "reduce": "sequence_mean",
    }}],
    "dskd": [{"cross_entropy": {"weight": 0.5}}, {"dual_distill": {
        **SPACES, "align": "exact", "label": "text", "agree": False, "start": "random",
    }}],
    "dskd-v2": [{"cross_entropy": {"weight": 0.5}}, {"dual_distill": {
        **SPACES, "align": "exact", "label": "teacher", "agree": True, "start": "heads",
    }}],
    "dskd-cma": [{"cross_entropy": {"weight": 0.5}}, {"dual_distill": {
        **SPACES, "align": "attention", "label": "text", "agree": True, "start": "random",
    }}],
    "gold": [{"group_distill": {
        "divergence": {"jsd": {"beta": 0.5, "scale": "paper"}}, "skip_eos": True, "reduce": "sequence_mean",
    }}],
    "simple-ctkd": [{"overlap_distill": {"divergence": "forward_kl"}}],
    "uld": [{"cross_entropy": {}}, {"sorted_distill": {"weight": 1.5}}],
    "kdrl-chunk": [GRPO, {"chunk_kl": {"estimator": "k2", "share": "chunk", "weight": 2.0e-3, "mask": "all"}}],
}  # fmt: skip

PAIRS = {"pair": {"chosen": "teacher", "rejected": "student"}}
TOLD = "{prompt}\n\nThe answer is {answer}. Explain how to find it, and end with it."


def student(group: int, **more: Any) -> dict[str, Any]:
    return {"source": "student", "rollout": {"group": group} | more}


BESIDE: dict[str, dict[str, Any]] = {
    **{name: student(8) for name in ("grpo", "dr_grpo", "rapo", "rlsd", "mopd", "tgpo", "trrd", "srpo", "demo-rl")},
    **{name: student(8) for name in ("dpo", "ipo", "simpo", "kto", "opd-then-rl", "kdrl", "kdrl-annealed")},
    **{name: student(8) for name in ("kdrl-mask-response", "kdrl-mask-group", "kdrl-chunk")},
    "kdrl-shaped": student(8, prompts=128) | {"optimizer": {"minibatches": 2}},
    "gspo": student(8) | {"optimizer": {"minibatches": 4}},
    "cispo": student(16),
    "dapo": student(16, dynamic_sampling=8),
    "infalign": student(16),
    "oreal": student(16, prompts=64),
    "luffy": {
        "source": {"guided": 1},
        "rollout": {"prompts": 128, "group": 8},
        "optimizer": {"minibatches": 2},
    },
    "minillm": {
        "source": {"mixed": {"share": 0.2, "weights": "token"}},
        "rollout": {"prompts": 256, "group": 1},
        "optimizer": {"epochs": 4},
    },
    "hdpo": {"source": {"privileged": {"template": TOLD}}, "rollout": {"group": 8}},
    "xpo": {"source": {"guided": 1}, "rollout": {"prompts": 64, "group": 2}},
    "plad": {"source": PAIRS, "rollout": {"prompts": 32, "group": 1}},
    "dpkd-sequence": {"source": PAIRS, "rollout": {"prompts": 32, "group": 1}},
    "redi": {"source": {"traces": {"path": "traces.jsonl", "take": "pair"}}, "rollout": {"prompts": 32, "group": 2}},
    **{name: {"source": "gold"} for name in ("alm", "alm-debiased", "multilevelot", "simple-ctkd", "uld")},
    **{name: {"source": "gold"} for name in ("dskd", "dskd-v2", "dskd-cma")},
    **{name: {"source": "gold", "rollout": {"group": 1}} for name in ("align-to-distill", "nd", "tinybert", "vkd")},
    "qat-kd": {"source": "gold", "student": {"quantise": {"bits": 4}}, "rollout": {"group": 1}},
    "gold": {"source": {"mixture": 0.5}, "rollout": {"group": 1}},
}
