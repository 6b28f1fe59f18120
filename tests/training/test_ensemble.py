"""The step of several models at once against the plain step of each: the same numbers but for rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from draws import noise
from every_objective import IWAE, VIMCO
from test_compiled import BITS, CASES, ONE, Branches, batch, built

from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.training.steps.batched import BatchedStep
from iwae_cli.training.steps.graph import CannotCompileError
from iwae_cli.training.steps.plain import PlainStep


def alone_steps(
    models: Sequence[LatentVariableModel], objectives: Sequence[Objective], optimizers: Sequence[torch.optim.Optimizer]
) -> list[PlainStep]:
    return [PlainStep(*each) for each in zip(models, objectives, optimizers, strict=True)]


def compare(
    architecture: Architecture,
    objectives: list[Objective],
    rates: list[float],
    rtol: float,
    dtype: torch.dtype = torch.float64,
    machine_code: bool = False,
) -> None:
    """Three steps, and a change of the learning rates before the last, as a schedule makes it."""
    jobs = range(len(objectives))
    models = [built(architecture, seed, dtype) for seed in jobs]
    alone = copy.deepcopy(models)

    def adam(models: list[LatentVariableModel]) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(m.parameters(), lr=r, fused=True) for m, r in zip(models, rates, strict=True)]

    optimizers, own = adam(models), adam(alone)
    step = BatchedStep(alone_steps(models, objectives, optimizers), torch.zeros_like(batch(0, dtype)), machine_code)
    for number in range(3):
        if number == 2:
            for optimizer in (*optimizers, *own):
                optimizer.param_groups[0]["lr"] *= 0.1
        seeds = [10 * number + job for job in jobs]
        bounds = step([batch(seed, dtype) for seed in seeds], [noise(seed, dtype) for seed in seeds])
        for job, seed in enumerate(seeds):
            expected = PlainStep(alone[job], objectives[job], own[job])(batch(seed, dtype), noise(seed, dtype))
            assert not bounds[job].requires_grad
            torch.testing.assert_close(bounds[job], expected, rtol=rtol, atol=0)
    for job in jobs:
        for (name, p), q in zip(alone[job].named_parameters(), models[job].parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=rtol, atol=rtol, msg=name)
        # Each optimizer has the state that it has alone, as its checkpoint stores it.
        mine, expected_state = optimizers[job].state_dict(), own[job].state_dict()
        assert mine["param_groups"] == expected_state["param_groups"]
        assert mine["state"].keys() == expected_state["state"].keys()
        for index, memory in expected_state["state"].items():
            for key, value in memory.items():
                torch.testing.assert_close(mine["state"][index][key], value, rtol=rtol, atol=rtol, msg=key)


# Of bounds that are computed by the same operations one is enough under vmap; alone, test_compiled.py traces each.
DISTINCT = sorted(CASES.keys() - {"ELBO", "CIWAE", "MIWAE", "VR", "TVO", "VIMCO, zero", "REINFORCE", "IWAE STL"})


@pytest.mark.parametrize("case", DISTINCT)
def test_every_model_has_the_numbers_that_it_has_alone(case: str) -> None:
    architecture, objective = CASES[case]
    compare(architecture, [objective] * 3, [0.01, 0.02, 0.01], rtol=1e-9)


def test_objectives_may_differ() -> None:
    """Also in whether one loss serves both networks."""
    iwae, dreg = IWAE(3), IWAE(3, "dreg")
    compare(ONE, [iwae, iwae, dreg, IWAE(3, "stl"), dreg], [0.01] * 5, rtol=1e-9)
    compare(BITS, [VIMCO(3), VIMCO(3)], [0.01, 0.03], rtol=1e-9)


def test_equal_learning_rates_may_differ_later() -> None:
    """As those of two runs that resume where a schedule has brought both down to zero."""
    models = [built(ONE, seed) for seed in (0, 1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for model, rate in zip(models, (0.1, 0.2), strict=True)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    step = BatchedStep(alone_steps(models, [IWAE(3)] * 2, optimizers), batch(0), machine_code=False)
    step([batch(0)] * 2, [noise(0), noise(0)])
    before = copy.deepcopy(models)
    for optimizer, rate in zip(optimizers, (0.1, 0.2), strict=True):
        optimizer.param_groups[0]["lr"] = rate
    step([batch(1)] * 2, [noise(1), noise(1)])
    for old, new, rate in zip(before, models, (0.1, 0.2), strict=True):
        for p, q in zip(old.parameters(), new.parameters(), strict=True):
            assert q.grad is not None
            torch.testing.assert_close(q, p - rate * q.grad)


def test_machine_code_differs_by_rounding_alone() -> None:
    """A rounding of float32 is 6e-8; Adam's first steps are the rate times a ratio of gradients near zero."""
    compare(ONE, [IWAE(3), IWAE(3)], [0.01, 0.01], 1e-4, torch.float32, machine_code=True)


def test_a_loss_that_depends_on_values_is_refused() -> None:
    models = [built(ONE, seed) for seed in (0, 1)]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    with pytest.raises(CannotCompileError):
        BatchedStep(alone_steps(models, [Branches(3)] * 2, optimizers), batch(0), machine_code=False)
