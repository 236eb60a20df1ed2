"""The identities of the family: one formula under many names, in value and, where it speaks of one, gradient.

References are numpy formulas with a complex step; kdrl's side goes through `kdrl.divergence`, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from kdrl.objectives.distill import DistillConfig

from .numbers import Array, ab, data, entropy, kdrl_of, kl, mean, norm, pair, sm, stepped, term_of
from .reference import close

SEEDS = (1, 2, 3)
every_seed = pytest.mark.parametrize("seed", SEEDS)
Y = 4


def same(found: tuple[Any, Array], expected: tuple[Any, Array], tolerance: float = 1e-9) -> None:
    close(found[0], expected[0], tolerance)
    close(found[1], expected[1], tolerance)


def weighted(*parts: tuple[float, tuple[Any, Array]]) -> tuple[Any, Array]:
    return sum(w * value for w, (value, _) in parts), np.sum([w * slope for w, (_, slope) in parts], 0)


def of(divergence: Any, teacher: Array, student: Array, **more: Any) -> tuple[Any, Array]:
    return kdrl_of({"divergence": divergence, **more}, teacher, student, Y)


@every_seed
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_1_jensen_shannon_is_a_weighted_pair_of_skewed_kls(beta: float, seed: int):
    """J_b = b SKL_b + (1-b) SRKL_{1-b}: GKD's loss is both of DistiLLM's with linked skews."""
    zt, zs = pair(seed)
    p = sm(zt)
    found = of({"jsd": {"beta": beta, "scale": "paper"}}, zt, zs)

    def formula(z: Array) -> Any:
        q = sm(z)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    same(found, stepped(formula, zs))
    skewed = of({"skew_kl": beta}, zt, zs), of({"skew_reverse_kl": 1 - beta}, zt, zs)
    same(found, weighted((beta, skewed[0]), (1 - beta, skewed[1])))


@every_seed
def test_2_jensen_shannon_tends_to_the_kls_only_when_rescaled(seed: int):
    """J_b / b to KL(p||q) as b falls to 0, J_b / (1-b) to KL(q||p) as it rises to 1; unscaled, both ends are zero."""
    zt, zs = pair(seed)
    tiny = 1e-6
    for beta, end in ((tiny, "forward_kl"), (1 - tiny, "reverse_kl")):
        paper = of({"jsd": {"beta": beta, "scale": "paper"}}, zt, zs)
        whole = of(end, zt, zs)
        same(weighted((1 / tiny, paper)), whole, 1e-4)
        assert paper[0] < 10 * tiny * whole[0]
        same(of({"jsd": beta}, zt, zs), whole, 1e-4)
    same(of({"jsd": 0.0}, zt, zs), of("forward_kl", zt, zs))
    same(of({"jsd": 1.0}, zt, zs), of("reverse_kl", zt, zs))


@every_seed
@pytest.mark.parametrize("lam", [0.9, 0.3])
def test_3_distillms_js_of_lam_is_the_generalised_one_of_one_minus_lam(lam: float, seed: int):
    zt, zs = pair(seed)
    p = sm(zt)

    def js(z: Array) -> Any:
        q = sm(z)
        m = lam * q + (1 - lam) * p
        return lam * kl(q, m) + (1 - lam) * kl(p, m)

    same(of({"jsd": {"beta": 1 - lam, "scale": "paper"}}, zt, zs), stepped(js, zs))


@every_seed
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_4_the_means_by_their_names_and_what_attaching_the_geometric_one_does(share: float, seed: int):
    """M_{-1} is a mixture, M_1 a softmax of mixed logits, M_3 harmonic.

    Attached, KL(q||M_1) = share KL(q||p) + log sum p^share q^(1-share): another method than the detached one.
    """
    zt, zs = pair(seed)
    p = sm(zt)
    means = {
        -1: lambda q: share * p + (1 - share) * q,
        1: lambda q: sm(share * zt + (1 - share) * np.log(q)),
        3: lambda q: norm(1 / (share / p + (1 - share) / q)),
    }
    for a, r in means.items():
        for detach in (False, True):
            spec = {"arms": [{"of": "q||r"}], "assistant": {"a": a, "share": share, "detach": detach}}
            hold = data if detach else lambda x: x
            same(of(spec, zt, zs), stepped(lambda z, r=r, hold=hold: kl(sm(z), r(hold(sm(z)))), zs))
    same(
        of({"arms": [{"of": "q||r"}], "assistant": {"a": -1, "share": share}}, zt, zs),
        of({"skew_reverse_kl": 1 - share}, zt, zs),
    )
    attached = of({"arms": [{"of": "q||r"}], "assistant": {"a": 1, "share": share}}, zt, zs)
    detached = of({"arms": [{"of": "q||r"}], "assistant": {"a": 1, "share": share, "detach": True}}, zt, zs)
    close(attached[0], detached[0])
    assert np.abs(attached[1] - detached[1]).max() > 1e-3
    same(attached, stepped(lambda z: share * kl(sm(z), p) + np.log((p**share * sm(z) ** (1 - share)).sum()), zs))


@every_seed
@pytest.mark.parametrize("s", [0.2, 0.4, 0.95])
def test_5_taids_gradient_is_the_student_minus_the_mean_with_itself_as_data(s: float, seed: int):
    zt, zs = pair(seed)
    spec = {"arms": [{"of": "r||q"}], "assistant": {"a": 1, "share": s, "detach": True}}
    value, gradient = of(spec, zt, zs)
    r, q = sm((1 - s) * zs + s * zt), sm(zs)
    close(gradient, q - r)
    close(value, kl(r, q))


@every_seed
@pytest.mark.parametrize("tilt", [0.3, 0.8, 1.0])
def test_6_vetos_target_is_the_geometric_mean_of_share_one_over_one_plus_tilt_to_the_power_one_plus_tilt(
    tilt: float, seed: int
):
    zt, zs = pair(seed)
    p, q = sm(zt), sm(zs)
    target = norm(p * q**tilt)
    close(norm(mean(p, q, 1, 1 / (1 + tilt)) ** (1 + tilt)), target)
    for order, formula in (
        ("r||q", lambda z, r: kl(r, sm(z))),
        ("q||r", lambda z, r: kl(sm(z), r)),
    ):
        for detach in (True, False):
            spec = {"arms": [{"of": order}], "assistant": {"tilt": tilt, "detach": detach}}
            hold = data if detach else lambda x: x
            same(
                of(spec, zt, zs),
                stepped(lambda z, f=formula, hold=hold: f(z, norm(p * hold(sm(z)) ** tilt)), zs),
            )


def head_share(p: Array, q: Array, mu: float = 0.5) -> float:
    """AKL's share of the gap in the teacher's head, token by token."""
    mass, head, rest = 0.0, 0.0, 0.0
    for v in np.argsort(-p):
        if mass < mu:
            head += abs(p[v] - q[v])
        else:
            rest += abs(p[v] - q[v])
        mass += p[v]
    return float(head / (head + rest))


TODI = [
    {"of": "p||q", "gate": "sigmoid_log_ratio"},
    {"of": "q||p", "gate": "sigmoid_log_ratio_q"},
]
HIGHER_P = {"above": {"of": "entropy_gap", "value": 0}}
HIGHER_Q = {"below": {"of": "entropy_gap", "value": 0}}
WEIGHED: dict[str, tuple[Any, Any]] = {
    "torchtune and NeMo": ({"symmetric": 0.5}, lambda p, q: (0.5, 0.5)),
    "CAKLD": ({"symmetric": 0.65}, lambda p, q: (0.65, 0.35)),
    "AKL": (
        {"arms": [{"of": "p||q", "gate": "head_gap"}, {"of": "q||p", "gate": {"one_minus": "head_gap"}}]},
        lambda p, q: (head_share(p, q), 1 - head_share(p, q)),
    ),
    "BD-KD": (
        {
            "arms": [
                {"of": "p||q", "gate": {"choose": {"where": HIGHER_P, "then": 3, "otherwise": 1}}},
                {"of": "q||p", "gate": {"choose": {"where": HIGHER_Q, "then": 3, "otherwise": 1}}},
            ]
        },
        lambda p, q: (3, 1) if entropy(p) > entropy(q) else (1, 3),
    ),
    "EOPD": (
        {"arms": [{"of": "q||p"}, {"of": "p||q", "gate": {"above": {"of": "entropy_p", "value": 1.2}}}]},
        lambda p, q: (float(entropy(p) > 1.2), 1.0),
    ),
}


@every_seed
@pytest.mark.parametrize("name", WEIGHED)
def test_7_five_methods_are_weighted_sums_of_the_two_kls(name: str, seed: int):
    zt, zs = pair(seed)
    spec, weights = WEIGHED[name]
    forward, reverse = weights(sm(zt), sm(zs))
    parts = (float(forward), of("forward_kl", zt, zs)), (float(reverse), of("reverse_kl", zt, zs))
    same(of(spec, zt, zs), weighted(*parts))


def test_7_the_seeds_see_both_sides_of_every_threshold():
    pairs = [pair(seed) for seed in SEEDS]
    for name in ("BD-KD", "EOPD"):
        assert len({WEIGHED[name][1](sm(zt), sm(zs)) for zt, zs in pairs}) == 2, name


@every_seed
def test_7_todis_value_is_jeffreys_and_its_gradient_is_not(seed: int):
    zt, zs = pair(seed)
    p = sm(zt)

    def todi(z: Array) -> Any:
        q = sm(z)
        w = p / (p + data(q))
        return (w * p * np.log(p / q) + (1 - w) * q * np.log(q / p)).sum()

    found, jeffreys = of({"arms": TODI}, zt, zs), weighted((2.0, of({"symmetric": 0.5}, zt, zs)))
    same(found, stepped(todi, zs))
    q = sm(zs)
    w = p / (p + q)
    # With p/(p+q) as weights the summand is (p^2 - q^2)/(p+q) log(p/q) = (p-q) log(p/q).
    close(found[0], (w * p * np.log(p / q) + (1 - w) * q * np.log(q / p)).sum())
    close(found[0], jeffreys[0])
    assert np.abs(found[1] - jeffreys[1]).max() > 1e-3


@every_seed
@pytest.mark.parametrize("rho", [0.25, 0.8])
def test_8_cross_entropy_beside_forward_kl_is_a_label_in_the_target(rho: float, seed: int):
    """Up to a constant of the student, and for forward KL at temperature 1 alone; elsewhere it is refused."""
    zt, zs = pair(seed)
    p = sm(zt)

    def two_terms(z: Array) -> Any:
        return -rho * np.log(sm(z)[Y]) + (1 - rho) * kl(p, sm(z))

    spec = {"divergence": "forward_kl", "target": {"label_mix": rho}}
    found, expected = kdrl_of(spec, zt, zs, Y), stepped(two_terms, zs)
    close(found[1], expected[1])
    target = (1 - rho) * p + rho * np.eye(len(p))[Y]
    close(found[0], kl(target, sm(zs)))
    other = pair(seed + 10)[1]
    moved, elsewhere = kdrl_of(spec, zt, other, Y), stepped(two_terms, other)
    close(found[0] - expected[0], moved[0] - elsewhere[0])


@pytest.mark.parametrize("more", [{"divergence": "reverse_kl"}, {"target": {"student_temperature": 2.0}}], ids=str)
def test_8_where_it_is_false_it_is_refused(more: Any):
    spec = {"divergence": "forward_kl", **more, "target": {"label_mix": 0.5} | more.get("target", {})}
    with pytest.raises(ValidationError, match=r"cross.entropy term"):
        DistillConfig.model_validate(spec)


def parts_of(p: Array, y: int) -> tuple[Array, Array]:
    """(p_y, 1 - p_y) and the others renormalised."""
    rest = np.delete(p, y)
    return np.array([p[y], rest.sum()]), norm(rest)


@every_seed
def test_9_forward_kl_is_the_label_part_and_one_minus_p_y_of_the_rest(seed: int):
    zt, zs = pair(seed)
    plain = of("forward_kl", zt, zs)
    whole = {"decouple": {"label": 1, "rest": {"one_minus": "label_p"}}}
    same(of("forward_kl", zt, zs, target=whole), plain)
    (two, rest), p_y = parts_of(sm(zt), Y), sm(zt)[Y]
    for label, others in ((1, 8), (0.2, 0), (0, 1)):

        def dkd(z: Array, label: float = label, others: float = others) -> Any:
            two_q, rest_q = parts_of(sm(z), Y)
            return label * kl(two, two_q) + others * kl(rest, rest_q)

        found = of("forward_kl", zt, zs, target={"decouple": {"label": label, "rest": others}})
        same(found, stepped(dkd, zs))
    tckd = of("forward_kl", zt, zs, target={"decouple": {"label": 1, "rest": 0}})
    nckd = of("forward_kl", zt, zs, target={"decouple": {"label": 0, "rest": 1}})
    same(weighted((1.0, tckd), (1 - p_y, nckd)), plain)


@every_seed
def test_9_atkd_drops_the_weight_and_gates_the_label_part(seed: int):
    """Easy: the rest alone; hard: both, unweighted; hard where 1 - p_y is high."""
    zt, zs = pair(seed)
    (two, rest), p_y = parts_of(sm(zt), Y), sm(zt)[Y]
    for threshold in (0.0, 1.0):
        hard = 1 - p_y > threshold
        gate = {"above": {"of": {"one_minus": "label_p"}, "value": threshold}}
        found = of("forward_kl", zt, zs, target={"decouple": {"label": gate, "rest": 1}})

        def atkd(z: Array, hard: bool = hard) -> Any:
            two_q, rest_q = parts_of(sm(z), Y)
            return hard * kl(two, two_q) + kl(rest, rest_q)

        same(found, stepped(atkd, zs))


@every_seed
def test_9_nkd_is_the_labels_cross_entropy_and_a_weighted_rest(seed: int):
    """NKD = CE-form TCKD + (1-p_y) log(1-q_y) + gamma CE-form NCKD; kdrl adds the target's entropy, a constant."""
    zt, zs = pair(seed)
    p, gamma = sm(zt), 1.5
    two, rest = parts_of(p, Y)

    def nkd(z: Array) -> Any:
        two_q, rest_q = parts_of(sm(z), Y)
        return -p[Y] * np.log(two_q[0]) - gamma * (rest * np.log(rest_q)).sum()

    def as_in_the_list(z: Array) -> Any:
        two_q, rest_q = parts_of(sm(z), Y)
        tckd, nckd = -(two * np.log(two_q)).sum(), -(rest * np.log(rest_q)).sum()
        return tckd + (1 - p[Y]) * np.log(two_q[1]) + gamma * nckd

    expected = stepped(nkd, zs)
    same(stepped(as_in_the_list, zs), expected)
    decouple = {"label": 1, "rest": gamma, "label_only": True}
    found = of("forward_kl", zt, zs, target={"decouple": decouple})
    close(found[1], expected[1])
    close(found[0], expected[0] + p[Y] * np.log(p[Y]) - gamma * entropy(rest))


