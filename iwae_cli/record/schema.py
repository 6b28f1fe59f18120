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

typed: Any = TypedDict  # made from dicts, since kinds of numbers share keys, and some keys hold a dot
Text = dict[str, str]
Number = float | None


def _keys(title: str, optional: Any = None, /, **required: Any) -> Any:
    return typed(title, {**required, **{key: NotRequired[hint] for key, hint in (optional or {}).items()}})


Node, Named = _keys("Node", _target_=str), _keys("Named", name=str)
EVALUATION = {"_target_": str, "k": int, "splits": list[str], "weights": str, "seed": int, "binarization_seed": int}
Config = _keys(
    "Config",
    {"training": dict[str, Any]},
    **dict.fromkeys(("data", "model", "optimizer", "schedule"), Node),
    objective=_keys("Objective", {"k": int}, _target_=str),
    validation=_keys("Validation", k=int, every=int),
    evaluation=_keys("Evaluation", {"precision": str}, **EVALUATION, jackknife=bool),
    device=_keys("Device", _target_=str, precision=str),
    logger=dict[str, Any],
    **dict.fromkeys(("seed", "batch_size"), int),
    **dict.fromkeys(("data_dir", "train"), str),
    init_from=str | None,
    with_optimizer=bool,
)
"""``config.yaml``, with the keys of this version."""

SPLIT = dict[str, Any] | None
LISTS = {"active_units": list[int] | None, "rows": list[list[str]], **dict.fromkeys(("notes", "arrays"), list[str])}
Result = _keys(
    "Result",
    {
        **dict.fromkeys(("optimizer", "schedule", "estimator"), Named),
        **dict.fromkeys(SPLITS, SPLIT),
        **LISTS,
        **{"figures": list[str], "reasons": Text | None, "seconds": dict[str, Number]},
        **{"draws": int | None, "parameters": int, "data_sha256": str, "sources": Text, "versions": Text},
        **dict.fromkeys(("git", "code"), _keys("Commit", commit=str, changed=bool) | None),
        "device": _keys("RanOn", {"kind": str, "name": str | None, "threads": int}),
    },
    **dict.fromkeys(("identity", "weights"), str),
    **dict.fromkeys(("epochs", "steps"), int),
    **dict.fromkeys(("model", "objective"), Named),
    dataset=_keys("Dataset", {"protocol": str, "image_shape": list[int]}, name=str, evaluation_sha256=Text),
    evaluation=_keys("Evaluated", {"k": int}, name=str, step=int, precision=str),
)
"""``result.json`` of any estimator; its numbers are those that its ``rows`` name."""

_SCORE = _keys("Score", nll=Number, k=int)
Scores = _keys("Scores", {**dict.fromkeys(SPLITS, _SCORE | None), "seconds": dict[str, Number]})
"""What the table of a sweep shows of a result."""

NUMBERS = ("stderr_images", "stderr_mc", "bias_mc")
GAP = ("gap_q", "gap_q_stderr")
"""How much too high NLL_k by the trained q is at least, nats; missing in evaluations without refined proposals."""
_SHARES = ("ess_share_below_10", "khat_share_above_0.7", "top_weight_share_above_0.5")
_LIKELIHOOD: Any = {"k": int, "n": int, "bounds": dict[str, Number]}
_LIKELIHOOD |= dict.fromkeys(("nll", *NUMBERS, *_SHARES), Number)
_REFINED = _keys("Refined", **_LIKELIHOOD)
Likelihood = _keys("L", {**dict.fromkeys((*GAP, "nll_refined"), Number), "refined": _REFINED}, **_LIKELIHOOD)
"""L_k of one split; ``refined`` holds the same by refined proposals, of the first images or of all."""
_REFINED_SPLIT = _keys("RefinedSplit", **dict.fromkeys(GAP, Number), refined=_REFINED)
_K = _keys("K", k=int)

PROCESS = {"pid": int, "host": str}
Status = Literal["running", "interrupted", "failed", "finished"]
Process = _keys("Process", status=Status, step=int, error=str | None, **PROCESS)
"""``status.json``."""
JOB = {**dict.fromkeys(("identity", "folder", "status"), str), "error": str | None, "overrides": list[str]}
Sweep = _keys("Sweep", {"workers": int | None, "varied": list[str]}, jobs=list[_keys("Job", JOB)])  # type: ignore[misc]
"""``sweep.json``."""
JobRecord = _keys("JobRecord", JOB, number=int, begun=float, **PROCESS)
"""A file in ``jobs/`` of a sweep."""


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
