"""What the files of run and sweep folders hold, as far as it is used; further keys are allowed. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from iwae_cli.core.errors import UserError
from iwae_cli.record.summary import SPLITS, number_at, split_rows


class Node(TypedDict):
    """A class of a configuration."""

    _target_: str


class Named(TypedDict):
    """What was chosen in a group."""

    name: str


class Validation(TypedDict):
    """``validation`` of a configuration."""

    k: int
    every: int


class Evaluation(TypedDict):
    """``evaluation`` of a configuration, as far as it names an evaluation."""

    _target_: str
    k: int
    splits: list[str]
    weights: str
    seed: int
    binarization_seed: int
    jackknife: bool
    precision: NotRequired[str]


class Config(TypedDict):
    """``config.yaml``, with the keys of this version."""

    data: Node
    model: Node
    objective: TypedDict("Objective", {"_target_": str, "k": NotRequired[int]})  # type: ignore[valid-type]
    optimizer: Node
    schedule: Node
    validation: Validation
    evaluation: Evaluation
    device: TypedDict("Device", {"_target_": str, "precision": str})  # type: ignore[valid-type]
    training: NotRequired[dict[str, Any]]
    logger: dict[str, Any]
    seed: int
    batch_size: int
    data_dir: str
    init_from: str | None
    with_optimizer: bool
    train: str


class Dataset(TypedDict):
    """``dataset`` of a result."""

    name: str
    evaluation_sha256: dict[str, str]
    protocol: NotRequired[str]
    image_shape: NotRequired[list[int]]


class Evaluated(TypedDict):
    """``evaluation`` of a result; ``k`` is that of L_k."""

    name: str
    step: int
    k: NotRequired[int]
    precision: str


class Result(TypedDict):
    """``result.json`` of any estimator."""

    identity: str
    dataset: Dataset
    model: Named
    objective: Named
    optimizer: NotRequired[Named]
    schedule: NotRequired[Named]
    epochs: int
    steps: int
    weights: str
    evaluation: Evaluated
    estimator: NotRequired[Named]
    test: NotRequired[dict[str, Any] | None]
    validation: NotRequired[dict[str, Any] | None]
    train: NotRequired[dict[str, Any] | None]
    active_units: NotRequired[list[int] | None]
    rows: NotRequired[list[list[str]]]
    notes: NotRequired[list[str]]
    arrays: NotRequired[list[str]]
    figures: NotRequired[list[str]]
    reasons: NotRequired[dict[str, str] | None]
    seconds: NotRequired[dict[str, float | None]]


NUMBERS = ("stderr_images", "stderr_mc", "bias_mc")
GAP = ("gap_q", "gap_q_stderr")
"""How much too high NLL_k by the trained q is at least, nats; missing in evaluations without refined proposals."""
_SHARES = ("ess_share_below_10", "khat_share_above_0.7", "top_weight_share_above_0.5")
_typed: Any = TypedDict  # keys with a dot in their name, and keys that several kinds of numbers share
_LIKELIHOOD: Any = {"k": int, "n": int, "bounds": dict[str, float | None]}
_LIKELIHOOD |= dict.fromkeys(("nll", *NUMBERS, *_SHARES), float | None)
_REFINED = _typed("_REFINED", _LIKELIHOOD)
_OF_Q = {**dict.fromkeys((*GAP, "nll_refined"), NotRequired[float | None]), "refined": NotRequired[_REFINED]}
Likelihood = _typed("Likelihood", {**_LIKELIHOOD, **_OF_Q})
"""L_k of one split; ``refined`` holds the same by refined proposals, of the first images or of all."""
_REFINED_SPLIT = _typed("_REFINED_SPLIT", {**dict.fromkeys(GAP, float | None), "refined": _REFINED})
_K = _typed("_K", {"k": int})


class Process(TypedDict):
    """``status.json``."""

    status: Literal["running", "interrupted", "failed", "finished"]
    step: int
    pid: int
    host: str
    error: str | None


class Job(TypedDict):
    """A job in ``sweep.json``."""

    identity: NotRequired[str]
    folder: NotRequired[str]
    status: NotRequired[str]
    error: NotRequired[str | None]
    overrides: NotRequired[list[str]]


class JobRecord(Job):
    """A file in ``jobs/`` of a sweep."""

    number: int
    begun: float
    pid: int
    host: str


class Sweep(TypedDict):
    """``sweep.json``."""

    jobs: list[Job]
    workers: NotRequired[int | None]


class Damaged(UserError):
    """A file of a run is not what a run writes."""


_WORDS = {"int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "text"}
_WORDS |= {"list_type": "a list", "dict_type": "keys and values", "finite_number": "finite"}
_ABSENT: Any = object()


def read_json(path: Path, schema: Any) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if it is not there.

    Raises:
        UserError: it cannot be read.
        Damaged: a key that ``schema`` names is missing or of another type; in one line with the key.
    """
    try:
        # NaN and infinity, which JSON does not have, fail as texts where a number belongs.
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: it is no JSON ({str(error)[:100]})") from None
    return check(value, schema, path)