@every_seed
@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_10_ttm_is_a_teacher_temperature_and_wttm_weighs_it(gamma: float, seed: int):
    zt, zs = pair(seed)
    target = norm(sm(zt) ** gamma)
    expected = stepped(lambda z: kl(target, sm(z)), zs)
    powered = of("forward_kl", zt, zs, target={"power": gamma})
    same(powered, expected)
    same(of("forward_kl", zt, zs, target={"teacher_temperature": 1 / gamma}), expected)
    z_weight = (sm(zt) ** gamma).sum()
    weighed = of("forward_kl", zt, zs, target={"power": gamma}, scale={"power_sum_p": gamma})
    same(weighed, weighted((z_weight, expected)))


@every_seed
def test_11_logit_matching_high_temperature_kl_and_concrete_scores_are_one(seed: int):
    """CSD uniform = Var(d) = 2 lim T^2 KL_T; CSD student = Var_q(d), twice KL's second-order expansion."""
    zt, zs = pair(seed)
    d = zs - zt
    uniform = of({"pair": ["uniform", "uniform"]}, zt, zs)
    close(uniform[0], d.var())
    close(uniform[1], 2 * (d - d.mean()) / len(d))
    t = 1e4
    hot = of("forward_kl", zt, zs, target={"teacher_temperature": t, "student_temperature": t, "rescale": True})
    same(weighted((2.0, hot)), uniform, 1e-3)

    student = of({"pair": ["student", "student"]}, zt, zs)
    q = sm(zs)
    close(student[0], (q * d**2).sum() - (q * d).sum() ** 2)
    # The weights are data: the gradient is that of the variance at fixed q.
    close(student[1], 2 * q * (d - (q * d).sum()))
    near = 1e-4
    almost = of("forward_kl", zs - near * d, zs)
    close(2 * almost[0] / near**2, student[0], 1e-3)


