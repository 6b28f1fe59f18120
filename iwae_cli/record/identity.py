"""Decide whether two runs are one training, and two evaluations one evaluation."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from iwae_cli.core.errors import UserError

RECIPE = 1
"""Of refined proposals: raise it where their fit or their mixture changes, so that no older result answers."""

LONGEST_PART = 40
"""Characters of one readable part of a folder's name."""

_OWN = __name__.partition(".")[0]
_OF_TRAINING = ("data", "model", "objective", "optimizer", "schedule", "estimator")
"""Groups whose classes decide numbers."""
_PATH = re.compile(r"(.+_)?(path|file|filename|dir|directory|folder|root)s?")
"""How arguments are named that hold paths."""


def training_name(parts: Sequence[str], config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    """Return the name of a run folder: readable parts, and a hash of everything that decides the trained weights.

    The classes of ``config`` must have been imported; ``fingerprints`` are hashes of the content of files, where there
    are any: ``data`` and ``init_from``.
    """
    readable = (re.sub(r"[^\w.+]", "_", part)[:LONGEST_PART] for part in parts)
    return "-".join([*readable, _digest(training_config(config, fingerprints))])


def training_config(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return the part of a configuration that decides the trained weights and ``best.pt``.

    Left out are paths (the fingerprints stand for the content), device kind and threads, loggers and the final
    evaluation. Training precision and validation are part of it.
    """
    return {
        **{key: config[key] for key in ("model", "objective", "optimizer", "schedule", "seed", "batch_size")},
        "data": {key: value for key, value in config["data"].items() if key not in path_keys(config["data"])},
        "precision": config["device"]["precision"],
        "validation": {key: config["validation"][key] for key in ("k", "every")},
        "fingerprints": dict(fingerprints),
        **{key: config[key] for key in ("with_optimizer", "train")},
        **_training(config),
    }


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node ``training`` where it differs from the runs that had no such choice."""
    node = {key: value for key, value in config.get("training", {}).items() if key != "_target_"}
    if node.get("backward", "all") == "all":
        node.pop("tau", None)
    spelled = one_spelling({"_target_": "iwae_cli.training.settings.Training", **node})
    return {"training": spelled} if len(spelled) > 1 else {}


def recorded_as(config: Mapping[str, Any]) -> str:
    """Return a hash of a training in which the paths of its files stand for their content.

    It compares configurations whose files are gone, or that were hashed by another version.
    """
    data = config["data"]
    paths = [data[key] for key in path_keys(data) if key != "data_dir" and data[key] is not None]
    named = {"data": paths or None, "init_from": config["init_from"]}
    return _digest(training_config(config, {key: str(path) for key, path in named.items() if path is not None}))


def path_keys(node: Mapping[str, Any]) -> list[str]:
    """Return the keys of the node of a data set that name files or folders.

    They are ``data_dir`` and ``path``, arguments annotated as ``Path``, and for a class from outside this package all
    that are named as paths are.
    """
    cls, outside = _class(node), not str(node.get("_target_")).startswith(f"{_OWN}.")
    annotated = (
        []
        if cls is None
        else [
            name
            for name, p in inspect.signature(cls).parameters.items()
            if re.search(r"\bPath(Like)?\b", str(p.annotation))
        ]
    )
    return [
        key
        for key in node
        if key in ("data_dir", "path") or key in annotated or (outside and _PATH.fullmatch(key) is not None)
    ]


def paths_fingerprint(node: Mapping[str, Any], shared: str) -> str | None:
    """Return a hash of the content of all files and folders that the node of a data set names; None if it names none.

    Not of the folder ``shared``, which holds many data sets, nor of ``data_dir`` of a class of this package, which
    checks published hashes.

    Raises:
        UserError: one does not exist or cannot be read.
    """
    own = str(node.get("_target_")).startswith(f"{_OWN}.")
    contents = []
    for key in path_keys(node):
        for value in node[key] if isinstance(node[key], list) else [node[key]]:
            if isinstance(value, str) and value not in ("", shared) and not (own and key == "data_dir"):
                contents.append(_content(Path(value).expanduser(), f"data.{key}"))
    return None if not contents else contents[0] if len(contents) == 1 else _digest(contents)


def _content(path: Path, key: str) -> str:
    try:
        if not path.is_dir():
            return _hashed(path, path.stat().st_size, path.stat().st_mtime_ns)
        inner = [(file, file.stat()) for file in sorted(path.rglob("[!.]*")) if file.is_file()]
        return _digest([(str(f.relative_to(path)), _hashed(f, at.st_size, at.st_mtime_ns)) for f, at in inner])
    except OSError as error:
        raise UserError(f"{key} names {path}, which cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=100_000)
def _hashed(path: Path, size: int, changed: int) -> str:
    # Cached while it is unchanged, for the jobs of a sweep.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of every file with source code from outside this package that decides numbers: path -> hash.

    These are the modules of the classes in ``config`` that have been imported, and what they import from their own
    package or folder. The paths are relative to the folder that Python finds them in.
    """
    found: dict[str, str] = {}
    targets = [target for group in _OF_TRAINING for target in _targets(config.get(group))]
    modules = [str(target).rpartition(".")[0] for target in targets]
    for first in modules:
        file = getattr(sys.modules.get(first), "__file__", None)
        if first.partition(".")[0] in (_OWN, "torch") or file is None or not file.endswith(".py"):
            continue
        package = file.endswith("__init__.py")
        root, top = Path(file).parents[first.count(".") + package], first.partition(".")[0]
        todo = [first]
        while todo:
            name = todo.pop()
            for path in (root / f"{name.replace('.', '/')}.py", root / name.replace(".", "/") / "__init__.py"):
                # Among installed packages only the class's own one is looked into.
                known = str(path.relative_to(root))
                if (
                    known not in found
                    and (name.split(".")[0] == top or "-packages" not in root.name)
                    and path.is_file()
                ):
                    source = path.read_bytes()
                    found[known] = hashlib.sha256(source).hexdigest()[:16]
                    todo += _imported(source, name if path.stem == "__init__" else name.rpartition(".")[0])
    return found


def _targets(node: Any) -> Iterator[Any]:
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield node["_target_"]
    for value in inner:
        yield from _targets(value)


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Return the modules, or what may be modules, that a source file of ``package`` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def evaluation_name(config: Mapping[str, Any]) -> str:
    """Return the name of an evaluation within its run: readable parts, and a hash of all that decides its numbers."""
    evaluation = config["evaluation"]
    first = {"images": evaluation["images"]} if evaluation.get("images") else {}  # missing in older records
    if "estimator" in config:
        parts = {key: evaluation[key] for key in ("weights", "seed", "binarization_seed")}
        parts |= {"splits": sorted(evaluation["splits"]), "precision": config["device"]["precision"], **first}
        return f"{estimator_name(config)}-{parts['weights']}-{_digest(parts | {'estimator': config['estimator']})}"
    parts = {key: evaluation[key] for key in ("k", "weights", "seed", "binarization_seed", "jackknife")}
    parts |= {"splits": sorted(evaluation["splits"]), "precision": evaluation_precision(config), **first}
    if evaluation.get("refine", 0):  # missing in older records
        parts |= {"refine": evaluation["refine"], "recipe": RECIPE}
    of = f"first{first['images']}+" if first else ""
    return f"k{parts['k']}-{of}{'+'.join(parts['splits'])}-{parts['weights']}-{_digest(parts)}"


def evaluation_precision(config: Mapping[str, Any]) -> str:
    """Return the precision of the matrix products of L_k: that of the device, or bf16."""
    asked = config["evaluation"].get("precision", "float32")  # missing in older records
    return str(config["device"]["precision"] if asked == "float32" else asked)


def estimator_name(config: Mapping[str, Any]) -> str:
    """Return the name of an estimator other than L_k, from its class: ``GradientSNR`` is ``gradient_snr``."""
    return words(str(config["estimator"]["_target_"]).rpartition(".")[2])


def words(name: str) -> str:
    """Return the name of a class in lower case with underscores: ``GaussianMLP`` is ``gaussian_mlp``."""
    return re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(one_spelling(value), sort_keys=True).encode()).hexdigest()[:8]


def one_spelling(value: Any) -> Any:
    """Return ``value`` in its one spelling.

    Whole floats are integers. A class of this package is known by its name alone, so that code may move, and a key
    that holds the default of its class is left out, so that a class may gain a key. The default itself must then never
    change.
    """
    if isinstance(value, list | tuple):
        return [one_spelling(inner) for inner in value]
    if not isinstance(value, Mapping):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    node = {key: one_spelling(inner) for key, inner in value.items()}
    cls = _class(node)
    if cls is None:
        return node
    own = cls.__module__.partition(".")[0] == _OWN
    node["_target_"] = cls.__name__ if own else f"{cls.__module__}.{cls.__name__}"
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in node and _text(node[key]) == _text(one_spelling(parameter.default)):
            del node[key]
    return node


def _class(node: Mapping[str, Any]) -> type | None:
    """Return the class that a node names, if its module has been imported."""
    module, _, name = str(node.get("_target_")).rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if inspect.isclass(cls) else None


def _text(value: Any) -> str:
    # As JSON, since Python holds 1 and True to be equal; a default may be any object.
    return json.dumps(value, sort_keys=True, default=repr)