def check(value: Any, schema: Any, path: Path, within: str = "") -> dict[str, Any]:
    """Return ``value``, the content of ``path`` under the key ``within``, as it is.

    Raises:
        Damaged: as ``read_json``.
    """
    if found := _fault(value, schema):
        place, got, wanted = found
        key = ".".join(filter(None, (within, *map(str, place)))) or "the content"
        shown = json.dumps(got, default=str)
        fault = "is missing, " if got is _ABSENT else ""
        given = "" if got is _ABSENT else f", got {shown if len(shown) < 60 else f'{shown[:60]} ...'}"
        raise Damaged(f"{path} is damaged: {key} {fault}must be {wanted}{given}")
    if schema is Result:
        _check_numbers(value, path)
    return value


def _fault(value: Any, schema: Any) -> tuple[tuple[Any, ...], Any, str] | None:
    """Return place, value and what is expected of the first key that is wrong."""
    # Half a tenth of a second, which --help does not need.
    from pydantic import ValidationError

    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        place, node = error["loc"], value
        if error["type"] != "missing":
            words = error["msg"].removeprefix("Input should be ").replace("'", "")
            return place, error["input"], _WORDS.get(error["type"], words)
        for part in place[:-1]:
            node = node[part]
        # The same with something that is of no type, so that the error says which type is expected.
        node[place[-1]] = _ABSENT
        try:
            return _fault(value, schema)
        finally:
            del node[place[-1]]
    return None


@cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _check_numbers(result: Mapping[str, Any], path: Path) -> None:
    """Raise ``Damaged`` unless the numbers of a result, which its estimator names in ``rows``, belong together."""
    if "estimator" not in result:
        k = check(result["evaluation"], _K, path, "evaluation")["k"]
        for name in (name for name in SPLITS if result.get(name)):
            split = check(result[name], Likelihood, path, name)
            hashes = result["dataset"]["evaluation_sha256"]
            _require(name in hashes, path, f"dataset.evaluation_sha256.{name} is missing, must be text")
            parts = {name: split}
            if "refined" in split or split.get("gap_q") is not None:
                parts[f"{name}.refined"] = check(split, _REFINED_SPLIT, path, name)["refined"]
            for part, held in parts.items():
                of = f"{part} is of k = {held['k']}, n = {held['n']}"
                _require(held["k"] == k and 1 <= held["n"] <= split["n"], path, of)
                _require(all(map(str.isdecimal, held["bounds"])), path, f"{part}.bounds must have numbers as keys")
            if "refined" in split:
                whole, refined = split.get("nll_refined", "missing"), split["refined"]
                same = whole == (refined["nll"] if refined["n"] == split["n"] else "missing")
                _require(same, path, f"{name}.nll_refined is {whole}, not {name}.refined.nll of all images")
    for row in result.get("rows") or split_rows(result):
        _require(len(row) == 3, path, f"rows must hold label, key and format, got {row}")
        _, key, form = row
        value = number_at(result, key, _ABSENT)
        _require(value is not _ABSENT, path, f"{key} is missing, must be a number")
        _require(value is None or type(value) in (int, float), path, f"{key} must be a number, got {value!r:.60}")
        try:
            form.format(0 if value is None else value)
        except (ValueError, KeyError, IndexError, AttributeError):
            raise Damaged(f"{path} is damaged: rows: {form!r:.60} is no format of {key} = {value}") from None


def _require(right: bool, path: Path, fault: str) -> None:
    if not right:
        raise Damaged(f"{path} is damaged: {fault}")