@every_seed
def test_11_any_two_weights_are_the_double_sum_over_pairs(seed: int):
    zt, zs = pair(seed)
    p, q, u = sm(zt), sm(zs), np.full(len(zs), 1 / len(zs))
    weights = {"teacher": p, "student": q, "uniform": u}
    for one, w1 in weights.items():
        for two, w2 in weights.items():

            def pairs(z: Array, w1: Array = w1, w2: Array = w2) -> Any:
                d = z - zt
                return 0.5 * (np.outer(w1, w2) * (d[:, None] - d[None, :]) ** 2).sum()

            same(of({"pair": [one, two]}, zt, zs), stepped(pairs, zs))


@every_seed
def test_12_the_two_exponents_name_five_divergences(seed: int):
    zt, zs = pair(seed)
    p = sm(zt)
    named = {
        (1, 0): lambda z: kl(p, sm(z)),
        (0, 1): lambda z: kl(sm(z), p),
        (0.5, 0.5): lambda z: 2 * ((np.sqrt(p) - np.sqrt(sm(z))) ** 2).sum(),
        (1, 1): lambda z: 0.5 * ((p - sm(z)) ** 2).sum(),
        (0.2, 0.7): lambda z: ab(p, sm(z), 0.2, 0.7),
    }
    for (alpha, beta), formula in named.items():
        same(of({"alpha_beta": {"alpha": alpha, "beta": beta}}, zt, zs), stepped(formula, zs))


