"""Check classes from outside the package, in milliseconds: what they return against what is known otherwise.

A wrong density or derivative trains without a word, and its numbers look like any others. So, on a few draws,

- the log-density that a conditional gives with its draws is compared with ``log_prob`` of them and, where the draws are
  a function of one normal vector e, with the change of variables log N(e; 0, I) - log |det dh/de|;
- a bound of equal log-weights must not exceed them, and its ``weights`` are compared with autograd;
- shapes are compared, and every number must be finite.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.config.build import described, place_outside
from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import GeneratorNoise, Noise, generator
from iwae_cli.data.base import SPLITS, Data
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.models.conditionals import Conditional, Given
from iwae_cli.models.networks import standard_normal_log_prob
from iwae_cli.models.priors import Prior
from iwae_cli.objectives.base import BoundObjective, Losses, Objective

K, BATCH = 3, 2
SIDE = 8
"""Of the images for which a model is built that is checked alone."""
MOST_SIZES = 256
"""Of a layer or of log-weights, where every one takes a derivative of its own."""
TOLERANCE = 0.01
"""Nats, with a hundredth of that share of large numbers: float32 rounds to less, a forgotten term is larger."""


def check(part: object) -> None:
    """Check an objective, a model or a prior, alone, as a run checks those from outside the package before step 0.

    Raises:
        UserError: one line that names class, method, what was seen and what was expected.
        TypeError: for anything else.
    """
    if isinstance(part, Objective):
        _check_objective(part, _built(GaussianMLP([2], [[4]]), (SIDE, SIDE), 2))
    elif isinstance(part, Architecture):
        levels = {"binary": 2, "grey": 17, "real": None}[part.observation]
        _check_model(_built(part, (SIDE, SIDE), levels), None)
    elif isinstance(part, LatentVariableModel):
        _check_model(part, None)
    elif isinstance(part, Prior):
        prior = _called(part, "build", SIDE)
        _check_conditional(prior, None, 1, prior)
    else:
        raise TypeError(f"part must be an objective, a model or a prior, got {type(part).__name__}")


def check_outside(objective: Objective, architecture: Architecture, data: Data) -> LatentVariableModel:
    """Return the networks with arbitrary weights, after checking them and the objective if any part is from outside.

    Raises:
        UserError: see ``check``; or data that the model cannot observe.
    """
    model: LatentVariableModel = _called(architecture, "outline", data.image_shape, data.levels)
    if any(map(_is_outside, (objective, architecture, *model.modules(), _likelihood(model)))):
        built = _built(architecture, data.image_shape, data.levels)
        _check_model(built, data)
        if _is_outside(objective):
            _check_objective(objective, built)
    return model


def _is_outside(part: object) -> bool:
    return not type(part).__module__.startswith(("iwae_cli.", "torch.", "builtins"))


def _likelihood(model: LatentVariableModel) -> object:
    return getattr(model.generative.observation, "likelihood", None)


def _called(part: object, method: str, *arguments: Any) -> Any:
    """Return what a method returns; an error in code of a user becomes one line that names it."""
    try:
        return getattr(part, method)(*arguments)
    except UserError:
        raise
    except Exception as error:
        if not _is_outside(part) and not place_outside(error):
            raise
        raise UserError(f"{_name(part)}.{method} raised {described(error)}") from error


def _name(part: object) -> str:
    return type(part).__name__


def _require(value: object, shape: tuple[int, ...], part: object, method: str, of: str, given: str = "") -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _name(value)
        raise UserError(f"{_name(part)}.{method} gives {of} of {seen}, expected {shape}{given}")
    if not value.isfinite().all():
        raise UserError(f"{_name(part)}.{method} gives {of} that is not finite ({_shown(value)})")
    return value.detach()


def _shown(value: Tensor) -> str:
    return ", ".join(f"{number:.4g}" for number in value.flatten()[:3].tolist())


def _compare(seen: Tensor, expected: Tensor, words: str) -> None:
    wrong = (seen - expected).abs() > TOLERANCE + TOLERANCE / 100 * expected.abs()
    if wrong.any():
        raise UserError(f"{words.format(_shown(seen[wrong][:1]), _shown(expected[wrong][:1]))}")


def _built(architecture: Architecture, image_shape: tuple[int, ...], levels: int | None) -> LatentVariableModel:
    """Return a model whose vectors are moved: at zero, as many begin, a forgotten log-scale would not be seen."""
    random = generator("cpu", 0, "check")
    mean = np.full(int(np.prod(image_shape)), 0.5)
    model: LatentVariableModel = _called(architecture, "build", image_shape, mean, random, levels)
    with torch.no_grad():
        for vector in (p for p in model.parameters() if p.ndim < 2):
            vector.add_(torch.where(vector == 0, 0.3, 0.1 * vector) * torch.randn(vector.shape, generator=random))
    return model


@final
class _OneNormal(Noise):
    """Noise that keeps the normal draws, to be differentiated for, and counts the calls."""

    def __init__(self, noise: Noise) -> None:
        self._noise, self.calls, self.normals = noise, 0, torch.zeros(0)

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        self.calls += 1
        self.normals = self._noise.normal(layer, k, batch, size).requires_grad_()
        return self.normals

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        self.calls += 1
        return self._noise.uniform(layer, k, batch, size)


def _noise(whole: nn.Module) -> Noise:
    parameter = next(whole.parameters(), torch.zeros(0))
    return GeneratorNoise(generator(parameter.device, 0, "check"), parameter.dtype)


def _check_conditional(
    part: Conditional, given: Given, level: int, whole: nn.Module, draws_are_differentiated: bool = False
) -> Tensor:
    """Return draws of h given ``given``, after comparing their log-densities; ``whole`` is the model of ``part``."""
    noise = _OneNormal(_noise(whole))
    found = _called(part, "sample", given, K, BATCH, level, noise)
    if not isinstance(found, tuple) or len(found) != 2:
        raise UserError(f"{_name(part)}.sample gives {_name(found)}, expected a pair (draws, log-density)")
    h, log_p = found
    h_now = _require(h, (K, BATCH, *getattr(h, "shape", (0,))[-1:]), part, "sample", "draws")
    if draws_are_differentiated and part.reparameterized and not h.requires_grad:
        raise UserError(
            f"{_name(part)}.sample gives draws without gradient, expected smooth functions of the parameters; or "
            "write reparameterized = False"
        )
    given = None if given is None else given.detach()
    by_sample = _require(log_p, (K, BATCH), part, "sample", "a log-density")
    again = _require(_called(part, "log_prob", h_now, given), (K, BATCH), part, "log_prob", "a log-density")
    words = f"{_name(part)}.sample gives a draw the log-density {{}} nats, expected {{}} as log_prob gives it"
    _compare(by_sample, again, words)
    alone = _called(part, "log_prob", h_now[:, :1], None if given is None else given[..., :1, :])
    words = f"{_name(part)}.log_prob gives {{}} nats in a batch, expected {{}} as without the other rows of the batch"
    _compare(again[:, :1], _require(alone, (K, 1), part, "log_prob", "a log-density"), words)
    if noise.calls == 1 and noise.normals.shape == h.shape and h.requires_grad and h.shape[-1] <= MOST_SIZES:
        rows = [torch.autograd.grad(one.sum(), noise.normals, retain_graph=True)[0] for one in h.unbind(-1)]
        change = torch.linalg.slogdet(torch.stack(rows, -2)).logabsdet
        words = f"{_name(part)}.sample gives a draw the log-density {{}} nats, expected {{}} by the change of variables"
        _compare(by_sample, standard_normal_log_prob(noise.normals.detach()) - change, words)
    return h_now


def _check_model(model: LatentVariableModel, data: Data | None) -> None:
    """Check every conditional, then the chains; x are the first images, or drawn from the model."""
    p, q = model.generative, model.inference
    h = _check_conditional(p.prior, None, len(p.layers) + 1, model)
    for level, layer in reversed(list(enumerate(p.layers, start=1))):
        h = _check_conditional(layer, h, level, model)
    drawn = _check_conditional(p.observation, h, 0, model)
    if wanted := p.observation.refuses(drawn.flatten(0, 1)):
        raise UserError(f"{_name(p.observation)}.sample gives {_shown(drawn)}, expected {wanted}")
    x = drawn[0]
    for name in SPLITS if data is not None else ():
        assert data is not None
        images = data.evaluation_split(name, 0, BATCH if data.binarization == "dynamic" else None).x
        try:
            p.require_observable(images)
        except ValueError as error:
            raise UserError(f"{name} split of {data.name}: {error}") from None
        x = images[[0, -1]].to(drawn)
    given = x / q.white
    for level, layer in enumerate(q.layers, start=1):
        given = _check_conditional(layer, given, level, model, draws_are_differentiated=True)
    latents, log_q = _called(q, "sample", x, K, _noise(model))
    log_q = _require(log_q, (K, BATCH), q, "sample", "log q(h|x)")
    words = f"{_name(q)}.sample gives log q(h|x) = {{}} nats, expected {{}} as forward gives it for the same draws"
    _compare(log_q, _require(_called(q, "__call__", x, latents), (K, BATCH), q, "forward", "log q(h|x)"), words)
    _require(_called(p, "__call__", x, latents), (K, BATCH), p, "forward", "log p(x, h)")
    log_p = _require(_called(p, "log_likelihood", x, latents), (K, BATCH), p, "log_likelihood", "log p(x|h)")
    if data is not None and data.levels is not None and log_p.max() > TOLERANCE:
        name = _name(_likelihood(model) or p.observation)
        raise UserError(f"{name} gives log p(x|h) = {log_p.max():.4g} nats, expected at most 0 for integers")


def _check_objective(objective: Objective, model: LatentVariableModel) -> None:
    k, name = objective.num_samples, _name(objective)
    batch = BATCH if k != BATCH else BATCH + 1
    log_w = 2 * torch.randn(k, batch, generator=generator("cpu", 0, "check")) - 30

    def of(method: str, log_w: Tensor, shape: tuple[int, ...]) -> Tensor:
        given = f" for log-weights of shape {tuple(log_w.shape)}"
        return _require(_called(objective, method, log_w), shape, objective, method, "values", given)

    bound = of("bound", log_w, (batch,))
    words = f"{name}.bound gives {{}} in a batch, expected {{}} as without the other images of the batch"
    _compare(bound[:1], of("bound", log_w[:, :1], (1,)), words)
    for value in (-30.0, 5.0):
        equal = of("bound", torch.full((k, 1), value), (1,)).item()
        if objective.lower_bound and equal > value + TOLERANCE:
            raise UserError(
                f"{name}.bound of {k} log-weights that are all {value:g} is {equal:.4g}, expected at most {value:g}, "
                "which is log p(x) then; or write lower_bound = False"
            )
    if isinstance(objective, BoundObjective):
        _check_derivatives(objective, log_w)
    x = model.generative.sample(BATCH, _noise(model))[1].detach()
    losses = _called(objective, "losses", model, x, model.draw(x, k, _noise(model)), _noise(model))
    if not isinstance(losses, Losses):
        raise UserError(f"{name}.losses gives {_name(losses)}, expected Losses")
    for part in ("generative", "inference"):
        _require(getattr(losses, part), (), objective, "losses", f"the {part} loss")
    _require(losses.bound, (BATCH,), objective, "losses", "a bound")


def _check_derivatives(objective: BoundObjective, log_w: Tensor) -> None:
    """Compare ``weights`` and ``doubly_weights`` with autograd of ``bound``, without torch.func, which they may use."""
    shape, leaf = tuple(log_w.shape), log_w.clone().requires_grad_()
    bound = _called(objective, "bound", leaf)
    if not bound.requires_grad:
        raise UserError(f"{_name(objective)}.bound gives values without gradient, expected a smooth function of log_w")
    how: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
    (a,) = torch.autograd.grad(bound.sum(), leaf, **how)
    b = a.detach().clone()[:MOST_SIZES]
    for i in range(len(b) if a.requires_grad else 0):
        b[i] -= torch.autograd.grad(a[i].sum(), leaf, **how)[0][i].detach()
    for method, expected in (("weights", a.detach()), ("doubly_weights", b)):
        try:
            found = getattr(objective, method)(log_w)
        except (ValueError, NotImplementedError):
            if (objective.gradient, method) in (("stl", "weights"), ("dreg", "weights"), ("dreg", "doubly_weights")):
                _called(objective, method, log_w)
            continue
        words = f"{_name(objective)}.{method} gives {{}}, expected {{}} by autograd of bound"
        _compare(_require(found, shape, objective, method, "values")[: len(expected)], expected, words)
