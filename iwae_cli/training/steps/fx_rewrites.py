"""Float32 forms of functions that are faster on a processor than the usual ones, equal to them except for rounding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

LANES = 16
"""Most float32 numbers that one processor instruction multiplies."""

SMALL = 0.2
"""Below this, tanh is computed from the first terms of its series; the next term is less than a rounding error."""

MOST_FACTORS = 64
"""Most factors between 1 and 2 in one product: 2^64 is far below the largest float32."""


def use_cheaper_forms(traced: GraphModule) -> None:
    """Replace tanh, and sums of softplus over the last axis, in a graph that is not lowered yet."""
    for node in traced.graph.nodes:
        if node.op != "call_function" or _dtype(node) != torch.float32:
            continue
        if node.target is aten.tanh.default:
            node.target = tanh
        elif (found := _softplus_summed(node)) is not None:
            node.target, node.args = sum_less_softplus, found
    traced.graph.eliminate_dead_code()
    traced.recompile()


def tanh(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return tanh x as 2 sigmoid(2x) - 1; near zero, where that cancels, as x - x^3/3 + 2x^5/15 - 17x^7/315."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    return torch.where(x.abs() < SMALL, series, 2 * torch.sigmoid(2 * x) - 1)


def sum_less_softplus(terms: Float[Tensor, "*#n #d"], logits: Float[Tensor, "*#n d"]) -> Float[Tensor, "*_"]:
    """Return sum_j (terms_j - softplus(logits_j)) with one logarithm for many j.

    softplus(s) = max(s, 0) + log(1 + exp(-|s|)), and a sum of logarithms is the logarithm of a product. Every factor
    has the rounding error of a number near 1: the error of the sum is at most d * 6e-8, as in log p(x|h) in float32.
    """
    d = logits.shape[-1]
    factors = max((n for n in range(1, MOST_FACTORS + 1) if d % n == 0 and d // n >= LANES), default=1)
    products = (1 + torch.exp(-logits.abs())).unflatten(-1, (factors, d // factors)).prod(-2)
    return (terms - logits.clamp_min(0)).sum(-1) - products.log().sum(-1)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _softplus_summed(node: Node) -> tuple[Node, Node] | None:
    """Return the nodes ``terms`` and ``logits`` of ``sum_less_softplus`` if ``node`` computes that; otherwise None."""
    if node.target is not aten.sum.dim_IntList or node.kwargs:
        return None
    difference, *axis = node.args
    if not isinstance(difference, Node) or difference.target is not aten.sub.Tensor or difference.kwargs:
        return None
    if axis not in ([[-1]], [[difference.meta["val"].dim() - 1]]):
        return None
    terms, softplus = difference.args
    if not isinstance(terms, Node) or not isinstance(softplus, Node) or softplus.target is not aten.softplus.default:
        return None
    # More arguments mean another sharpness or threshold; a logit that is broadcast counts once for each of its terms.
    if len(softplus.args) > 1 or softplus.meta["val"].shape[-1] != difference.meta["val"].shape[-1]:
        return None
    logits = softplus.args[0]
    assert isinstance(logits, Node)
    return terms, logits