def expected_over(weights: Array, spec: Any, zt: Array, zs: Array, **more: Any) -> tuple[Any, Array]:
    """Mean value and gradient over all tokens, each sampled with the probability given."""
    found = [kdrl_of(spec, zt, zs, y, **more) for y in range(len(zs))]
    return weighted(*((w, f) for w, f in zip(weights, found, strict=True)))


@every_seed
def test_13_what_sampled_tokens_teach_in_expectation(seed: int):
    """On the student's samples k1 as advantage, k2 and straight-through k3 descend KL(q||p), k3 as a loss KL(p||q)."""
    zt, zs = pair(seed)
    q = sm(zs)
    forward, reverse = of("forward_kl", zt, zs), of("reverse_kl", zt, zs)
    for token in ("k1", "k2", "k3"):
        _, gradient = expected_over(q, {"support": {"token": token}, "clamp": None}, zt, zs)
        close(gradient, reverse[1])
    as_loss = {"divergence": "forward_kl", "support": {"token": {"estimator": "k3", "as": "loss"}}, "clamp": None}
    value, gradient = expected_over(q, as_loss, zt, zs)
    close(gradient, forward[1])
    close(value, reverse[0])  # k3's value estimates the reverse KL all the same

    # Differentiated itself, k1 = log q - log p teaches nothing, and is refused.
    p = sm(zt)
    bare = [stepped(lambda z, y=y: np.log(sm(z)[y]) - np.log(p[y]), zs)[1] for y in range(len(zs))]
    close((q[:, None] * bare).sum(0), np.zeros(len(zs)), 1e-12)
    with pytest.raises(ValidationError, match="expected gradient is zero and holds no teacher"):
        DistillConfig.model_validate({"support": {"token": {"estimator": "k1", "as": "loss"}}})


