"""The cheaper forms are those of torch in every range of the numbers, and nothing else is replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from iwae_cli.models.networks import bernoulli_log_prob
from iwae_cli.training.steps.fx_rewrites import sum_less_softplus, tanh, use_cheaper_forms


@pytest.mark.parametrize("d", [1, 16, 64, 97, 130, 784])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_a_sum_of_softplus_is_one_logarithm_of_products(d: int, size: float) -> None:
    random = torch.Generator().manual_seed(d)
    logits = size * torch.randn(3, 5, d, generator=random)
    terms = (torch.rand(5, d, generator=random) < 0.5) * logits
    exact = (terms.double() + F.logsigmoid(-logits.double())).sum(-1)
    torch.testing.assert_close(sum_less_softplus(terms, logits).double(), exact, rtol=2e-6, atol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    logits = torch.tensor([[0.0, -torch.inf], [0.0, torch.inf], [0.0, torch.nan]])
    found = sum_less_softplus(torch.zeros(3, 2), logits)
    torch.testing.assert_close(found, -F.softplus(logits).sum(-1), equal_nan=True)


@pytest.mark.parametrize("size", [1e-8, 1e-4, 0.01, 0.1, 0.2, 0.3, 1.0, 9.0, 100.0])
def test_tanh_is_as_exact_near_zero_as_elsewhere(size: float) -> None:
    x = size * torch.linspace(-1.1, 1.1, 1001)
    torch.testing.assert_close(tanh(x).double(), torch.tanh(x.double()), rtol=1e-6, atol=0)


def test_tanh_of_what_is_not_finite() -> None:
    x = torch.tensor([-torch.inf, torch.inf, torch.nan])
    torch.testing.assert_close(tanh(x), torch.tanh(x), rtol=0, atol=0, equal_nan=True)


def replaced(function: Callable[..., Tensor], *given: Tensor) -> tuple[set[object], Tensor]:
    graph = make_fx(function, tracing_mode="fake")(*given)
    use_cheaper_forms(graph)
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}, graph(*given)


def test_the_likelihood_of_the_models_is_found() -> None:
    x, logits = torch.ones(4, 64), torch.linspace(-20, 20, 2 * 4 * 64).view(2, 4, 64)
    targets, found = replaced(lambda x, s: bernoulli_log_prob(x, s).tanh(), x, logits)
    assert {tanh, sum_less_softplus} <= targets
    assert not targets & {torch.ops.aten.tanh.default, torch.ops.aten.softplus.default}
    torch.testing.assert_close(found, bernoulli_log_prob(x, logits).tanh())


def test_under_vmap_too() -> None:
    x, logits = torch.ones(4, 64), torch.linspace(-3, 3, 2 * 4 * 64).view(2, 4, 64)
    targets, found = replaced(lambda x, s: torch.vmap(lambda one: bernoulli_log_prob(x, one))(s), x, logits)
    assert sum_less_softplus in targets
    torch.testing.assert_close(found, bernoulli_log_prob(x, logits))


@pytest.mark.parametrize(
    "other",
    [
        lambda x, s: (x - F.softplus(s, beta=2)).sum(-1),
        lambda x, s: (x - F.softplus(s)).sum(0),
        lambda x, s: (x - F.softplus(s)).sum(-1, keepdim=True),
        lambda x, s: torch.sub(x, F.softplus(s), alpha=3).sum(-1),
        lambda x, s: (x - F.softplus(s[:, :1])).sum(-1),
        lambda x, s: (F.softplus(s) - x).sum(-1),
        lambda x, s: (x.double() - F.softplus(s.double())).sum(-1),
        lambda x, s: (x.half() - F.softplus(s.half())).tanh().sum(-1),
        lambda x, s: (x - F.softplus(s)).sum(-1, dtype=torch.float64),
    ],
)
def test_what_only_looks_like_it_is_left_alone(other: Callable[..., Tensor]) -> None:
    x, s = torch.rand(4, 8), torch.randn(4, 8)
    targets, found = replaced(other, x, s)
    assert not targets & {sum_less_softplus, tanh}
    torch.testing.assert_close(found, other(x, s))
