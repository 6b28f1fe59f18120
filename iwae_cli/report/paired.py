"""Two runs, or two groups of seeds, compared image by image on the same evaluation split."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
from jaxtyping import Float64

from iwae_cli.core.errors import UserError
from iwae_cli.record.summary import decimals, measured
from iwae_cli.report.reader import Run
from iwae_cli.report.selection import (
    NAMED,
    Kind,
    Scored,
    by_kind,
    by_refined,
    mean,
    mixed_fits,
    telling_apart,
    typed,
    unrefined,
)

ENOUGH_SEEDS = 3  # fewer on a side are too few for a standard error over seeds
SEEN = 2  # standard errors, over images and over seeds together, from which on a difference is seen
BY_Q, BY_REFINED = "the trained q", "the refined proposals"
INSIDE_GAP, WITHIN_BIAS = "inside gap_q", "below three times the bias of the estimate"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile)
"""Errors of ``per_image`` where a file is not what an evaluation writes."""


@final
@dataclass(frozen=True)
class Paired:
    """The paired difference of two models, A and B, on the same images; each side is a mean over its seeds.

    ``difference`` is the mean over images of log p^(x) under A minus that under B; positive: A has the lower NLL.
    """

    a: str
    b: str
    seeds_a: tuple[int, ...]  # training seeds, one per run
    seeds_b: tuple[int, ...]
    split: str
    k: int
    images: int
    difference: float  # nats
    stderr_images: float  # for other images with the same weights: sd of the differences / sqrt(images)
    stderr_seeds: float | None  # for other seeds: sqrt(var_A / n_A + var_B / n_B) of their means; None for one seed
    wins_a: int  # images on which A has the higher log p^(x)
    wins_b: int
    ties: int
    bias_mc: float | None  # the larger of the two biases by Jensen's inequality, nats; None where unknown
    by: str  # the proposals of the estimates on both sides
    gap_q_a: float | None  # how much too high NLL_k by the trained q is at least, nats; None where unknown
    gap_q_b: float | None
    unrefined: str  # runs that lack refined values to compare, and what gives them; may be empty
    mixed_fits: str  # runs whose refined proposals are those of an earlier version, and what renews them; may be empty

    @property
    def stderr(self) -> float:
        """For other images and other seeds: the root of the sum of both squared errors, as far as they are known."""
        return math.hypot(self.stderr_images, self.stderr_seeds or 0.0)

    @property
    def seen(self) -> bool:
        """Whether the difference is at least ``SEEN`` standard errors."""
        return self.difference != 0 and abs(self.difference) >= SEEN * self.stderr

    @property
    def few_seeds(self) -> str | None:
        """A caution where there are few seeds."""
        if self.stderr_seeds is None:
            return "one seed on a side: nothing is known about other training seeds"
        if min(len(self.seeds_a), len(self.seeds_b)) < ENOUGH_SEEDS:
            return f"fewer than {ENOUGH_SEEDS} seeds on a side: stderr over seeds is itself hardly known"
        return None

    @property
    def within(self) -> str | None:
        """Which error of the estimates may explain the whole difference."""
        size, gaps = abs(self.difference), [gap for gap in (self.gap_q_a, self.gap_q_b) if gap is not None]
        if self.by == BY_Q and gaps and size <= max(gaps):
            return INSIDE_GAP
        return WITHIN_BIAS if self.bias_mc is not None and size < 3 * abs(self.bias_mc) else None

    @property
    def cautions(self) -> list[str]:
        """What the difference does not show."""
        found = [caution for caution in (self.few_seeds, self.mixed_fits) if caution]
        if self.within:
            inside = self.within == INSIDE_GAP
            sides = (("A", self.gap_q_a), ("B", self.gap_q_b))
            gaps = [f"{'unknown' if gap is None else f'{gap:.2f} nats'} of {name}" for name, gap in sides]
            size = ", ".join(gaps) if inside else f"{self.bias_mc:+.4f} nats"
            lacking = f"; {self.unrefined}" if self.unrefined else ""
            found.append(f"{self.within} ({size}): {better_fit(self.by)}{lacking}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, whether the difference is seen, and the cautions."""
        return {**asdict(self), "stderr": self.stderr, "seen": self.seen, "cautions": self.cautions}

    @property
    def lines(self) -> list[str]:
        """The comparison in words."""
        sides = (("A", self.a, self.seeds_a), ("B", self.b, self.seeds_b))
        lines = [f"{x}: {name} (seed{'s' if len(s) > 1 else ''} {', '.join(map(str, s))})" for x, name, s in sides]
        errors = {"images": self.stderr_images, "seeds": self.stderr_seeds}
        known = [f"{error:.{decimals(error)}f} over {name}" for name, error in errors.items() if error is not None]
        lines.append(
            f"A - B = {self.difference:+.{decimals(self.stderr, 4)}f} nats of log p(x) by {self.by}, paired on "
            f"{self.images:,} {self.split} images, k = {self.k}; standard error {', '.join(known)}"
        )
        nll = "refined NLL" if self.by == BY_REFINED else "NLL"
        lower = f"{'A' if self.difference > 0 else 'B'} has the lower {nll}"
        sized = measured(self.difference, self.stderr, "+")
        ties = f", {self.ties:,} neither" if self.ties else ""
        lines.append(
            f"{lower if self.seen else f'no difference is seen ({sized}, below {SEEN} standard errors)'}; "
            f"A wins {self.wins_a:,} images, B {self.wins_b:,}{ties}"
        )
        lines += [f"caution: {caution}" for caution in self.cautions]
        return lines + ([f"note: {self.unrefined}"] if self.unrefined and not self.within else [])