@every_seed
def test_14_top_k_gradients_and_the_mean_of_draws(seed: int):
    """The truncations of the catalogue's table; more of them in test_support, the draws' enumeration in test_draws."""
    zt, zs = pair(seed)
    p, q, k = sm(zt), sm(zs), 3
    inside = np.zeros(len(p), bool)
    inside[np.argsort(-p)[:k]] = True
    p_k, mass_p, mass_q = p * inside, p[inside].sum(), q[inside].sum()
    tail = np.where(inside, q - p, q * (1 - (1 - mass_p) / (1 - mass_q)))
    table = {
        "tail": tail,
        "renormalise_teacher": q - p_k / mass_p,
        "partial": mass_p * q - p_k,
        "renormalise": inside * (q / mass_q - p / mass_p),
    }
    for rest, gradient in table.items():
        close(of("forward_kl", zt, zs, support={"topk": {"k": k, "rest": rest}})[1], gradient)


@every_seed
def test_15_one_token_chunks_at_temperature_one_are_the_label_part_of_the_realised_token(seed: int):
    """ALM's same-tokenizer half: KL of (P, 1-P) over a chunk of one token. Chunks over several tokens, and the bias
    mask, come with the alignment of other vocabularies; here their limit is checked on the formula alone: with
    P^(1/tau) for P, tau times the binary KL tends to the I-divergence of the surprisals s = -log P as tau grows."""
    zt, zs = pair(seed)
    p_y = sm(zt)[Y]

    def alm(z: Array) -> Any:
        q_y = sm(z)[Y]
        return p_y * np.log(p_y / q_y) + (1 - p_y) * np.log((1 - p_y) / (1 - q_y))

    found = of("forward_kl", zt, zs, target={"decouple": {"label": 1, "rest": 0}})
    same(found, stepped(alm, zs))

    tau, (a, b) = 1e5, (-np.log(p_y), -np.log(sm(zs)[Y]))
    x, y = np.exp(-a / tau), np.exp(-b / tau)
    binary = x * np.log(x / y) + (1 - x) * np.log((1 - x) / (1 - y))
    close(tau * binary, a * np.log(a / b) - a + b, 1e-3)


