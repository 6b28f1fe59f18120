"""Properties of every bound as a function of log-weights: identities, derivatives, invariances, extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
from every_objective import CIWAE, ELBO, IWAE, MIWAE, PIWAE, REINFORCE, RWS, TVO, UMIWAE, VIMCO, VR
from torch import Tensor

from iwae_cli.core.numerics import log_mean_exp, log_mean_exp_of_others
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.objectives.base import BoundObjective, Objective, weighted_sum
from iwae_cli.objectives.jvi import JVI, jackknife

K = 6
INF = math.inf

SMOOTH: dict[str, BoundObjective] = {
    "elbo": ELBO(K),
    "iwae": IWAE(K),
    "vr0.5": VR(K, 0.5),
    "vr-0.7": VR(K, -0.7),
    "vr2.5": VR(K, 2.5),
    "ciwae0.3": CIWAE(K, 0.3),
    "miwae2x3": MIWAE(2, 3),
    "miwae3x2": MIWAE(3, 2),
    "tvo-log": TVO(K),
    "tvo-linear": TVO(K, partitions=3, schedule="linear"),
    "jvi": JVI(K),
}
EVERY: dict[str, Objective] = {
    **SMOOTH,
    "vr-max": VR(K, "max"),
    "piwae2x3": PIWAE(2, 3),
    "rws": RWS(K),
    "rws-dreg": RWS(K, gradient="dreg"),
    "vimco": VIMCO(K),
    "reinforce": REINFORCE(K),
}
every = pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY.keys())


def random_log_w(k: int = K, batch: int = 40, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(k, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def gradient_of(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    log_w = log_w.clone().requires_grad_()
    return torch.autograd.grad(bound(log_w).sum(), log_w)[0]


def same(a: BoundObjective, b: BoundObjective, log_w: Tensor) -> None:
    for method in ("bound", "weights", "doubly_weights"):
        torch.testing.assert_close(getattr(a, method)(log_w), getattr(b, method)(log_w), rtol=1e-12, atol=1e-13)


# The derivatives


DIFFERENTIABLE = SMOOTH | {"umiwae": UMIWAE(2, 3, 7)}


@pytest.mark.parametrize(
    "objective",
    [*DIFFERENTIABLE.values(), VR(K, "max"), TVO(K, 4, "moments")],
    ids=[*DIFFERENTIABLE, "vr-max", "tvo-moments"],
)
def test_weights_are_the_derivative_of_the_bound(objective):
    log_w = random_log_w()
    torch.testing.assert_close(objective.weights(log_w), gradient_of(objective.bound, log_w), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_doubly_weights_are_the_weights_less_the_diagonal_of_the_hessian(objective):
    log_w = random_log_w(batch=5)
    hessian = torch.stack(
        [
            torch.autograd.functional.hessian(lambda column: objective.bound(column[:, None]).sum(), column).diagonal()
            for column in log_w.T
        ],
        dim=1,
    )
    # Of a bound that is not linear in log w, so that the second derivative has been seen.
    assert (hessian.abs().max() > 0.01) == (not isinstance(objective, ELBO))
    expected = objective.weights(log_w) - hessian
    torch.testing.assert_close(objective.doubly_weights(log_w), expected, rtol=1e-9, atol=1e-10)


# Identities


@pytest.mark.parametrize("k", [1, 2, 5])
def test_identities(k):
    log_w = random_log_w(k)
    same(CIWAE(k, 0.0), IWAE(k), log_w)
    same(CIWAE(k, 1.0), ELBO(k), log_w)
    same(VR(k, 0.0), IWAE(k), log_w)
    same(MIWAE(1, k), IWAE(k), log_w)
    same(MIWAE(k, 1), ELBO(k), log_w)
    same(TVO(k, partitions=1), ELBO(k), log_w)
    same(TVO(k, partitions=1, schedule="linear"), ELBO(k), log_w)
    same(PIWAE(1, k).inference, IWAE(k), log_w)
    same(PIWAE(k, 1).inference, ELBO(k), log_w)
    torch.testing.assert_close(PIWAE(1, k).bound(log_w), IWAE(k).bound(log_w))
    torch.testing.assert_close(ELBO(k).weights(log_w), ELBO(k).doubly_weights(log_w))
    if k > 1:
        torch.testing.assert_close(VIMCO(k).bound(log_w), IWAE(k).bound(log_w))
    torch.testing.assert_close(RWS(k, "sleep").bound(log_w), IWAE(k).bound(log_w))


@pytest.mark.parametrize(
    "objective",
    [
        IWAE(1), VR(1, 0.5), VR(1, -2.0), VR(1, 3.0), VR(1, "max"), CIWAE(1, 0.3), MIWAE(1, 1), TVO(1),
        TVO(1, 3, "linear"), PIWAE(1, 1), RWS(1, "sleep"),
    ],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_one_sample_is_the_sampled_elbo(objective):
    log_w = random_log_w(1)
    torch.testing.assert_close(objective.bound(log_w), log_w[0], rtol=1e-12, atol=1e-13)


def test_renyi_bounds_are_ordered_in_alpha_and_meet_the_elbo_and_the_maximum():
    log_w = random_log_w()
    alphas = (-50.0, -1.0, 0.0, 0.5, 1 - 1e-7, 1 + 1e-7, 2.0, 50.0)
    bounds = [VR(K, "max").bound(log_w), *(VR(K, alpha).bound(log_w) for alpha in alphas)]
    for higher, lower in pairwise(bounds):
        assert (higher >= lower - 1e-12).all()
    torch.testing.assert_close(VR(K, 1 - 1e-7).bound(log_w), ELBO(K).bound(log_w), rtol=0, atol=1e-5)
    # log k/51 is how far the mean of powers lies below the largest.
    torch.testing.assert_close(bounds[1], log_w.amax(0), rtol=0, atol=math.log(K) / 51 + 1e-12)


def test_an_order_near_one_has_a_caveat():
    assert [bool(VR(5, alpha).caveats) for alpha in (0.9, 0.9995, 1.0005, 1.1)] == [False, True, True, False]


def test_thermodynamic_sums_hold_the_importance_weighted_bound_between_them():
    log_w = random_log_w()
    elbo, iwae = ELBO(K).bound(log_w), IWAE(K).bound(log_w)
    for schedule in ("log", "linear"):
        previous = elbo
        for partitions in (2, 4, 8):
            tvo = TVO(K, partitions, schedule)
            left = tvo.bound(log_w)
            points = tvo.points(log_w)
            right = sum((b - a) * (torch.softmax(b * log_w, 0) * log_w).sum(0) for a, b in pairwise(points))
            torch.testing.assert_close(tvo.right_sum(log_w), right)
            assert (elbo < left).all() and (left < iwae).all() and (iwae < right).all()
            if schedule == "linear":  # every point of the coarser partition is one of the finer
                assert (previous < left).all()
                previous = left
    torch.testing.assert_close(TVO(K, 1000, "linear").bound(log_w), iwae, rtol=0, atol=5e-3)


def test_thermodynamic_points():
    log_w = random_log_w(5)
    assert TVO(5, 4, "linear").points(log_w) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert TVO(5, 4, "log", beta_1=0.001).points(log_w) == pytest.approx([0, 0.001, 0.01, 0.1, 1])
    assert TVO(5, 2, beta_1=0.03).points(log_w) == pytest.approx([0, 0.03, 1])


def test_moments_places_the_points_where_the_integrand_rises_by_equal_steps():
    log_w, tvo = random_log_w(50), TVO(50, 4, "moments")
    points = tvo.points(log_w)
    moments = torch.stack([(torch.softmax(beta * log_w, 0) * log_w).sum(0) for beta in points])
    steps = moments.diff(dim=0)
    assert (moments[-1] - moments[0]).min() > 1
    # The slope of the integrand is the variance of log w, at most some tens here, and a point errs by 2^-20.
    torch.testing.assert_close(steps, ((moments[-1] - moments[0]) / 4).expand(4, -1), rtol=0, atol=1e-3)
    bound = tvo.bound(log_w)
    assert (ELBO(50).bound(log_w) < bound).all() and (bound < IWAE(50).bound(log_w)).all()
    same(TVO(50, 1, "moments"), ELBO(50), log_w)
    equal = torch.full((6, 2), -90.0, dtype=torch.float64)
    torch.testing.assert_close(TVO(6, 4, "moments").bound(equal), equal[0])
    extremes = TVO(6, 4, "moments").bound(EXTREMES)
    assert extremes.isneginf().tolist() == [False, True, False, True, True]
    assert gradient_of(TVO(6, 4, "moments").bound, EXTREMES).isfinite().all()


# Regrouped draws


def test_regrouped_draws_are_an_incomplete_u_statistic():
    log_w = random_log_w(4, batch=20)
    pairs = list(combinations(range(4), 2))
    complete = torch.stack([log_w[[*pair]].logsumexp(0) - math.log(2) for pair in pairs]).mean(0)
    error = [(UMIWAE(2, 2, orders).bound(log_w) - complete).abs().max().item() for orders in (50, 5000)]
    # An order is one of three pairings: the mean over 5,000 of them errs by less than a nat / sqrt(5,000) times 4.
    assert error[1] < 0.06 < error[0]
    same(UMIWAE(2, 2, 1), MIWAE(2, 2), log_w)
    same(UMIWAE(1, 4, 3), IWAE(4), log_w)
    same(UMIWAE(4, 1, 3), ELBO(4), log_w)
    assert UMIWAE(2, 3).bound(EXTREMES).isneginf().tolist() == [False, False, False, True, True]
    assert gradient_of(UMIWAE(2, 3).bound, EXTREMES).isfinite().all()


# The jackknife


def direct_jackknife(log_w: Tensor) -> Tensor:
    k = log_w.shape[0]
    without = [torch.cat([log_w[:j], log_w[j + 1 :]]).logsumexp(0) - math.log(k - 1) for j in range(k)]
    return k * (log_w.logsumexp(0) - math.log(k)) - (k - 1) * torch.stack(without).mean(0)


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
def test_jackknife_is_its_formula(k, spread):
    log_w = random_log_w(k, spread=spread)
    torch.testing.assert_close(jackknife(log_w), direct_jackknife(log_w), rtol=1e-10, atol=1e-10)


def test_jackknife_removes_the_bias_of_order_one_over_k():
    # Of log-normal weights with s = 1/2, whose log mean is s^2/2: the bias of L_k is -(e^{s^2} - 1)/2k + O(1/k^2).
    s, k, repeats = 0.5, 8, 400_000
    log_w = s * torch.randn(k, repeats, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    error = log_mean_exp(log_w) - s**2 / 2
    plain, corrected = error.mean().item(), (jackknife(log_w) - s**2 / 2).mean().item()
    stderr = error.std().item() / math.sqrt(repeats)
    assert plain == pytest.approx(-(math.exp(s**2) - 1) / (2 * k), abs=0.002)
    assert abs(corrected) < 0.1 * abs(plain) + 4 * stderr


def test_one_weight_alone_has_no_jackknife():
    log_w = torch.tensor([[0.0, 0.0, -INF], [-INF, -INF, -INF], [-INF, -3.0, -INF]], dtype=torch.float64)
    value = jackknife(log_w)
    assert value[0].isnan() and value[1].isfinite() and value[2] == -INF


def test_the_mean_of_the_others_keeps_its_digits():
    log_w = torch.tensor([[0.0, 1e4], [-60.0, 1e4 - 60], [-61.0, 1e4 - 800]], dtype=torch.float64)
    others = log_mean_exp_of_others(log_w)
    # Computed as log(sum - w), the first would be log(0): 60 nats are more than 53 bits.
    assert others[0, 0].item() == pytest.approx(-60 + math.log1p(math.exp(-1)) - math.log(2), abs=1e-12)
    assert others[0, 1].item() == pytest.approx(1e4 - 60 - math.log(2), abs=1e-9)
    assert others[1, 0].item() == pytest.approx(-math.log(2), abs=1e-12)
    with pytest.raises(ValueError, match="log_w must hold at least 2"):
        log_mean_exp_of_others(log_w[:1])


# Invariances and extremes


@every
def test_a_common_factor_of_the_weights_is_a_shift_of_the_bound(objective):
    log_w = random_log_w()
    for shift in (-1e4, 1e4):
        torch.testing.assert_close(objective.bound(log_w + shift), objective.bound(log_w) + shift, rtol=0, atol=1e-8)
        if isinstance(objective, BoundObjective):
            torch.testing.assert_close(objective.weights(log_w + shift), objective.weights(log_w), rtol=0, atol=1e-8)


@every
def test_the_order_of_exchangeable_draws_does_not_matter(objective):
    log_w = random_log_w()
    if isinstance(objective, MIWAE):
        groups = log_w.unflatten(0, (objective.m, objective.k))
        orders = [
            groups.flip(0).flatten(0, 1),  # whole groups
            groups.flip(1).flatten(0, 1),  # inside groups
        ]
        assert not torch.allclose(objective.bound(groups.transpose(0, 1).flatten(0, 1)), objective.bound(log_w))
    else:
        orders = [log_w.flip(0), log_w[torch.tensor([3, 1, 5, 0, 2, 4])]]
    for permuted in orders:
        torch.testing.assert_close(objective.bound(permuted), objective.bound(log_w), rtol=1e-13, atol=1e-13)


def test_images_are_independent():
    log_w = random_log_w()
    for objective in EVERY.values():
        torch.testing.assert_close(objective.bound(log_w)[7:9], objective.bound(log_w[:, 7:9]), rtol=1e-14, atol=0)


# One image each: an ordinary one, one weight of zero, far apart, one weight alone, none.
EXTREMES = torch.tensor(
    [
        [0.5, 0.5, 1e4, 0.0, -INF],
        [-0.3, -INF, -1e4, -INF, -INF],
        [1.1, 1.1, 0.0, -INF, -INF],
        [0.2, 0.2, 1e4, -INF, -INF],
        [-1.0, -1.0, 0.0, -INF, -INF],
        [0.0, 0.0, 0.0, -INF, -INF],
    ],
    dtype=torch.float64,
)
LOG2, LOG3 = math.log(2), math.log(3)
FIRST = [0.5, -0.3, 1.1, 0.2, -1.0, 0.0]
FINITE = [0.5, 1.1, 0.2, -1.0, 0.0]
ALIVE = sum(math.exp(v) for v in FINITE)
ROOTS = sum(math.exp(v / 2) for v in FINITE)
EXTREME_VALUES = {
    # one zero among six | 1e4, -1e4, 0, 1e4, 0, 0 | one weight of 1 among six
    "elbo": (-INF, 1e4 / 6, -INF),
    "iwae": (math.log(ALIVE / 6), 1e4 - LOG3, -math.log(6)),
    "rws": (math.log(ALIVE / 6), 1e4 - LOG3, -math.log(6)),
    "rws-dreg": (math.log(ALIVE / 6), 1e4 - LOG3, -math.log(6)),
    "reinforce": (-INF, 1e4 / 6, -INF),
    "vimco": (math.log(ALIVE / 6), 1e4 - LOG3, -math.log(6)),
    "piwae2x3": (math.log(ALIVE / 6), 1e4 - LOG3, -math.log(6)),
    "vr0.5": (2 * math.log(ROOTS / 6), 1e4 - 2 * LOG3, -2 * math.log(6)),
    "vr-0.7": (math.log(sum(math.exp(1.7 * v) for v in FINITE) / 6) / 1.7, 1e4 - LOG3 / 1.7, -math.log(6) / 1.7),
    "vr2.5": (-INF, -1e4 + math.log(6) / 1.5, -INF),
    "vr-max": (1.1, 1e4, 0.0),
    "ciwae0.3": (-INF, 0.3 * 1e4 / 6 + 0.7 * (1e4 - LOG3), -INF),
    "miwae2x3": (
        0.5 * (math.log((math.exp(0.5) + math.exp(1.1)) / 3) + math.log((math.exp(0.2) + math.exp(-1) + 1) / 3)),
        1e4 - LOG3,
        -INF,
    ),
    "miwae3x2": (
        (0.5 - LOG2 + math.log((math.exp(1.1) + math.exp(0.2)) / 2) + math.log((math.exp(-1) + 1) / 2)) / 3,
        (2 * (1e4 - LOG2) + 0) / 3,
        -INF,
    ),
    # beta_1 = 0.025 already parts 1e4 from 0, so that f = 1e4 from there on.
    "tvo-log": (-INF, 0.025 * 1e4 / 6 + 0.975 * 1e4, -INF),
    "tvo-linear": (-INF, 1e4 / 18 + 1e4 * 2 / 3, -INF),
    "jvi": (
        direct_jackknife(torch.tensor(FIRST, dtype=torch.float64).where(torch.arange(6) != 1, -INF)[:, None]).item(),
        # L_-j: log 1/5 where a weight of e^1e4 is left out, log 2/5 elsewhere.
        1e4 + 6 * math.log(2 / 6) - 5 * (2 * math.log(1 / 5) + 4 * math.log(2 / 5)) / 6,
        math.nan,
    ),
}


@pytest.mark.parametrize("name", EVERY)
def test_values_at_the_extremes(name):
    bound = EVERY[name].bound(EXTREMES)
    zero, far, alone = EXTREME_VALUES[name]
    assert bound[0].isfinite()
    expected = torch.tensor([zero, far, alone, -INF], dtype=torch.float64)
    torch.testing.assert_close(bound[1:], expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_at_the_extremes(name):
    objective = SMOOTH[name]
    a, b = objective.weights(EXTREMES), objective.doubly_weights(EXTREMES)
    automatic = gradient_of(objective.bound, EXTREMES)
    for found in (a, b, automatic):
        assert found.isfinite().all()
    # The derivative agrees wherever the value is finite.
    finite = objective.bound(EXTREMES).isfinite()
    assert finite[0] and finite[2]
    torch.testing.assert_close(a[:, finite], automatic[:, finite], rtol=1e-10, atol=1e-12)
    if finite[1]:
        assert a[1, 1] == 0 and b[1, 1] == 0  # a weight of zero moves nothing


def test_a_share_of_nothing_leaves_a_bound_out():
    for mixture, bound in ((CIWAE(K, 0.0), IWAE(K)), (CIWAE(K, 1.0), ELBO(K))):
        torch.testing.assert_close(mixture.bound(EXTREMES), bound.bound(EXTREMES))
        torch.testing.assert_close(gradient_of(mixture.bound, EXTREMES), gradient_of(bound.bound, EXTREMES))


def test_a_weight_of_zero_takes_its_value_out_of_a_sum():
    weights = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
    values = torch.tensor([[-INF], [3.0]], dtype=torch.float64)
    assert weighted_sum(weights, values).tolist() == [1.5]
    assert gradient_of(lambda v: weighted_sum(weights, v), values).tolist() == [[0.0], [0.5]]
    assert weighted_sum(weights.flip(0), values).tolist() == [-INF]


@every
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_infinity_are_not_hidden(objective, bad):
    log_w = random_log_w(batch=3)
    log_w[4, 1] = bad
    bound = objective.bound(log_w)
    assert not bound[1].isfinite() and bound[1] != -INF
    assert bound[0].isfinite() and bound[2].isfinite()
    log_w[2, 1] = -INF
    if math.isnan(bad):
        assert objective.bound(log_w)[1].isnan()


@every
def test_float32_is_close_to_float64(objective):
    log_w = random_log_w() - 90
    torch.testing.assert_close(objective.bound(log_w.float()).double(), objective.bound(log_w), rtol=1e-5, atol=1e-4)


# Messages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(0), "k must be >= 1, got 0"),
        (lambda: ELBO(1, "dreg", analytic_kl=True), "analytic_kl has a meaning with gradient=total only"),
        (lambda: VR(0, 0.5), "k must be >= 1, got 0"),
        (lambda: VR(5, 1.0), "alpha must not be 1: that limit is the ELBO, use objective=elbo"),
        (lambda: VR(5, math.nan), "alpha must be finite, or max for VR-max"),
        (lambda: VR(5, -INF), "alpha must be finite, or max for VR-max (the limit alpha = -inf), got -inf"),
        (lambda: VR(5, "max", "dreg"), "gradient must be total with alpha=max"),
        (lambda: VR(5, "max", "stl"), "gradient must be total with alpha=max"),
        (lambda: VR(5, "max").doubly_weights(random_log_w()), "gradient must be total with alpha=max"),
        (lambda: CIWAE(0, 0.5), "k must be >= 1, got 0"),
        (lambda: CIWAE(5, 1.5), "beta must be between 0 and 1, got 1.5"),
        (lambda: CIWAE(5, math.nan), "beta must be between 0 and 1, got nan"),
        (lambda: MIWAE(0, 5), "m must be >= 1, got 0"),
        (lambda: MIWAE(5, 0), "k must be >= 1, got 0"),
        (lambda: PIWAE(0, 5), "m must be >= 1, got 0"),
        (lambda: PIWAE(5, 0), "k must be >= 1, got 0"),
        (lambda: RWS(0), "k must be >= 1, got 0"),
        (lambda: RWS(1), "k must be >= 2 with phi=wake"),
        (lambda: RWS(1, "both"), "k must be >= 2 with phi=both"),
        (lambda: VIMCO(1), "k must be >= 2, got 1"),
        (lambda: JVI(1), "k must be >= 2, got 1"),
        (lambda: TVO(0), "k must be >= 1, got 0"),
        (lambda: TVO(1, gradient="covariance"), "k must be >= 2 with gradient=covariance, got 1"),
        (lambda: TVO(5, 0), "partitions must be >= 1, got 0"),
        (lambda: TVO(5, beta_1=0.0), "beta_1 must be between 0 and 1"),
        (lambda: TVO(5, beta_1=math.nan), "beta_1 must be between 0 and 1"),
        (lambda: TVO(5, schedule="moments", gradient="dreg"), "schedule=moments needs gradient=total or"),
        (lambda: UMIWAE(2, 5, 0), "permutations must be >= 1, got 0"),
        (lambda: UMIWAE(2, 5, 10**8), "permutations=100,000,000 of m x k = 10 draws are 1,000,000,000 log-weights"),
        (lambda: UMIWAE(2, 10**9, 1), "permutations=1 of m x k = 2,000,000,000 draws are 2,000,000,000 log-weights"),
        (lambda: RWS(5, "sleep", "dreg"), "gradient=dreg has a meaning with phi=wake or phi=both only"),
        (lambda: REINFORCE(1), "k must be >= 2, got 1"),
    ],
)
def test_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


def test_what_is_a_lower_bound():
    for name, objective in EVERY.items():
        assert objective.lower_bound == (name not in ("vr-0.7", "vr-max", "jvi")), name
        assert any("not a lower bound" in line for line in objective.caveats) != objective.lower_bound


def test_caveats_name_biased_gradients_only():
    biased = [IWAE(2, "stl"), VR(2, 0.5, "stl"), CIWAE(2, 0.9, "stl"), MIWAE(2, 2, "stl"), PIWAE(2, 2, "stl"),
              TVO(2, gradient="stl"), JVI(2, "stl"), TVO(2, gradient="covariance"), TVO(2, 3, "moments")]  # fmt: skip
    for objective in biased:
        assert any("biased" in line for line in objective.caveats), objective
    # Those that are the ELBO in disguise are unbiased.
    fair = [ELBO(5, "stl"), IWAE(1, "stl"), VR(1, 0.5, "stl"), CIWAE(5, 1.0, "stl"), MIWAE(5, 1, "stl"),
            PIWAE(5, 1, "stl"), TVO(5, 1, gradient="stl"), TVO(5, 1, gradient="covariance"),
            IWAE(5), IWAE(5, "dreg"), VIMCO(5), RWS(5)]  # fmt: skip
    for objective in fair:
        assert objective.caveats == (), objective


def test_pathwise_objectives_refuse_discrete_latents():
    class Discrete(LinearGaussianModel):
        discrete = True

    for name, objective in EVERY.items():
        message = objective.check(Discrete([2]))
        if name in ("vimco", "rws", "reinforce"):
            assert message is None
        else:
            assert message is not None and message.startswith(type(objective).__name__)
            assert "objective=vimco" in message and "objective=rws" in message
        assert objective.check(LinearGaussianModel([2, 2])) is None
    assert TVO(5, gradient="covariance").check(Discrete([2])) is None