def better_fit(by: str) -> str:
    """Return what a difference within the error of its estimates may be, and what tells."""
    refine = "evaluation.refine=all or " if by == BY_Q else ""
    return f"a better fit of {by} may be all of it; {refine}estimator=ais tells p and q apart"


def compare(name_a: str, a: Sequence[Run], name_b: str, b: Sequence[Run], split: str) -> Paired:
    """Compare two groups of finished runs; the runs of a group must differ by their seed only.

    Raises:
        UserError: a group mixes trainings, both hold the same run, the runs do not share an evaluation
            (images, k, weights, precision, seed), or a file of per-image values is missing or damaged.
    """
    for name, group in ((name_a, a), (name_b, b)):
        # First by any evaluation: two trainings in one group are often evaluated in two ways.
        _one_training(name, [Scored(run, run.scores[0], split) for run in group])
    hashes = {run.identity.rpartition("-")[2] for run in a}
    both = [run.identity for run in b if run.identity.rpartition("-")[2] in hashes]
    if both:
        raise UserError(f"--compare {name_a} {name_b}: both hold {min(both)}")
    shared = _shared(name_a, a, name_b, b, split)
    scored_a, scored_b = ([shared[run.identity] for run in group] for group in (a, b))
    _one_training(name_a, scored_a)
    _one_training(name_b, scored_b)
    refined = by_refined((*scored_a, *scored_b))
    if refined is not None:
        scored_a, scored_b = list(refined[: len(a)]), list(refined[len(a) :])
    return difference(name_a, scored_a, name_b, scored_b)


def _one_training(name: str, scored: Sequence[Scored]) -> None:
    """Raise UserError if the runs of a side differ by more than their seed."""
    keys = telling_apart(scored)
    if not keys:
        return
    options = sorted({" ".join(f"{key}={typed(s.keys.get(key))}" for key in keys) for s in scored})
    if "=" in name:
        options = [f'"{name} {option}"' for option in options]
    more = f" or one of {len(options) - NAMED} more" if len(options) > NAMED else ""
    raise UserError(
        f"--compare {name}: its runs differ by more than their seed; choose {' or '.join(options[:NAMED])}{more}"
    )


def _shared(name_a: str, a: Sequence[Run], name_b: str, b: Sequence[Run], split: str) -> dict[str, Scored]:
    """Return every run with the evaluation of the kind that all runs have.

    Of several, it is one with the largest k; among seeds of the evaluation one with refined values, or else the first.
    """
    kinds: dict[Kind, dict[str, Scored]] = {}
    for run in (*a, *b):
        for kind, scored in by_kind(run, split).items():
            if scored.by_q["nll"] is not None:
                kinds.setdefault(kind, {})[run.identity] = scored
    shared = [kind for kind, scores in kinds.items() if len(scores) == len(a) + len(b)]
    if shared:
        largest = max(kind[:-1] for kind in shared)
        seeds = [kinds[kind] for kind in sorted(shared) if kind[:-1] == largest]
        return next((scores for scores in seeds if by_refined(scores.values())), seeds[0])
    for run in (*a, *b):
        if not any(run.identity in scores for scores in kinds.values()):
            raise UserError(f"{run.identity} has no NLL of the {split} split; iwae-eval computes it")
    first, second = (next(k for k, scores in kinds.items() if g[0].identity in scores) for g in (a, b))
    for field in ("images", "k", "weights", "precision", "evaluation_seed"):
        mine, theirs = (str(getattr(found, field))[:12] for found in (first, second))
        if mine != theirs:
            raise UserError(
                f"--compare {name_a} {name_b}: not scored on the same {field.replace('_', ' ')}: {mine} and {theirs}; "
                "evaluate both alike with iwae-eval"
            )
    raise UserError(f"--compare {name_a} {name_b}: no evaluation is shared by all of their runs; see iwae-eval")


