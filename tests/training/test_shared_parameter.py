"""A parameter that p and q share is trained once, by the sum of both gradients, in every form of the step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_compiled import ONE, batch, built, noise, sgd

from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.training.steps.batched import BatchedStep
from iwae_cli.training.steps.compiled import CompiledRouletteStep, CompiledStep
from iwae_cli.training.steps.plain import PlainStep
from iwae_cli.training.steps.roulette import RouletteStep

IWAE_3, TAU = IWAE(3), 1e-300  # with so small a threshold every draw survives


def with_shared_bias() -> LatentVariableModel:
    model = built(ONE)
    q = {tuple(p.shape): p for p in model.inference.parameters() if p.dim() == 1}
    name, shared = next((n, q[tuple(p.shape)]) for n, p in model.generative.named_parameters() if tuple(p.shape) in q)
    path, _, leaf = name.rpartition(".")
    model.generative.get_submodule(path)._parameters[leaf] = shared
    assert len([*model.parameters()]) < len([*model.generative.parameters()]) + len([*model.inference.parameters()])
    return model


Form = Callable[[LatentVariableModel, torch.optim.Optimizer], object]


def batched(model: LatentVariableModel, optimizer: torch.optim.Optimizer) -> object:
    other = copy.deepcopy(model)
    steps = [PlainStep(model, IWAE_3, optimizer), PlainStep(other, IWAE_3, sgd(other))]
    return BatchedStep(steps, batch(0), machine_code=False)([batch(1)] * 2, [noise(1), noise(1)])


def compiled_roulette(model: LatentVariableModel, optimizer: torch.optim.Optimizer) -> object:
    return CompiledRouletteStep(RouletteStep(model, IWAE_3, optimizer, TAU), batch(0))(batch(1), noise(1))


FORMS: dict[str, Form] = {
    "plain": lambda model, optimizer: PlainStep(model, IWAE_3, optimizer)(batch(1), noise(1)),
    "roulette": lambda model, optimizer: RouletteStep(model, IWAE_3, optimizer, TAU)(batch(1), noise(1)),
    "compiled": lambda model, optimizer: CompiledStep(PlainStep(model, IWAE_3, optimizer), batch(0))(
        batch(1), noise(1)
    ),
    "compiled roulette": compiled_roulette,
    "batched": batched,
}


@pytest.mark.parametrize("form", FORMS)
def test_it_moves_by_the_sum_of_both_gradients(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)
    model = with_shared_bias()
    parameters = [*model.parameters()]
    bound = IWAE_3.bound(model(batch(1), IWAE_3.num_samples, noise(1)))
    gradients = torch.autograd.grad(-bound.mean(), parameters)
    expected = [p.detach() - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
    FORMS[form](model, sgd(model))
    for p, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), right, rtol=1e-10, atol=1e-12)


def test_adam_in_the_graph_counts_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)
    plain, compiled = with_shared_bias(), with_shared_bias()
    reference, optimizer = (torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4) for model in (plain, compiled))
    step = CompiledStep(PlainStep(compiled, IWAE_3, optimizer), batch(0))
    for seed in (1, 2):
        PlainStep(plain, IWAE_3, reference)(batch(seed), noise(seed))
        step(batch(seed), noise(seed))
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)
