"""Functions in a form that machine code has done with sooner than with the usual one, equal to it but for rounding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

LANES = 16
"""Numbers of float32 that a processor multiplies at once, at most."""

MOST_FACTORS = 64
"""Factors between 1 and 2 whose product is taken: 2^64 is far below what float32 can hold."""


def make_cheaper(traced: GraphModule) -> None:
    """Replace tanh, and sums of softplus over the last axis, in a graph that is still to be lowered."""
    for node in traced.graph.nodes:
        if node.target is aten.tanh.default:
            node.target = tanh
        elif (found := _softplus_summed(node)) is not None:
            node.target, node.args = sum_less_softplus, found
    traced.graph.eliminate_dead_code()
    traced.recompile()


def tanh(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """tanh by a sigmoid, in a third of the time; near 0 its error is absolute, that of a number near 1."""
    return 2 * torch.sigmoid(2 * x) - 1


def sum_less_softplus(terms: Float[Tensor, "*#n #d"], logits: Float[Tensor, "*#n d"]) -> Float[Tensor, "*_"]:
    """sum_j (terms_j - softplus(logits_j)), with one logarithm for many j.

    softplus(s) = max(s, 0) + log(1 + exp(-|s|)), and a sum of logarithms is that of a product.
    """
    d = logits.shape[-1]
    whole = d // LANES if d % LANES == 0 else d
    factors = max(n for n in range(1, MOST_FACTORS + 1) if whole % n == 0)
    products = (1 + torch.exp(-logits.abs())).unflatten(-1, (factors, d // factors)).prod(-2)
    return (terms - logits.clamp_min(0)).sum(-1) - products.log().sum(-1)


def _softplus_summed(node: Node) -> tuple[Node, Node] | None:
    """``terms`` and ``logits``, if the node is the sum of their difference as in ``sum_less_softplus``."""
    if node.target is not aten.sum.dim_IntList or node.args[1:] != ([-1],) or node.kwargs:
        return None
    difference = node.args[0]
    if not isinstance(difference, Node) or difference.target is not aten.sub.Tensor or difference.kwargs:
        return None
    terms, softplus = difference.args
    if not isinstance(terms, Node) or not isinstance(softplus, Node) or softplus.target is not aten.softplus.default:
        return None
    # Another sharpness or threshold would be an argument; and a logit of many terms has to be counted for all of them.
    if len(softplus.args) > 1 or softplus.meta["val"].shape[-1] != difference.meta["val"].shape[-1]:
        return None
    logits = softplus.args[0]
    assert isinstance(logits, Node)
    return terms, logits
