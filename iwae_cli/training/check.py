"""Check classes from outside the package on a few draws, in milliseconds: what they return against what must be.

A wrong density or derivative trains without a word, and its numbers look like any others. So

- the log-density that a conditional gives with its draws is compared with ``log_prob`` of them and, where a draw is a
  function of one normal vector e, with the change of variables log N(e; 0, I) - log |det dh/de|;
- where it is not, the integral of a density is compared with 1 by a test that a right one fails once in 10^9 times;
- a bound of equal log-weights must not exceed them, and ``weights`` and ``doubly_weights`` are compared with autograd;
- shapes are compared, every number must be finite, and no row may depend on the other rows of its batch;
- no two draws may have one key of the noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iwae_cli.config.build import described, place_outside
from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import GeneratorNoise, Noise, generator
from iwae_cli.core.numerics import log_mean_exp
from iwae_cli.data.base import SPLITS, Data
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Conditional, Draws, Given
from iwae_cli.models.networks import gaussian_mixture_log_prob, standard_normal_log_prob
from iwae_cli.models.priors import Prior
from iwae_cli.objectives.base import BoundObjective, Losses, Objective
from iwae_cli.record.identity import is_ours
from iwae_cli.training.steps.compiled import Recorder, Replay

K, BATCH = 3, 2
SHAPE = (8, 8)
"""Of the images for which a model is built that is checked alone."""
MOST = 256
"""Units of a layer, or log-weights, that are differentiated one by one."""
TOLERANCE = 0.01
"""And a hundredth of it for every nat: float32 rounds to less, and a forgotten term is more."""
FLAT = 1e-6
"""Least ratio of singular values of a Jacobian: below it draws lie on a surface, which has no such density."""
FOLDS = 64
"""Draws that are to show both signs of the determinant of a map that folds."""
DRAWS, PARTS = 512, 16
"""Draws to which a density is fitted, as many to test it, and components of the fit."""
BETS, CERTAIN = (0.02, 0.2, 0.9), math.log(1e9)
"""Values of a, see ``_check_integral``, and the least logarithm of the mean of their products that refuses."""


def check(part: object) -> None:
    """Check an objective, a model (architecture or networks) or a prior, as a run checks those of users before step 0.

    Raises:
        UserError: one line that names class, method, what was seen and what was expected.
        TypeError: for anything else.
    """
    if isinstance(part, Objective):
        _check_objective(part, _built(GaussianMLP([2], [[4]]), SHAPE, 2))
    elif isinstance(part, Architecture):
        model = _built(part, SHAPE, {"binary": 2, "grey": 17, "real": None}[part.observation])
        _check_model(model)
        _require_kind(part, model)
    elif isinstance(part, LatentVariableModel):
        _check_model(part)
    elif isinstance(part, Prior):
        _check_prior(part, 8)
        _check_prior(part, 1)
    else:
        raise TypeError(f"part must be an objective, a model or a prior, got {type(part).__name__}")


def check_outside(objective: Objective, architecture: Architecture, data: Data) -> LatentVariableModel:
    """Return the networks with arbitrary weights, after checking them and the objective if any part is from outside.

    Raises:
        UserError: see ``check``; or data that the model cannot observe.
    """
    model: LatentVariableModel = _called(architecture, "outline", data.image_shape, data.levels)
    for name in SPLITS:
        # Two rows show what is drawn; the rest of such a split are uint8 values that ``Data`` has looked at.
        x = data.evaluation_split(name, 0, BATCH).x if data.binarization == "dynamic" else getattr(data, name)
        _require_observable(model, f"{name} split of {data.name}", x)
    likelihood = getattr(model.generative.observation, "likelihood", None)
    if any(map(_is_outside, (objective, architecture, likelihood, *model.modules()))):
        built = _built(architecture, data.image_shape, data.levels)
        _check_model(built, data)
        _require_kind(architecture, built)
        if isinstance(prior := getattr(architecture, "prior", None), Prior) and _is_outside(prior):
            _check_prior(prior, 1)
        if _is_outside(objective):
            _check_objective(objective, built)
    return model


def _is_outside(part: object) -> bool:
    return part is not None and not is_ours(type(part).__module__)


def _require_observable(model: LatentVariableModel, name: str, x: Tensor) -> None:
    p = model.generative
    is_ours = type(p).require_observable is GenerativeChain.require_observable
    if is_ours and (p.observation.largest is None or not x.is_floating_point()):
        x = torch.stack(x.aminmax())[None]  # the ends say it all, in milliseconds, also where a number is NaN
    try:
        p.require_observable(x)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _require_kind(architecture: Architecture, model: LatentVariableModel) -> None:
    if architecture.discrete == model.inference.reparameterized:
        raise UserError(
            f"{type(architecture).__name__}.discrete is {architecture.discrete}, and reparameterized of its q is "
            f"{model.inference.reparameterized}: write discrete = {not architecture.discrete} in the class"
        )


def _called(part: object, method: str, *arguments: Any) -> Any:
    """Return what a method returns; an error in code of a user becomes one line that names it."""
    try:
        return getattr(part, method)(*arguments)
    except Exception as error:
        if isinstance(error, UserError) or not (_is_outside(part) or place_outside(error)):
            raise
        raise UserError(f"{type(part).__name__}.{method} raised {described(error)}") from error


def _gives(part: object, method: str, of: str, seen: object, expected: object) -> UserError:
    return UserError(f"{type(part).__name__}.{method} gives {of} {seen}, expected {expected}")


def _require(part: object, method: str, of: str, value: object, shape: tuple[int, ...], given: str = "") -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape:
        seen = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"that is a {type(value).__name__}"
        raise _gives(part, method, of, seen, f"{tuple(shape)}{given}")
    if not value.isfinite().all():
        raise _gives(part, method, of, f"of {value[~value.isfinite()][0]}", f"finite numbers{given}")
    return value.detach()


def _compare(part: object, method: str, of: str, seen: Tensor, expected: Tensor, why: str) -> None:
    wrong = ~((seen - expected).abs() <= TOLERANCE * (1 + expected.abs() / 100))  # also where one is no number
    if wrong.any():
        raise _gives(part, method, of, f"{seen[wrong][0]:.4g}", f"{expected[wrong][0]:.4g} {why}")


def _jacobian(h: Tensor, e: list[Tensor]) -> Tensor:
    """Return dh/de, float64, (k, batch, units, units), of draws h (k, batch, units) that are functions of all of e."""
    how: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    rows = [torch.cat(torch.autograd.grad(unit.sum(), e, **how), -1) for unit in h.unbind(-1)]
    return torch.stack(rows, -2).double()


class _Keys(Noise):
    """Noise that returns the key of a draw: in an evaluation, equal keys give equal numbers."""

    def normal(self, layer: int, *size: int) -> Any:
        return "normal", layer

    def uniform(self, layer: int, *size: int) -> Any:
        return "uniform", layer


def _require_distinct(part: object, recorder: Recorder) -> None:
    keys = [draw(_Keys()) for draw in recorder.draws]
    for i, (kind, layer) in enumerate(keys):
        if (kind, layer) in keys[:i]:
            raise UserError(
                f"{type(part).__name__}.sample draws noise.{kind}({layer}, ...) twice, and an evaluation gives it the "
                "same numbers twice: draw one of twice the size, at the level that sample is given, and split it"
            )


def _is_above(seen: Tensor, expected: Tensor) -> bool:
    slack = TOLERANCE * (1 + expected.abs() / 100)
    return bool((seen > expected + slack).any() and (seen >= expected - slack).all())


def _folds(part: Conditional, given: Given, level: int, like: list[Tensor]) -> bool:
    """Return whether the sign of det dh/de varies: that of a smooth map with an inverse does not; ``like`` is an e."""
    if given is not None and given.dim() == 3:
        given = given[:1].expand(FOLDS, -1, -1)
    noise = GeneratorNoise(generator(like[0].device, 0, "check", "folds"), like[0].dtype)
    e = [noise.normal(level, FOLDS, *some.shape[1:]).requires_grad_() for some in like]
    h = _called(part, "sample", given, FOLDS, BATCH, level, Replay(e))[0]
    return len(torch.linalg.slogdet(_jacobian(h, e)).sign.unique()) > 1


def _built(architecture: Architecture, image_shape: tuple[int, ...], levels: int | None) -> LatentVariableModel:
    """Return a model with moved parameters, see ``_move``."""
    random = generator("cpu", 0, "check")
    mean = np.full(math.prod(image_shape), 0.5)
    model: LatentVariableModel = _called(architecture, "build", image_shape, mean, random, levels)
    model.eval()  # in training a mixture takes its components in turn, which looks like a flow
    _move(model, random)
    return model


@torch.no_grad()
def _move(part: nn.Module, random: torch.Generator) -> None:
    """Move vectors, and what is zero in modules of users: where many begin, a forgotten log-scale would not be seen."""
    theirs = {id(p) for module in part.modules() if _is_outside(module) for p in module.parameters(recurse=False)}
    for p in part.parameters():
        if p.ndim < 2:
            p.add_(torch.where(p == 0, 0.3, 0.1 * p) * torch.randn(p.shape, generator=random))
        elif id(p) in theirs and not p.any():
            # A row by about 1 in all: a log-scale of one unit is seen, and a weight for many stays small.
            p.add_((1 + 0.3 * torch.randn(p.shape, generator=random)) / p.shape[-1])


def _check_conditional(part: Conditional, given: Given, level: int, like: Tensor, of_q: bool = False) -> Tensor:
    """Return draws of h given ``given``, after comparing their log-densities; ``like`` has device and dtype."""
    given, of = None if given is None else given.detach(), "a log-density"
    recorder = Recorder(like)
    found = _called(part, "sample", given, K, BATCH, level, recorder)
    if not isinstance(found, tuple) or len(found) != 2:
        raise _gives(part, "sample", "a", type(found).__name__, "a pair (draws, log-density)")
    if of_q and part.reparameterized and not getattr(found[0], "requires_grad", True):
        raise _gives(part, "sample", "draws", "without gradient", "smooth functions, or reparameterized = False")
    _require_distinct(part, recorder)
    drawn = [draws.requires_grad_() for draws in recorder.drawn]
    live, log_p = _called(part, "sample", given, K, BATCH, level, Replay(drawn))
    h = _require(part, "sample", "draws", live, (K, BATCH, *getattr(live, "shape", (0,))[-1:]))
    log_p = _require(part, "sample", of, log_p, (K, BATCH))
    again = _require(part, "log_prob", of, _called(part, "log_prob", h, given), (K, BATCH))
    _compare(part, "sample", of, log_p, again, "as log_prob gives it for the same draw")
    alone = _called(part, "log_prob", h[:, :1], None if given is None else given[..., :1, :])
    alone = _require(part, "log_prob", of, alone, (K, 1))
    _compare(part, "log_prob", of, again[:, :1], alone, "as without the other rows of the batch")
    with torch.random.fork_rng(devices=[]):
        try:
            training = copy.deepcopy(part).train()  # a copy: running means change
        except Exception:  # a user's own class may refuse to be copied
            training = part
        rows = None if given is None else given[..., [0, 0], :]
        calls = (h, given), (h, given), (h[:, [0, 0]], rows)
        found = [_require(part, "log_prob", of, _called(training, "log_prob", *call), (K, BATCH)) for call in calls]
    first, second, alike = (values[:, 0] for values in found)
    mode = "both in training mode (dropout and batch norm do so; layer norm does not)"
    _compare(part, "log_prob", of, first, second, f"as in a second call, {mode}")
    _compare(part, "log_prob", of, first, alike, f"as beside another row of the batch, {mode}")
    # A uniform draw is never negative.
    is_normal = all(e.min() < 0 and e.shape[:2] == h.shape[:2] for e in drawn)
    is_normal = is_normal and sum(e.shape[-1] for e in drawn) == h.shape[-1]
    if is_normal and live.requires_grad and h.shape[-1] <= MOST:
        jacobian = _jacobian(live, drawn)
        if not jacobian.isfinite().all():
            raise _gives(part, "sample", "draws", "whose derivative is not finite", "smooth functions of the noise")
        of_e = standard_normal_log_prob(torch.cat(drawn, -1).detach())
        exact = of_e - torch.linalg.slogdet(jacobian).logabsdet.to(log_p)
        singular = torch.linalg.svdvals(jacobian)
        on_surface = (singular[..., -1] <= FLAT * singular[..., 0]).any()
        # Where several e give one h, as with |e| or sorted draws, this is a part of the density.
        if not on_surface and not (_is_above(log_p, exact) and _folds(part, given, level, drawn)):
            _compare(part, "sample", of, log_p, exact, "by the change of variables")
            return h
    if any(map(_is_outside, (getattr(part, "likelihood", None), *part.modules()))):
        _check_integral(part, given, level, like)
    return h


def _check_prior(prior: Prior, size: int) -> None:
    """Check a prior of ``size`` units; the fewer, the closer is the density that is fitted to its draws."""
    random = generator("cpu", 0, "check")
    try:
        part = _called(prior, "build", size)
        if not isinstance(part, Conditional):
            raise _gives(prior, "build", "a", type(part).__name__, "a Conditional")
        for each in part.modules():
            if isinstance(each, Conditional):
                _called(each, "initialize", random)
        _move(part, random)
        _check_conditional(part, None, 1, torch.zeros(1, 1))
    except UserError as error:
        if size > 1 or error.__cause__ is None:
            raise  # else code that needs more units


def _check_integral(part: Conditional, given: Given, level: int, like: Tensor) -> None:
    """Compare the integral of a density p with 1, by a density g that is fitted to half of its draws.

    If p is right, w = g(h)/p(h) of draws from p and w = p(h)/g(h) of draws from g have means of at most 1, so that
    prod (1 - a + a w) exceeds 10^9 with a probability of at most 10^-9, for all p and g (Ville's inequality; Shafer
    2021, Testing by betting, arXiv 1903.06991). A normalizer is missed where it is less than g differs from p.
    """
    noise = GeneratorNoise(generator(like.device, 0, "check", "integral"), like.dtype)
    if given is not None:
        given = given[:1] if given.dim() == 2 else given[:1, :1].expand(2 * DRAWS, -1, -1)
    with torch.no_grad():
        h = _called(part, "sample", given, 2 * DRAWS, 1, level, noise)[0]
        h = _require(part, "sample", "draws", h, (2 * DRAWS, 1, *getattr(h, "shape", (0,))[-1:]))
        seen, h = h.double().cpu().view(2, DRAWS, -1)
        for drawn, log_g, log_g_of_h in _fits(seen, h, part.largest):
            # Outside the box of the draws a density need not be right.
            inside = ((drawn >= seen.amin(0)) & (drawn <= seen.amax(0))).all(-1)
            points = torch.cat([h, torch.where(inside[:, None], drawn, seen)])[:, None].to(like)
            try:
                log_p = part.log_prob(points, given).double().cpu().view(2 * DRAWS)
            except Exception:
                return  # the range of h is no box, and log_prob says so
            high = (log_p[DRAWS:] - log_g).masked_fill(~inside, -math.inf)
            rounding = TOLERANCE * (1 + log_p.abs().nan_to_num(posinf=0) / 100)
            for word, log_w in (("high", high - rounding[DRAWS:]), ("low", log_g_of_h - (log_p + rounding)[:DRAWS])):
                log_w = log_w.nan_to_num(-math.inf, math.inf, -math.inf)
                bets = [torch.logaddexp(log_w + math.log(a), log_w.new_tensor(1 - a).log()).sum() for a in BETS]
                if torch.stack(bets).logsumexp(0) > CERTAIN + math.log(len(bets)):
                    seen_as = f"that is too {word} by about {float(log_mean_exp(log_w)):.4g} nats"
                    raise _gives(part, "log_prob", "a log-density", seen_as, "one whose integral is 1")


def _fits(seen: Tensor, h: Tensor, largest: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield draws of densities that are fitted to ``seen``, their log-densities, and those of ``h``.

    None where h lies on a sphere, a simplex or another surface, or where its states are too many to be known.
    """
    random = generator("cpu", 0, "check", "fit")
    both = torch.cat([seen, h])
    is_whole = (both % 1 == 0).all()
    rows, of_row, count = seen.unique(dim=0, return_inverse=True, return_counts=True)
    if len(rows) <= DRAWS // 4:  # few states: as often as they were seen
        log_g = (count / DRAWS).log()
        distance, nearest = torch.cdist(h, rows, p=1).min(1)
        yield seen, log_g[of_row], log_g[nearest].masked_fill(distance > 0, -math.inf)
    elif largest is not None:  # independent units, one of the draws in DRAWS + 1 being uniform
        if not is_whole or both.min() < 0 or both.max() > largest:
            return
        uniform = torch.randint(0, largest + 1, seen.shape, generator=random).double()
        other = torch.rand(seen.shape, generator=random) * (DRAWS + 1) < 1
        drawn = torch.where(other, uniform, seen.gather(0, torch.randint(0, DRAWS, seen.shape, generator=random)))
        cells = torch.zeros(largest + 1, seen.shape[1], dtype=seen.dtype)
        cells.scatter_add_(0, seen.long(), torch.ones_like(seen))
        log_g = ((cells + 1 / (largest + 1)) / (DRAWS + 1)).log()
        yield drawn, log_g.gather(0, drawn.long()).sum(-1), log_g.gather(0, h.long()).sum(-1)
    elif not is_whole and not _repeats(both) and not _is_surface(both):
        for parts in (1, PARTS) if seen.shape[1] <= MOST else (1,):  # Gaussians, by k-means
            centres = seen[:1]
            while len(centres) < parts:  # the farthest draws
                centres = torch.cat([centres, seen[torch.cdist(seen, centres).amin(1).argmax()][None]])
            for _ in range(5):
                of = torch.nn.functional.one_hot(torch.cdist(seen, centres).argmin(1), parts).double()
                size = of.sum(0)[:, None].clamp_min(1)
                centres = of.T @ seen / size
            spread = seen.var(0)
            # A prior belief of a few draws: a part of one draw has no variance of its own.
            variance = (of.T @ (seen - of @ centres).square() + 2 * spread) / (size + 2)
            weights = of.sum(0) / DRAWS
            chosen = torch.multinomial(weights, DRAWS, replacement=True, generator=random)
            e = torch.randn(seen.shape, dtype=seen.dtype, generator=random)
            mixture = centres, variance.sqrt().log(), weights.log()
            drawn = centres[chosen] + variance[chosen].sqrt() * e
            yield drawn, gaussian_mixture_log_prob(drawn, *mixture), gaussian_mixture_log_prob(h, *mixture)


