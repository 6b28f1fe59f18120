"""Which runs may be compared, and the configuration keys that tell them apart."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from iwae_cli.config.guesses import nearest
from iwae_cli.core import files
from iwae_cli.core.errors import UserError
from iwae_cli.record.identity import RECIPE, evaluation_precision
from iwae_cli.record.summary import DISCRETE_UNITS, reliability_warning
from iwae_cli.report.reader import NOT_RECORDED, SOURCES, LeftOut, Run, Score

MISSING = "\N{EN DASH}"
NAMED = 4  # runs or choices that a message names
Label = tuple[str, ...]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if a value is missing."""
    there = list(values)
    known = [value for value in there if value is not None]
    return statistics.fmean(known) if len(known) == len(there) else None


@dataclass(frozen=True)
class Scored:
    """A run with the evaluation that its table shows: by the trained q, or by the refined proposals."""

    run: Run
    score: Score
    split: str
    refined: bool = False

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Keys of the run, with those that the evaluation was made with."""
        return {**self.run.keys, **self.score.keys}

    @property
    def kind(self) -> Kind:
        """What its table shares."""
        score = self.score
        return Kind(
            score.k, score.weights, score.precision, score.sha256[self.split], str(score.keys["evaluation.seed"])
        )

    @property
    def by_q(self) -> Mapping[str, Any]:
        """Numbers of the split, as in ``result.json``."""
        return self.score.splits[self.split]

    @property
    def numbers(self) -> Mapping[str, Any]:
        """Those of ``by_q``, or of its ``refined``, which has ``n``, ``k``, ``nll`` and its errors too."""
        found: Mapping[str, Any] = self.by_q["refined"] if self.refined else self.by_q
        return found

    def array_name(self, key: str) -> str:
        """Return the name of values of every image in the file of the evaluation."""
        return ("" if self.split == "test" else f"{self.split}_") + ("refined_" if self.refined else "") + key

    @property
    def warning(self) -> str | None:
        """One sentence that says by how much the numbers are not reliable."""
        return reliability_warning({self.split: self.numbers}, "refined proposals" if self.refined else "q")


class Kind(NamedTuple):
    """What two evaluations must share to be comparable; ``images`` is the hash of the split.

    Estimates under two seeds are of one number, but no report should depend on which of the two it takes for a run.
    """

    k: int
    weights: str
    precision: str
    images: str
    evaluation_seed: str


def by_kind(run: Run, split: str) -> dict[Kind, Scored]:
    """Return the evaluations of a split by kind; of several of one kind, the one with the most refined images."""
    found: dict[Kind, Scored] = {}
    for score in run.scores:
        if split in score.splits and split in score.sha256:
            scored = Scored(run, score, split)
            best = found.setdefault(scored.kind, scored)
            if _worth(scored) > _worth(best):
                found[scored.kind] = scored
    return found


def _worth(scored: Scored) -> tuple[bool, int, int]:
    return scored.by_q["nll"] is not None, _images_refined(scored.by_q), scored.score.recipe


def _images_refined(numbers: Mapping[str, Any]) -> int:
    refined = numbers.get("refined")
    return refined["n"] if refined and refined["nll"] is not None else 0


def by_refined(scored: Iterable[Scored]) -> tuple[Scored, ...] | None:
    """Return the same runs by the refined proposals; None unless all have them for the whole split."""
    runs = tuple(scored)
    whole = all(_images_refined(s.by_q) == s.by_q["n"] for s in runs)
    return tuple(replace(s, refined=True) for s in runs) if whole else None


def mixed_fits(scored: Iterable[Scored]) -> str:
    """Return what to type where refined proposals were fitted by different recipes; empty where they were not."""
    old = [s for s in scored if _images_refined(s.by_q) and s.score.recipe < RECIPE]
    if not old or len({s.score.recipe for s in scored if _images_refined(s.by_q)}) == 1:
        return ""
    names = first([shlex.quote(files.shown(s.run.path)) for s in old])
    return f"refined proposals of {names} are those of an earlier version, which fits worse: {_refining(old[0])}"


def unrefined(scored: Iterable[Scored]) -> str:
    """Return which runs lack refined values of the whole split, and why or what to type; empty if none does."""
    lacking: dict[str, list[str]] = {}
    for s in scored:
        if by_refined([s]) is None:
            reasons = s.score.reasons
            discrete = reasons.get("active_units") == DISCRETE_UNITS and "refined proposals are for real latents"
            way = reasons.get(f"{s.split}.gap_q") or discrete or _refining(s)
            lacking.setdefault(way, []).append(shlex.quote(files.shown(s.run.path)))
    return "; ".join(f"no refined values of {first(names)}: {way}" for way, names in lacking.items())


def first(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _refining(s: Scored) -> str:
    """Return the command that makes the same evaluation with refined values; RUN stands for the folder."""
    asked, config, precision = dict(s.score.keys), s.run.config, s.score.precision
    if precision == evaluation_precision(config):
        del asked["evaluation.precision"]
    elif precision != "bf16":
        asked |= {"evaluation.precision": "float32", "device.precision": precision}
    # What an older configuration lacks has the default, which changes nothing.
    default = {key: s.run.keys.get(key, None if value else value) for key, value in asked.items()}
    changed = {key: value for key, value in asked.items() if value not in (NOT_RECORDED, default[key])}
    words = [f"{key}={typed(value)}" for key, value in changed.items() if key != "evaluation.refine"]
    return " ".join(["iwae-eval RUN evaluation.refine=all", *words])


def comparable(runs: Sequence[Run], split: str) -> tuple[list[Scored], list[LeftOut]]:
    """Return every run once for each kind of evaluation of the split that it has; and the runs that have none."""
    kept: dict[str, list[Scored]] = {}
    reasons: dict[str, LeftOut] = {}
    for run in runs:
        there = ", ".join(run.scores[0].splits) or "none"
        repair = f"iwae-eval {shlex.quote(files.shown(run.path))} evaluation.splits=[{split}]"
        why = LeftOut(run.path, "not evaluated", f"its {split} split was not evaluated (but {there}); {repair}")
        for kind, scored in by_kind(run, split).items():
            if scored.by_q["nll"] is None:
                reasons_of = scored.score.reasons
                reason = reasons_of.get(f"{split}.nll") or reasons_of.get("nll") or "result.json says null"
                why = LeftOut(run.path, "no number", f"NLL_{kind.k} of {split}: {reason}")
                continue
            # Averaged over seeds, a training that is there twice would count as two seeds with an error of zero.
            settings = {name: value for name, value in _training(scored).items() if not name.startswith(SOURCES)}
            alike = kept.setdefault(json.dumps([kind, run.seed, settings], sort_keys=True, default=str), [])
            counted = next((other for other in alike if not _varying([other, scored])), None)
            if counted is None:
                alike.append(scored)
            else:
                why = LeftOut(run.path, "repeated", f"same training and seed as {counted.run.path.name}")
        reasons[run.identity] = why
    found = [scored for alike in kept.values() for scored in alike]
    for scored in found:
        reasons.pop(scored.run.identity, None)
    return found, list(reasons.values())


def narrowed(runs: Sequence[Run], wanted: Mapping[str, str]) -> list[Run]:
    """Return the runs with these values, each with the evaluations that have them."""
    found = [(run, tuple(s for s in run.scores if agrees({**run.keys, **s.keys}, wanted))) for run in runs]
    return [replace(run, scores=scores) for run, scores in found if scores]


def shown(value: Any) -> str:
    """Return the value of a key as it is printed."""
    if value is None:
        return MISSING
    return str(value).lower() if isinstance(value, bool) else str(value)


def typed(value: Any) -> str:
    """Return the value of a key as it is typed: null, true, [100,50], [test]."""
    text = "null" if value is None else shown(value)
    return re.sub(r'[\s"]', "", text) if text.startswith("[") else text


def choices(text: str) -> list[str]:
    """Return the parts between commas that are in no brackets: ``[50],[100,50]`` are two."""
    found, depth = [""], 0
    for mark in text:
        depth += (mark == "[") - (mark == "]")
        if mark == "," and not depth:
            found.append("")
        else:
            found[-1] += mark
    return found


def number(text: str) -> float | str:
    """Return ``text`` as a number if it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def agrees(keys: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Return whether the keys of a run have these values; several choices of one are separated by commas.

    Numbers are compared as numbers, lists without spaces and quotes.
    """

    def same(value: str, given: str) -> bool:
        given = given.lower() if given.lower() in ("null", "true", "false") else given
        plain = re.sub(r"[\s'\"]", "", given)
        return plain in (value, re.sub(r"\s", "", value)) or number(value) == number(plain)

    return all(
        any(same(typed(keys.get(key)), choice) for choice in (value, *choices(value))) for key, value in wanted.items()
    )


def known_key(key: str, runs: Iterable[Run]) -> str:
    """Return ``key`` if any run or evaluation has it.

    Raises:
        UserError: none has it.
    """
    keys = dict.fromkeys(name for run in runs for keys in (run.keys, *(s.keys for s in run.scores)) for name in keys)
    if key not in keys:
        hint = nearest(key, keys) or "; such as model, objective.k, optimizer.lr"
        raise UserError(f"no run has the key {key}{hint}")
    return key


def label(scored: Scored, keys: Sequence[str]) -> Label:
    """Return the values of ``keys`` as printed."""
    return tuple(shown(scored.keys.get(key)) for key in keys)


def telling_apart(scored: Sequence[Scored], keys: Label = ()) -> Label:
    """Return keys to add to ``keys`` such that runs which agree in all of them differ by their seed only."""
    added: Label = ()
    while True:
        cells: dict[Label, list[Scored]] = {}
        for s in scored:
            cells.setdefault(label(s, (*keys, *added)), []).append(s)
        differing = next((found for group in cells.values() if (found := _varying(group))), None)
        if differing is None:
            return added
        added += (min(differing, key=_rank),)


def _rank(key: str) -> tuple[bool, ...]:
    """Sort a name before the sizes behind it, and k before a constant of the optimizer."""
    return ("." in key, not key.startswith("objective"), not key.startswith("model"), key.endswith("._target_"))


def _varying(scored: Sequence[Scored]) -> list[str]:
    """Return the keys in which the trainings differ, other than the seed."""
    # A key that decides nothing for one run (training.tau without a roulette) may decide for another.
    keys = dict.fromkeys(key for s in scored for key in _training(s))
    values = {key: {shown(s.run.keys.get(key)) for s in scored} for key in keys}
    # A file that a run has not recorded, as older ones, is no difference.
    found = [key for key in keys if len(values[key] - ({MISSING} if key.startswith(SOURCES) else set())) > 1]
    # Two names of the same settings are no difference: schedule=smoke is schedule=constant with three passes.
    same = [group for group in ("optimizer", "schedule") if not any(key.startswith(f"{group}.") for key in found)]
    return [key for key in found if key not in same]


def _training(scored: Scored) -> dict[str, Any]:
    """Return what decides the evaluated weights, without the seed; validation decides only the best ones."""
    decides = {"data": scored.run.dataset, **scored.run.training}
    if scored.score.weights == "last":
        decides = {key: value for key, value in decides.items() if not key.startswith("validation.")}
    return decides