def difference(name_a: str, a: Sequence[Scored], name_b: str, b: Sequence[Scored]) -> Paired:
    """Return A minus B; each side is one training at several seeds, all scored on the same images in the same way.

    Both sides are by the refined proposals, or both by the trained q.

    Raises:
        UserError: a file of per-image values is missing, damaged, or of another evaluation than ``result.json``.
    """
    both = (*a, *b)
    mine, theirs = (np.stack([log_px(s) for s in group]) for group in (a, b))  # (seeds, images)
    gain = mine.mean(0) - theirs.mean(0)
    n = len(gain)
    if n == 1:
        raise UserError(
            f"{a[0].score.arrays} is of one image, whose paired difference has no standard error: evaluate more with "
            "evaluation.images=null or a larger number"
        )
    spread = None
    if min(len(a), len(b)) > 1:
        spread = math.sqrt(sum(float(v.mean(1).var(ddof=1)) / len(v) for v in (mine, theirs)))
    biases = [s.numbers["bias_mc"] for s in both]
    refined = a[0].refined
    return Paired(
        a=name_a,
        b=name_b,
        seeds_a=tuple(s.run.seed for s in a),
        seeds_b=tuple(s.run.seed for s in b),
        split=a[0].split,
        k=a[0].score.k,
        images=n,
        difference=float(gain.mean()),
        stderr_images=float(gain.std(ddof=1)) / math.sqrt(n),
        stderr_seeds=spread,
        wins_a=int((gain > 0).sum()),
        wins_b=int((gain < 0).sum()),
        ties=int((gain == 0).sum()),
        bias_mc=None if None in biases else -max(map(abs, biases)),
        by=BY_REFINED if refined else BY_Q,
        gap_q_a=mean(s.by_q.get("gap_q") for s in a),
        gap_q_b=mean(s.by_q.get("gap_q") for s in b),
        unrefined="" if refined else unrefined(both),
        mixed_fits=mixed_fits(both) if refined else "",
    )


def per_image(scored: Scored, key: str) -> Float64[np.ndarray, " images"]:
    """Return values of every image that an evaluation wrote; raise an error of ``UNREADABLE`` where it did not."""
    # Opened here: numpy does not close a file that is no archive.
    with scored.score.arrays.open("rb") as opened, np.load(opened) as file:
        return np.asarray(file[scored.array_name(key)], dtype=np.float64)


def log_px(scored: Scored) -> Float64[np.ndarray, " images"]:
    """Return the per-image log p^(x) of one run, nats, in the order of the data set; raises as ``difference``."""
    path, numbers, name = scored.score.arrays, scored.numbers, scored.array_name("log_px")
    again = f"{'iwae-eval' if path.parent.parent.name == 'evaluations' else 'the command of the run'} writes it again"
    try:
        values = per_image(scored, "log_px")
    except FileNotFoundError:
        raise UserError(f"{path} is not there, and a paired comparison needs it; {again}") from None
    except UNREADABLE:
        raise UserError(f"{path} is damaged: it holds no {name}; remove it, {again}") from None
    if values.shape != (numbers["n"],) or not np.isfinite(values).all():
        raise UserError(f"{path} is damaged: {name} should hold {numbers['n']} finite values, one per image")
    # The order of summation may differ, nothing more.
    if abs(values.mean() + numbers["nll"]) > 1e-6 * max(1.0, abs(numbers["nll"])):
        raise UserError(f"{path} is of another evaluation than result.json: its mean is not -{numbers['nll']:.4f}")
    return values