def _repeats(h: Tensor) -> bool:
    """Return whether a unit has one value again and again: it is discrete, or has an atom."""
    most = [int(unit.unique(return_counts=True)[1].max()) for unit in h.unbind(1)]
    return max(most) > len(h) // 100


def _is_surface(h: Tensor) -> bool:
    """Return whether the units of h, or their squares, obey a linear equation."""
    terms = torch.cat([h, h.square()], -1) if 4 * h.shape[1] < len(h) else h
    if 2 * terms.shape[1] > len(h):
        return False  # too few draws to see it
    values = torch.linalg.svdvals((terms - terms.mean(0)) / terms.std(0).clamp_min(1e-30))
    return bool(values[-1] < 1e-5 * values[0])


def _check_model(model: LatentVariableModel, data: Data | None = None) -> None:
    """Check every conditional, then the chains, on two images of ``data``, or on draws of the model without them."""
    p, q, like = model.generative, model.inference, next(model.parameters()).new_zeros(1, 1)
    h = _check_conditional(p.prior, None, len(p.layers) + 1, like)
    for level, layer in reversed(list(enumerate(p.layers, start=1))):
        h = _check_conditional(layer, h, level, like)
    x = _check_conditional(p.observation, h, 0, like)[0]
    _require_observable(model, f"{type(p.observation).__name__}.sample", x)
    if data is not None:
        x = data.evaluation_split("test", 0, BATCH).x[[0, -1]].to(like)
    given = x / q.white
    for level, layer in enumerate(q.layers, start=1):
        given = _check_conditional(layer, given, level, like, of_q=True)
    for chain, arguments in ((p, (BATCH,)), (q, (x, K))):
        recorder = Recorder(x)
        _called(chain, "sample", *arguments, recorder)
        _require_distinct(chain, recorder)
    latents, log_q = _called(q, "sample", x, K, GeneratorNoise(generator(x.device, 0, "check"), x.dtype))
    log_q = _require(q, "sample", "log q(h|x)", log_q, (K, BATCH))
    again = _require(q, "forward", "log q(h|x)", _called(q, "__call__", x, latents), (K, BATCH))
    _compare(q, "sample", "log q(h|x)", log_q, again, "as forward gives it for the same draws")
    if _is_outside(q):
        # Its factors may be others than its layers.
        named = type(type(q).__name__, (_Joint,), {})
        _check_conditional(named(q, [h.shape[-1] for h in latents]), x, 1, like)
    # From draws of q that are far out, as those of a q with arbitrary weights may be, log p(x, h) may be -inf.
    latents = tuple(h.detach().reshape(K, BATCH, -1) for h in _called(p, "sample", K * BATCH, Recorder(x))[0])
    joint = _require(p, "forward", "log p(x, h)", _called(p, "__call__", x, latents), (K, BATCH))
    of_x = _require(p, "log_likelihood", "log p(x|h)", _called(p, "log_likelihood", x, latents), (K, BATCH))
    of_h = _require(p, "log_prior", "log p(h)", _called(p, "log_prior", latents), (K, BATCH))
    _compare(p, "forward", "log p(x, h)", joint, of_x + of_h, "as log_likelihood and log_prior give it in all")
    most = float(of_x.max())
    if p.observation.largest is not None and most > TOLERANCE:
        raise _gives(p.observation, "log_prob", "log p(x|h)", f"{most:.4g}", "at most 0 for integers")