@every_seed
def test_16_sorted_distances_see_the_profile_only(seed: int):
    """ULD(p, permuted p) = 0. kdrl compares sorted profiles with the alignment of other vocabularies, which is not
    here; the formula is checked alone, with the contrast that every divergence here does see a permutation."""
    zt, _ = pair(seed)
    p, order = sm(zt), np.random.default_rng(seed).permutation(len(zt))

    def uld(one: Array, two: Array) -> float:
        return float(np.abs(np.sort(one) - np.sort(two)).sum())

    assert uld(p, p[order]) < 1e-15
    assert uld(p, sm(pair(seed)[1])) > 1e-2
    for divergence in ("forward_kl", "reverse_kl", "tv", {"jsd": 0.5}):
        assert of(divergence, zt, zt[order])[0] > 1e-2


@every_seed
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.25, 2.0])
def test_17_a_scaled_log_ratio_reward_under_a_kl_to_the_reference_has_the_product_as_optimum(eta: float, seed: int):
    """max_q E_q[eta log(p/ref)] - KL(q||ref), in one state: optimum ref^(1-eta) p^eta; the objective is minus KL to it.

    For whole sequences it is the optimum token by token with the teacher's log-ratio of the next token as reward alone
    (no credit for later ones), which is what a token-local gradient descends.
    """
    zt, zs = pair(seed)
    zr = pair(seed + 20)[1]
    p, ref = sm(zt), sm(zr)
    best = norm(ref ** (1 - eta) * p**eta)

    def objective(q: Array) -> Any:
        return eta * (q * np.log(p / ref)).sum() - kl(q, ref)

    spec = {"divergence": "reverse_kl", "target": {"product": eta}}
    value, gradient = kdrl_of(spec, zt, zs, Y, reference=zr)
    close(value, kl(sm(zs), best))
    close(gradient, -stepped(lambda z: objective(sm(z)), zs)[1])
    close(kdrl_of(spec, zt, np.log(best), Y, reference=zr)[1], np.zeros(len(p)), 1e-12)

    # By search over the whole simplex on a grid, with three tokens.
    p, ref = sm(zt[:3]), sm(zr[:3])
    best = norm(ref ** (1 - eta) * p**eta)
    share = np.linspace(0.005, 0.995, 199)
    grid = [np.array([a, (1 - a) * b, (1 - a) * (1 - b)]) for a in share for b in share]
    top = grid[int(np.argmax([objective(q) for q in grid]))]
    assert np.abs(top - best).max() < 0.01
    assert objective(best) >= objective(top) - 1e-12

    # Sampled tokens know the product up to its constant, which the expected gradient does not see.
    sampled = {"support": {"token": "k1"}, "clamp": None, "target": {"product": eta}}
    close(expected_over(sm(zs), sampled, zt, zs, reference=zr)[1], gradient)


@every_seed
def test_the_term_of_a_run_and_the_function_on_logits_are_one_arithmetic(seed: int):
    zt, zs = pair(seed)
    for spec in ({"divergence": {"arms": TODI}}, {"divergence": "forward_kl", "target": {"label_mix": 0.3}}, {}):
        same(kdrl_of(spec, zt, zs, Y), term_of(spec, zt, zs, Y))
