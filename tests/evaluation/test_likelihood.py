"""The estimate of log p(x) against models whose log p(x) is known, and against its own definition."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import binary, built, drawn, make_exact, split_of
from every_architecture import GaussianMLP, LinearGaussianModel

from iwae_cli.core.errors import RunFailed
from iwae_cli.core.files import dump_json
from iwae_cli.core.noise import GeneratorNoise, KeyedNoise
from iwae_cli.core.numerics import log_mean_exp
from iwae_cli.data.base import Split
from iwae_cli.data.digits import Digits
from iwae_cli.evaluation.ais.estimator import AIS
from iwae_cli.evaluation.estimator import EstimatorInput, require_probabilities
from iwae_cli.evaluation.likelihood import Likelihood, log_likelihood, summarize
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import InferenceChain

PIXELS = 4


def posterior_model(off: float) -> LatentVariableModel:
    """p(h) = N(0, I), p(x|h) linear with noise, and q the exact posterior pushed ``off`` it: 0 is the posterior."""
    model = built(LinearGaussianModel([2]), PIXELS)
    q = model.inference.layers[0]
    with torch.no_grad():
        model.generative.observation.log_scale.copy_(torch.tensor([-0.5, -0.3, 0.0, 0.2]))
        make_exact(model)
        q.linear.bias += off * q.cholesky().sum(1)
        q.log_diagonal += 0.5 * off
    return model


def long_run(model: LatentVariableModel, x: torch.Tensor, k: int, repeats: int) -> torch.Tensor:
    """E[L_k] of every observation, from torch's own random numbers and plain log-mean-exp; (n,)."""
    noise = GeneratorNoise(torch.Generator().manual_seed(123), torch.float64)
    total = torch.zeros(len(x), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(repeats // 100):
            total += log_mean_exp(model(x, 100 * k, noise).view(100, k, -1).transpose(0, 1)).sum(0)
    return total / repeats


def repeated(model: LatentVariableModel, x: torch.Tensor, k: int, repeats: int) -> list[dict[str, float]]:
    """The summaries of many evaluations of ``x``: every copy of it is another image and so has other noise."""
    copies = log_likelihood(model, split_of(x.repeat(repeats, 1)), k=k, seed=0, rows=10**5, workers=1)
    return [summarize(part(copies, slice(i, i + len(x))), PIXELS)[0] for i in range(0, repeats * len(x), len(x))]


def part(whole: Likelihood, images: slice) -> Likelihood:
    change = {name: getattr(whole, name)[images] for name in ("log_px", "ess", "khat", "top_weight", "exact")}
    return replace(whole, **change, bounds={m: bound[images] for m, bound in whole.bounds.items()})


def coverage(summaries: Sequence[dict[str, float]], truth: float) -> float:
    return float(np.mean([abs(-s["nll"] - truth) < 1.96 * s["stderr_mc"] for s in summaries]))


REPEATS = 400


@pytest.mark.parametrize("n", [1, 10])
def test_stderr_mc_is_the_error_around_the_expected_bound_whatever_n(n: int) -> None:
    """T1: 95 % intervals cover E[L_k] of an independent long run; 4 standard errors of a share of 400 are 4 %."""
    model = posterior_model(0.5)
    x = drawn(model, n)
    truth = long_run(model, x, 100, 4000).mean().item()
    summaries = repeated(model, x, 100, REPEATS)
    assert 0.91 < coverage(summaries, truth) < 0.995
    spread = np.std([s["nll"] for s in summaries])
    assert np.mean([s["stderr_mc"] for s in summaries]) == pytest.approx(spread, rel=0.14)  # 4 / sqrt(2 * 400)


def test_the_exact_value_is_covered_where_n_times_v_is_small_and_only_there() -> None:
    """T1: Jensen's bias does not average out over images, so with enough of them no interval holds log p(x)."""
    model = posterior_model(0.8)
    few, many = drawn(model, 1), drawn(model, 200)
    for x, k, repeats, small in ((few, 100, REPEATS, True), (many, 15, 100, False)):
        summaries = repeated(model, x, k, repeats)
        # bias_mc = -mean(v) / 2
        n_mean_v = -2 * len(x) * np.mean([s["bias_mc"] for s in summaries])
        exact = -summaries[0]["exact_nll"]
        if small:
            assert n_mean_v < 0.1 and coverage(summaries, exact) > 0.91
        else:
            assert n_mean_v > 10 and coverage(summaries, exact) < 0.7
        shift = np.mean([-s["nll"] - exact for s in summaries])
        error = np.std([s["nll"] for s in summaries]) / math.sqrt(repeats)
        expected = -n_mean_v / len(x) / 2
        assert abs(shift - expected) < 0.15 * abs(expected) + 4 * error


def test_with_the_exact_posterior_every_number_is_exact() -> None:
    """T2 through the whole evaluation: every log-weight is log p(x)."""
    model = posterior_model(0.0)
    x = drawn(model, 30)
    likelihood = log_likelihood(model, split_of(x), k=500, seed=0, rows=5000)
    exact = model.generative.exact_log_px(x).detach().numpy()
    for bound in likelihood.bounds.values():
        assert np.abs(bound - exact).max() < 1e-10
    assert np.abs(likelihood.ess - 500).max() < 1e-6
    assert np.abs(likelihood.top_weight - 1 / 500).max() < 1e-10
    assert np.isnan(likelihood.khat).all()
    summary, reasons = summarize(likelihood, PIXELS)
    assert summary["stderr_mc"] < 1e-8 and abs(summary["bias_mc"]) < 1e-8
    assert summary["khat_share_above_0.7"] is None and "too many of these are equal" in reasons["khat_share_above_0.7"]


@pytest.fixture
def two_layers() -> LatentVariableModel:
    model = built(GaussianMLP([4, 3], [[8], [6]]), 9)
    with torch.no_grad():
        for p in model.inference.parameters():
            p.mul_(2)  # weights that differ
    return model


@pytest.mark.parametrize(
    ("k", "levels"),
    [(5000, [1, 5, 50, 500, 5000]), (500, [1, 5, 50, 500]), (100, [1, 5, 50, 100]), (64, [1, 64]), (1, [1])],
)
def test_levels_are_their_definition_and_ordered_for_every_image(
    two_layers: LatentVariableModel, k: int, levels: list[int]
) -> None:
    """T4. The definition, with all log-weights in memory: means over all disjoint consecutive groups."""
    x = binary(6)
    likelihood = log_likelihood(two_layers, split_of(x), k=k, seed=3, rows=700)
    assert list(likelihood.bounds) == levels
    with torch.no_grad():
        log_w = two_layers(x.double(), k, KeyedNoise(3, "test", range(6), dtype=torch.float64)).numpy()
    for m, bound in likelihood.bounds.items():
        groups = log_w.reshape(k // m, m, 6)
        top = groups.max(1, keepdims=True)
        expected = (np.log(np.exp(groups - top).mean(1)) + top[:, 0]).mean(0)
        np.testing.assert_allclose(bound, expected, rtol=1e-12)
    ordered = np.stack(list(likelihood.bounds.values()))
    assert (np.diff(ordered, axis=0) > 0).all()
    assert likelihood.log_px is likelihood.bounds[k] and likelihood.exact is None
    if k == 5000:
        prefixes = np.stack([np.log(np.exp(log_w[:m] - log_w.max(0)).mean(0)) for m in levels])
        assert (np.diff(prefixes, axis=0) < 0).any(), "first samples alone are not ordered: the groups matter"


def same(a: Likelihood, b: Likelihood, rtol: float) -> None:
    for name in ("log_px", "ess", "khat", "top_weight"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=0, err_msg=name)
    for m in a.bounds:
        np.testing.assert_allclose(a.bounds[m], b.bounds[m], rtol=rtol, atol=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_rows_nor_workers_change_the_value(two_layers: LatentVariableModel, workers: int) -> None:
    """T9. rows decides the samples computed at once (64 to 512) and the images side by side (1 to 39)."""
    arguments = {"k": 500, "seed": 0}
    reference = log_likelihood(two_layers, split_of(binary(20)), rows=2000, workers=1, **arguments)  # type: ignore[arg-type]
    for rows in (64, 100, 777, 20_000):
        other = log_likelihood(two_layers, split_of(binary(20)), rows=rows, workers=workers, **arguments)  # type: ignore[arg-type]
        same(reference, other, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_the_same_shapes_it_is_the_same_bit_for_bit(two_layers: LatentVariableModel, dtype: torch.dtype) -> None:
    """Workers never share a batch, and what was computed before an image, or is after it, does not touch it."""
    model, x = two_layers.to(dtype), binary(20)
    one = log_likelihood(model, split_of(x), k=300, seed=0, rows=2000, workers=1)
    for workers in (2, 3):
        same(one, log_likelihood(model, split_of(x), k=300, seed=0, rows=2000, workers=workers), rtol=0)
    part = log_likelihood(model, split_of(x[:16]), k=300, seed=0, rows=2000, workers=1)  # batches of 8
    assert np.array_equal(part.log_px, one.log_px[:16]) and np.array_equal(part.khat, one.khat[:16])


def test_seed_and_stream_change_the_noise(two_layers: LatentVariableModel) -> None:
    def value(**change: object) -> np.ndarray:
        arguments: dict[str, object] = {"k": 50, "seed": 0, "rows": 2000} | change
        return log_likelihood(two_layers, split_of(binary(3)), **arguments).log_px  # type: ignore[arg-type]

    assert np.array_equal(value(), value(stream="test"))
    assert not np.isclose(value(), value(seed=1)).any()
    assert not np.isclose(value(), value(stream="validation")).any()


def test_progress_counts_images_and_may_stop(two_layers: LatentVariableModel) -> None:
    seen: list[int] = []
    log_likelihood(two_layers, split_of(binary(20)), k=64, seed=0, rows=256, workers=2, on_progress=seen.append)
    assert seen == [8, 16, 20]
    log_likelihood(
        two_layers, split_of(binary(10)), k=64, seed=0, rows=256, workers=2, plain=True, on_progress=seen.append
    )
    assert seen[3:] == [4, 8, 10]

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log_likelihood(two_layers, split_of(binary(10)), k=64, seed=0, rows=256, on_progress=stop)


MEMORY = """
import resource, sys
import numpy as np, torch
from iwae_cli.data.base import Split
from iwae_cli.data.digits import Digits
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.models.architectures.mlp import GaussianMLP
model = GaussianMLP([50], [[1000]]).build((64,), np.full(64, 0.4), torch.Generator().manual_seed(0)).eval()
split = Split("test", torch.zeros(2, 64, dtype=torch.uint8), "")
unit = 1 if sys.platform == "darwin" else 1024
for k in (500, 500, 20_000):
    log_likelihood(model, split, k=k, seed=0, rows=512, workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def test_memory_does_not_grow_with_k() -> None:
    """One hidden layer of all further samples would be 78 MB; what does grow is the tail of k-hat, 3 sqrt(k) numbers.

    The bound is a tenth of that: what is left for the allocator and for threads.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, before, after = map(int, done.stdout.split())
    assert after - before < 0.1 * (20_000 - 500) * 1000 * 4


def hand_made(log_px: list[float], ess: list[float], k: int = 100, **change: object) -> Likelihood:
    n = len(log_px)
    arrays: dict[str, object] = {
        "k": k,
        "log_px": np.array(log_px),
        "bounds": {1: np.array(log_px) - 1, k: np.array(log_px)},
        "ess": np.array(ess),
        "khat": np.full(n, 0.2),
        "top_weight": np.full(n, 0.1),
        "exact": None,
    }
    return Likelihood(**(arrays | change))  # type: ignore[arg-type]


def test_a_summary_by_hand() -> None:
    """v = 1/ESS - 1/100: 0.19, 0.04, 0.01, 0."""
    likelihood = hand_made(
        [-80.0, -82.0, -84.0, -90.0],
        [5.0, 20.0, 50.0, 100.0],
        khat=np.array([0.9, 0.71, 0.7, np.nan]),
        top_weight=np.array([0.51, 0.5, 0.2, 0.01]),
        exact=np.array([-79.0, -81.0, -83.0, -89.0]),
    )
    summary, reasons = summarize(likelihood, 784)
    assert not reasons
    sd = math.sqrt((4**2 + 2**2 + 0**2 + 6**2) / 3)
    assert summary == {
        "nll": 84.0,
        "k": 100,
        "n": 4,
        "stderr_images": pytest.approx(sd / 2),
        "stderr_mc": pytest.approx(math.sqrt(0.19 + 0.04 + 0.01) / 4),
        "bias_mc": pytest.approx(-(0.19 + 0.04 + 0.01) / 4 / 2),
        "bounds": {"1": -85.0, "100": -84.0},
        "ess_median": 35.0,
        "ess_min": 5.0,
        "ess_share_below_10": 0.25,
        "khat_share_above_0.7": 0.5,  # of all images: one without a k-hat is not above
        "top_weight_share_above_0.5": 0.25,
        "bits_per_dim": pytest.approx(84 / (784 * math.log(2))),
        "exact_nll": 83.0,
    }


def test_v_is_never_negative() -> None:
    """An ESS of k by one rounding error."""
    summary, _ = summarize(hand_made([-1.0, -1.0], [100 * (1 + 1e-15), 100.0]), 1)
    assert (summary["stderr_mc"], abs(summary["bias_mc"])) == (0.0, 0.0)


def test_the_jackknife_is_k_bounds_less_the_mean_of_those_that_leave_one_out() -> None:
    model, k = posterior_model(0.5), 70
    x = drawn(model, 5)
    assert log_likelihood(model, split_of(x), k=8, seed=4, rows=64).jackknife is None, "off unless asked for"
    found = log_likelihood(model, split_of(x), k=k, seed=4, rows=64, with_jackknife=True)
    with torch.no_grad():
        log_w = model(x, k, KeyedNoise(4, "test", range(5), 0, torch.float64))
    without = [torch.cat([log_w[:j], log_w[j + 1 :]]).logsumexp(0) - math.log(k - 1) for j in range(k)]
    expected = k * (log_w.logsumexp(0) - math.log(k)) - (k - 1) * torch.stack(without).mean(0)
    assert found.jackknife == pytest.approx(expected.numpy(), abs=1e-9)
    found.jackknife[0] = math.nan
    numbers, reasons = summarize(found, PIXELS)
    assert numbers["nll_jackknife"] is None
    assert "one weight is larger than all others together" in reasons["nll_jackknife"]


def check_nulls(summary: dict[str, object], reasons: dict[str, str]) -> set[str]:
    """Every null has its reason and every reason its null; the text is standard JSON. The names of the nulls."""
    dump_json({"summary": summary, "reasons": reasons}, "summary")
    bounds = summary["bounds"]
    assert isinstance(bounds, dict)
    flat = {key: value for key, value in summary.items() if key != "bounds"}
    flat |= {f"bounds.{m}": value for m, value in bounds.items()}
    assert set(reasons) == {key for key, value in flat.items() if value is None}
    assert all(len(reason) > 10 for reason in reasons.values())
    return set(reasons)


def broken_model(bias: float) -> LatentVariableModel:
    """p(x|h) = 0 for every x with two or more pixels on where ``bias`` is -1e308: their logits overflow."""
    model = built(GaussianMLP([2], [[3]]), 9)
    (logit_bias,) = (p for p in model.generative.parameters() if p.shape == (9,))
    with torch.no_grad():
        logit_bias.fill_(bias)
    return model


def test_images_of_probability_zero_give_nulls_and_say_which() -> None:
    x = torch.zeros(4, 9, dtype=torch.uint8)
    x[2] = 1
    likelihood = log_likelihood(broken_model(-1e308), split_of(x), k=100, seed=0, rows=64)
    assert likelihood.log_px[2] == -math.inf and np.isfinite(np.delete(likelihood.log_px, 2)).all()
    summary, reasons = summarize(likelihood, 9)
    nulls = check_nulls(summary, reasons)
    assert {"nll", "stderr_images", "stderr_mc", "bias_mc", "bits_per_dim", "bounds.1", "bounds.100"} <= nulls
    assert {"ess_share_below_10", "khat_share_above_0.7", "top_weight_share_above_0.5"} <= nulls
    assert "1 of 4 images" in reasons["nll"] and "image 2" in reasons["nll"]


def test_nan_weights_give_nulls() -> None:
    likelihood = log_likelihood(broken_model(math.nan), split_of(binary(3)), k=50, seed=0, rows=2000)
    assert np.isnan(likelihood.log_px).all()
    summary, reasons = summarize(likelihood, 9)
    assert {"nll", "stderr_mc", "bias_mc", "ess_share_below_10", "bounds.50"} <= check_nulls(summary, reasons)
    assert "3 of 3 images" in reasons["nll"]


def test_a_single_weight_of_zero_spoils_only_the_low_levels() -> None:
    """One log w = -inf among the k: L_1 of that image is -inf, L_k is not."""
    bounds = {1: np.array([-85.0, -math.inf]), 100: np.array([-80.0, -82.0])}
    summary, reasons = summarize(hand_made([-80.0, -82.0], [50.0, 50.0], bounds=bounds), 9)
    assert check_nulls(summary, reasons) == {"bounds.1"}
    assert reasons["bounds.1"] == "L_1 is not finite for 1 of 2 images (the first is image 1: -inf)"
    assert summary["nll"] == 81.0


@pytest.mark.parametrize(("k", "also"), [(1, {"stderr_mc", "bias_mc"}), (20, set())])
def test_few_samples_have_no_k_hat_and_one_has_no_error(
    two_layers: LatentVariableModel, k: int, also: set[str]
) -> None:
    summary, reasons = summarize(log_likelihood(two_layers, split_of(binary(5)), k=k, seed=0, rows=2000), 9)
    assert check_nulls(summary, reasons) == {"khat_share_above_0.7"} | also
    assert f"k = {k} has too few; use evaluation.k=25 or more" in reasons["khat_share_above_0.7"]


class Lacking(InferenceChain):
    """A q whose log-density lacks 30 nats, in the draws and in the density."""

    def sample(self, x, k, noise):
        latents, log_q = super().sample(x, k, noise)
        return latents, log_q - 30

    def forward(self, x, latents):
        return super().forward(x, latents) - 30


def certain(images: int, lacking: bool = False) -> tuple[LatentVariableModel, Split]:
    """A model with p(x) = 1 for white images and every h, under a q far from p(h): L_k is noise around 0."""
    model = built(GaussianMLP([3], [[5]]), PIXELS, torch.float32)
    with torch.no_grad():
        model.generative.observation.head.weight.zero_()
        model.generative.observation.head.bias.fill_(50)
        model.inference.layers[0].log_scale.bias.fill_(0.3)
    if lacking:
        model.inference = Lacking(list(model.inference.layers))
    return model, split_of(torch.ones(images, PIXELS, dtype=torch.uint8))


@pytest.mark.parametrize("k", [1, 2, 50, 2000])
def test_a_probability_near_one_is_not_refused_for_its_noise(k: int) -> None:
    model, split = certain(400)
    found = log_likelihood(model, split, k=k, seed=0, rows=5000, workers=1)
    assert (found.log_px > 0).any(), "the noise goes both ways"


@pytest.mark.parametrize(("k", "refined"), [(1, False), (50, False), (2000, False), (50, True)])
def test_a_probability_above_one_is_refused(k: int, refined: bool) -> None:
    model, split = certain(20, lacking=True)
    if refined:
        # Refined proposals use log_prob of the first layer: there the term is missing in p.
        model.generative.log_prior = lambda latents: type(model.generative).log_prior(model.generative, latents) + 30
    with pytest.raises(RunFailed) as caught:
        log_likelihood(model, split, k=k, seed=0, rows=5000, workers=1, refined=refined)
    words = f"L_{k} of test{', refined,' if refined else ''} is above 0 in 20 of 20 images"
    assert words in str(caught.value) and len(str(caught.value)) <= 300


def test_a_density_of_real_numbers_may_be_above_one() -> None:
    model, split = certain(20, lacking=True)
    x = split.x.to(torch.float32)
    assert (log_likelihood(model, split_of(x), k=50, seed=0, rows=5000, workers=1).log_px > 20).all()


def test_one_image_above_one_is_refused_where_its_noise_is_known() -> None:
    x, log_px = torch.zeros(250, 3, dtype=torch.uint8), np.full(250, -20.0)
    for value, error, refused in ((5.0, 0.2, True), (0.9, 0.2, False), (5.0, math.nan, False), (25.0, math.nan, True)):
        log_px[7], errors = value, np.full(250, error)
        if not refused:
            require_probabilities("L_50 of test", x, log_px, errors)
            continue
        with pytest.raises(RunFailed, match=rf"above 0 in 1 of 250 images, {value:g} nats in image 7: no probability"):
            require_probabilities("L_50 of test", x, log_px, errors)
    log_px[7] = 0.2
    with pytest.raises(RunFailed, match="the exact"):
        require_probabilities("the exact log p(x) of test", x, log_px, None)


def test_ais_refuses_a_probability_above_one() -> None:
    model = built(GaussianMLP([3], [[5]]), 64, torch.float32)
    model.generative.log_likelihood = lambda x, h: type(model.generative).log_likelihood(model.generative, x, h) + 99
    evaluation = Evaluation(k=5, splits=["test"], weights="last", seed=0, binarization_seed=0, rows=5000, workers=1)
    ais = AIS(chains=4, temperatures=5, max_temperatures=5, images=3, simulated=0)
    with pytest.raises(RunFailed, match="AIS of test is above 0 in 3 of 3 images"):
        ais.estimate(EstimatorInput(model, Digits().load(), evaluation), lambda: None)