class _Joint(Conditional):
    """All layers of q as one distribution of all their units, ``sizes`` in each."""

    def __init__(self, chain: InferenceChain, sizes: list[int]) -> None:
        super().__init__()
        self.chain, self.sizes = chain, sizes
        known = [layer.largest for layer in chain.layers if layer.largest is not None]
        self.largest = max(known, default=None) if len(known) == len(chain.layers) else None

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        assert given is not None  # x
        latents, log_q = self.chain.sample(given, k, noise)
        return torch.cat(latents, -1), log_q

    def log_prob(self, h: Tensor, given: Given) -> Tensor:
        log_q: Tensor = self.chain(given, h.split(self.sizes, -1))
        return log_q

    def mean(self, given: Given) -> None:
        return None


def _check_objective(objective: Objective, model: LatentVariableModel) -> None:
    k = objective.num_samples
    batch = BATCH + (k == BATCH)
    log_w = 2 * torch.randn(k, batch, generator=generator("cpu", 0, "check")) - 30

    def bound_of(log_w: Tensor) -> Tensor:
        of = f" for log-weights of shape {tuple(log_w.shape)}"
        return _require(objective, "bound", "values", _called(objective, "bound", log_w), log_w.shape[1:], of)

    _compare(
        objective, "bound", "a value", bound_of(log_w)[:1], bound_of(log_w[:, :1]), "as without the rest of the batch"
    )
    for value in (-30.0, 5.0) if objective.lower_bound else ():
        if (equal := float(bound_of(torch.full((k, 1), value)))) > value + TOLERANCE:
            why = f"which is log p(x) where all log-weights are {value:g}; or lower_bound = False"
            raise _gives(objective, "bound", "a value", f"{equal:.4g}", f"at most {value:g}, {why}")
    if isinstance(objective, BoundObjective):
        _check_derivatives(objective, log_w)
    noise = GeneratorNoise(generator("cpu", 0, "check"))
    x = model.generative.sample(BATCH, noise)[1].detach()
    losses = _called(objective, "losses", model, x, model.draw(x, k, noise), noise)
    if not isinstance(losses, Losses):
        raise _gives(objective, "losses", "a", type(losses).__name__, "Losses")
    for part, shape in (("generative", ()), ("inference", ()), ("bound", (BATCH,))):
        _require(objective, f"losses ({part})", "values", getattr(losses, part), shape)


