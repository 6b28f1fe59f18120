"""What the files of run and sweep folders hold, as far as it is used; further keys are allowed. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Lt
from typing_extensions import TypedDict

from iwae_cli.core.errors import UserError
from iwae_cli.record.identity import unused
from iwae_cli.record.summary import SPLITS, number_at, split_rows

typed: Any = TypedDict  # made from dicts, since kinds of numbers share keys, and some keys hold a dot
Text = dict[str, str]
Number = float | None
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Seconds = dict[str, Annotated[float, Ge(0)] | None]


def _keys(title: str, optional: Any = None, /, **required: Any) -> Any:
    return typed(title, {**required, **{key: NotRequired[hint] for key, hint in (optional or {}).items()}})


Node, Named = _keys("Node", _target_=str), _keys("Named", name=str)
EVALUATION = {"_target_": str, "k": Count, "splits": list[str], "weights": str}
TRAINING = {"backward": str, "tau": float, "kl_warmup": Whole, "clip": Annotated[float, Gt(0)] | None}
Config = _keys(
    "Config",
    {"training": _keys("Training", TRAINING | {"ema": Annotated[float, Gt(0), Lt(1)] | None})},
    **dict.fromkeys(("data", "model"), Node),
    objective=_keys("Objective", {"k": Count}, _target_=str),
    optimizer=_keys("Optimizer", {"lr": Annotated[float, Ge(0)]}, _target_=str),
    schedule=_keys("Schedule", {"passes": Count, "patience": Count | None}, _target_=str),
    validation=_keys("Validation", k=Count, every=Count),
    evaluation=_keys(
        "Evaluation",
        {"precision": str, "images": Count | None},
        **EVALUATION,
        **dict.fromkeys(("seed", "binarization_seed"), Whole),
        jackknife=bool,
    ),
    device=_keys("Device", _target_=str, precision=str),
    logger=dict[str, Any],
    seed=int,
    batch_size=Count,
    **dict.fromkeys(("data_dir", "train"), str),
    init_from=str | None,
    with_optimizer=bool,
)
"""``config.yaml``, with the keys of this version."""

SPLIT = dict[str, Any] | None
LISTS = {"active_units": list[Whole] | None, "rows": list[list[str]], **dict.fromkeys(("notes", "arrays"), list[str])}
Result = _keys(
    "Result",
    {
        **dict.fromkeys(("optimizer", "schedule"), Named),
        "estimator": _keys("Asked", {"objective": Node | None}, name=str),
        **dict.fromkeys(SPLITS, SPLIT),
        **LISTS,
        **{"figures": list[str], "reasons": Text | None, "seconds": Seconds},
        **{"seed": int, "trained": str, "init_from": str | None, "init_from_training": str | None},
        **{"draws": Whole | None, "parameters": Whole, "data_sha256": str, "sources": Text, "versions": Text},
        **dict.fromkeys(("git", "code"), _keys("Commit", commit=str, changed=bool) | None),
        "device": _keys("RanOn", {"kind": str, "name": str | None, "threads": Count}),
    },
    **dict.fromkeys(("identity", "weights"), str),
    **dict.fromkeys(("epochs", "steps"), Whole),
    **dict.fromkeys(("model", "objective"), Named),
    dataset=_keys(
        "Dataset",
        {"protocol": str, "image_shape": list[Count], "sizes": dict[str, Count]},
        name=str,
        evaluation_sha256=Text,
    ),
    evaluation=_keys("Evaluated", {"k": Count}, name=str, step=Whole, precision=str),
)
"""``result.json`` of any estimator; its numbers are those that its ``rows`` name."""

_SCORE = _keys("Score", nll=Number, k=Count)
Scores = _keys("Scores", {**dict.fromkeys(SPLITS, _SCORE | None), "seconds": Seconds})
"""What the table of a sweep shows of a result."""

NUMBERS = ("stderr_images", "stderr_mc", "bias_mc")
GAP = ("gap_q", "gap_q_stderr")
"""How much too high NLL_k by the trained q is at least, nats; missing in evaluations without refined proposals."""
_SHARES = ("ess_share_below_10", "khat_share_above_0.7", "top_weight_share_above_0.5")
_LIKELIHOOD: Any = {"k": Count, "n": Count, "bounds": dict[str, Number]}
_LIKELIHOOD |= dict.fromkeys(("nll", *NUMBERS, *_SHARES), Number)
_REFINED = _keys("Refined", **_LIKELIHOOD)
Likelihood = _keys("L", {**dict.fromkeys((*GAP, "nll_refined"), Number), "refined": _REFINED}, **_LIKELIHOOD)
"""L_k of one split; ``refined`` holds the same by refined proposals, of the first images or of all."""
_REFINED_SPLIT = _keys("RefinedSplit", **dict.fromkeys(GAP, Number), refined=_REFINED)
_K = _keys("K", k=Count)
LIMITS = {
    r"(.+_)?stderr(_.+)?": (0, math.inf),
    r".*_share_.*|acceptance": (0, 1),
    r"(.+_)?ess_(median|min)": (1 - 1e-6, math.inf),
    "bias_mc": (-math.inf, 0),
    "n": (1, math.inf),
}
"""Least and largest value of numbers of any estimator, by the last part of their key."""
ROUNDING = 1e-6
"""Relative error of numbers that are equal in exact arithmetic."""

PROCESS = {"pid": int, "host": str}
Status = Literal["running", "interrupted", "failed", "finished"]
Process = _keys("Process", status=Status, step=Whole, error=str | None, **PROCESS)
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
        # NaN and infinity, which JSON does not have, fail as texts where a number belongs; so does 1e999.
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=str, parse_float=lambda x: y if math.isfinite(y := float(x)) else x)
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
    if schema is Config:
        for group in ("data", "model", "objective", "optimizer", "schedule", "validation", "evaluation", "training"):
            target = value.get(group, {}).get("_target_")
            known = target is None or (isinstance(target, str) and _is_class(target))
            _require(
                known, path, f"{group}._target_ must be the name of a class that exists, got {json.dumps(target):.60}"
            )
    return value


@cache
def _is_class(target: str) -> bool:
    """Return whether a module of this package or of torch holds this name; of other packages, whether it is a name."""
    module, _, name = target.rpartition(".")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target) or not module.startswith(("iwae_cli", "torch")):
        return bool(module)
    top, *parts = module.split(".")
    spec = find_spec(top)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        return top != "iwae_cli"
    place = Path(spec.submodule_search_locations[0], *parts)
    file = next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
    return file is not None and re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) is not None


def check_same(config: Mapping[str, Any], result: Mapping[str, Any], path: Path) -> None:
    """Raise ``Damaged`` if ``config``, the content of ``path``, is not the configuration of the result beside it."""
    for key, recorded in (("seed", "seed"), ("train", "trained")):
        _require_same(path, key, result.get(recorded, config[key]), config[key])
    # The first run may have moved, under another name too; its weights are part of the identity.
    first, now = result.get("init_from", config["init_from"]), config["init_from"]
    if (first is None) != (now is None):
        _require_same(path, "init_from", first, now)
    if (images := result["dataset"].get("sizes", {}).get("train")) is not None:
        passes = result["steps"] // -(-images // config["batch_size"])
        fault = f"batch_size must be one of which {result['steps']:,} steps are {result['epochs']:,} passes, as in "
        _require(passes == result["epochs"], path, f"{fault}result.json, got {config['batch_size']}")
    for group in ("data", "model", "objective", "optimizer", "schedule"):
        node, target = config[group], config[group]["_target_"]
        module = target.rpartition(".")[0].replace(".", "/")
        # Results before 0.5 hold no sources.
        known = {f"{module}.py", f"{module}/__init__.py"} & {*result.get("sources", [f"{module}.py"])}
        ours = module.partition("/")[0] in ("iwae_cli", "torch")
        _require(ours or bool(known), path, f"{group}._target_ must be as result.json was made with, got {target:.60}")
        made = {} if group == "data" else {key: value for key, value in result.get(group, {}).items() if key in node}
        for key in made.keys() - unused(node) - {"name"}:
            _require_same(path, f"{group}.{key}", made[key], node[key])


def _require_same(path: Path, key: str, right: Any, wrong: Any) -> None:
    words = [f"{json.dumps(value, default=str):.60}" for value in (right, wrong)]
    _require(right == wrong, path, f"{key} must be {words[0]}, as in result.json, got {words[1]}")


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
                _require(held["k"] == k and held["n"] <= split["n"], path, of)
                _require(all(map(str.isdecimal, held["bounds"])), path, f"{part}.bounds must have numbers as keys")
                bound = held["bounds"].get(str(k), "missing")
                same = held["nll"] is None or (bound not in (None, "missing") and _close(held["nll"], -bound))
                levels = [held["bounds"][m] for m in sorted(held["bounds"], key=int)]
                rising = [value for value in levels if value is not None]
                ordered = all(a <= b + ROUNDING * max(1.0, abs(b)) for a, b in pairwise(rising))
                _require(
                    ordered and all(1 <= int(m) <= k for m in held["bounds"]),
                    path,
                    f"{part}.bounds do not rise up to k = {k}",
                )
                wanted = f"-{part}.bounds.{k}, which is {bound}"
                _require(same, path, f"{part}.nll must be {wanted}, got {held['nll']}")
                for key, value in held.items():
                    _check_limits(f"{part}.{key}", value, path, k)
            if "refined" in split:
                whole, refined = split.get("nll_refined", "missing"), split["refined"]
                same = whole == (refined["nll"] if refined["n"] == split["n"] else "missing")
                _require(same, path, f"{name}.nll_refined is {whole}, not {name}.refined.nll of all images")
                gap, numbers = split.get("gap_q"), (split["nll"], refined["nll"])
                if gap is not None and None not in numbers and refined["n"] == split["n"]:
                    right = _close(split["nll"] - gap, refined["nll"])
                    _require(right, path, f"{name}.gap_q is {gap}, not {name}.nll - {name}.refined.nll")
    for row in result.get("rows") or split_rows(result):
        _require(len(row) == 3, path, f"rows must hold label, key and format, got {row}")
        _, key, form = row
        value = number_at(result, key, _ABSENT)
        _require(value is not _ABSENT, path, f"{key} is missing, must be a number")
        _require(value is None or type(value) in (int, float), path, f"{key} must be a number, got {value!r:.60}")
        _check_limits(key, value, path)
        try:
            form.format(0 if value is None else value)
        except (ValueError, KeyError, IndexError, AttributeError):
            raise Damaged(f"{path} is damaged: rows: {form!r:.60} is no format of {key} = {value}") from None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)


def _check_limits(key: str, value: Any, path: Path, k: float = math.inf) -> None:
    """Raise ``Damaged`` if a number is outside of what its name allows; an effective sample size is at most ``k``."""
    name = re.sub(r"^.*\.(?=[^\W\d])", "", key)  # a name may end in a number: khat_share_above_0.7
    for pattern, (low, high) in LIMITS.items():
        if value is not None and re.fullmatch(pattern, name):
            _require(type(value) in (int, float), path, f"{key} must be a number, got {value!r:.60}")
            high = k * (1 + ROUNDING) if "ess_m" in name else high
            ends = [f"at least {low:.10g}"] * (low > -math.inf) + [f"at most {high:.10g}"] * (high < math.inf)
            _require(low <= value <= high, path, f"{key} must be {' and '.join(ends)}, got {value}")


def _require(right: bool, path: Path, fault: str) -> None:
    if not right:
        raise Damaged(f"{path} is damaged: {fault}")