def _check_derivatives(objective: BoundObjective, log_w: Tensor) -> None:
    """Compare ``weights`` and ``doubly_weights`` with autograd of ``bound``, without torch.func, which they may use."""
    leaf = log_w.clone().requires_grad_()
    bound = _called(objective, "bound", leaf)
    if not bound.requires_grad:
        raise _gives(objective, "bound", "values", "without gradient", "a smooth function of log_w")
    how: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
    (a,) = torch.autograd.grad(bound.sum(), leaf, **how)
    b = a.detach().clone()[:MOST]
    for i in range(len(b) if a.requires_grad else 0):
        b[i] -= torch.autograd.grad(a[i].sum(), leaf, **how)[0][i].detach()
    needed = {"total": (), "stl": ("weights",)}.get(objective.gradient, ("weights", "doubly_weights"))
    for method, expected in (("weights", a.detach()), ("doubly_weights", b)):
        try:
            found = _called(objective, method, log_w)
        except (UserError, ValueError) as error:
            if method not in needed and isinstance(error.__cause__ or error, ValueError | NotImplementedError):
                continue  # it has none
            raise
        found = _require(objective, method, "values", found, tuple(log_w.shape))[: len(expected)]
        _compare(objective, method, "a value", found, expected, "by autograd of bound")
