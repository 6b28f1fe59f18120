"""Decide whether two runs are one training, and two evaluations one evaluation."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iwae_cli.core.errors import UserError

VAMP_START = 1
"""Of the images of a VampPrior: raise it where they begin otherwise, so that no older training answers."""
RECIPE = 2
"""Of refined proposals: raise it where their fit or their mixture changes, so that no older result answers."""

LONGEST_PART = 60
"""Characters of one readable part of a folder's name."""

_USED_WITH = (
    ("posterior_size", "posterior", ("diagonal", "full"), ("coupling", "mixture")),
    ("prior_components", "prior", ("standard",), ("mixture", "vamp")),
    ("beta_1", "schedule", ("linear", "moments"), ("log",)),
    ("beta_1", "partitions", (1,), ("2 or more",)),
    ("schedule", "partitions", (1,), ("2 or more",)),
    ("tau", "backward", ("all",), ("roulette",)),
)
"""A key, a choice, its values that leave the key without effect, and those that do not."""
_OWN = __name__.partition(".")[0]
_OF_NUMBERS = ("data", "model", "objective", "optimizer", "schedule", "estimator")
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
        **{key: config[key] for key in ("optimizer", "schedule", "seed", "batch_size")},
        **{
            group: {key: value for key, value in config[group].items() if key not in unused(config[group])}
            for group in ("objective", "model")
        },
        "data": {key: value for key, value in config["data"].items() if key not in path_keys(config["data"])},
        "precision": config["device"]["precision"],
        "validation": {key: config["validation"][key] for key in ("k", "every")},
        "fingerprints": dict(fingerprints),
        **{key: config[key] for key in ("with_optimizer", "train")},
        **_training(config),
        **({"vamp_start": VAMP_START} if config["model"].get("prior") == "vamp" else {}),
    }


def unused(node: Mapping[str, Any], classes: bool = False) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the keys of a node without effect: the choice that uses each, and values with which.

    With ``classes`` also those that a class in place of the choice does not use; the hash of a training holds these.
    """
    return {
        key: (choice, using)
        for key, choice, leaving, using in _USED_WITH
        if is_own(node) and (node.get(choice) in leaving or (classes and isinstance(node.get(choice), Mapping)))
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
    paths = {
        key: path for key, path in config["data"].items() if key in path_keys(config["data"]) and key != "data_dir"
    }
    paths["init_from"] = config["init_from"]
    return _digest(training_config(config, {key: str(path) for key, path in paths.items() if path is not None}))


def path_keys(node: Mapping[str, Any]) -> list[str]:
    """Return the keys of a data set's node that name files or folders.

    They are ``data_dir``, ``path``, arguments annotated as ``Path``, and what a class from outside this package names
    as paths are named.
    """
    cls, outside = _class(node), not is_own(node)
    parameters = {} if cls is None else inspect.signature(cls).parameters
    annotated = [key for key, p in parameters.items() if re.search(r"\bPath(Like)?\b", str(p.annotation))]
    return [k for k in node if k in ("data_dir", "path", *annotated) or (outside and _PATH.fullmatch(str(k)))]


def paths_fingerprint(node: Mapping[str, Any], shared: str) -> str | None:
    """Return a hash of the content of all files and folders that a data set's node names; None if it names none.

    Left out are the folder ``shared`` of many data sets, and ``data_dir`` of a class of this package, which checks
    published hashes.

    Raises:
        UserError: one cannot be read.
    """
    keys = [key for key in path_keys(node) if key != "data_dir" or not is_own(node)]
    named = [(key, value) for key in keys for value in (node[key] if isinstance(node[key], list) else [node[key]])]
    digest, hashed = hashlib.sha256(), False
    for key, value in named:
        if isinstance(value, str) and value not in ("", shared):
            path, hashed = Path(value).expanduser(), True
            try:
                inner = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
                for file in inner:
                    if any(part.startswith(".") for part in file.relative_to(path).parts):
                        continue  # hidden, or in a hidden folder
                    with file.open("rb") as opened:
                        content = hashlib.file_digest(opened, "sha256").hexdigest()
                    digest.update(f"{file.relative_to(path)} {content} ".encode())
            except OSError as error:
                raise UserError(f"data.{key} names {path}, which cannot be read: {error.strerror or error}") from None
    return digest.hexdigest() if hashed else None


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of every source file from outside this package that decides numbers, by its path in ``sys.path``.

    These are the modules of the classes that ``config`` names, as far as they have been imported, and what they import
    from their own package or folder.
    """
    found: dict[str, str] = {}
    for first in [target.rpartition(".")[0] for target in _targets([config.get(group) for group in _OF_NUMBERS])]:
        file, top = str(getattr(sys.modules.get(first), "__file__", None)), first.partition(".")[0]
        if is_ours(first) or not file.endswith(".py"):
            continue
        root, todo = Path(file).absolute().parents[first.count(".") + file.endswith("__init__.py")], [first]
        while todo:
            name = todo.pop()
            for path in (root / f"{name.replace('.', '/')}.py", root / name.replace(".", "/") / "__init__.py"):
                known = str(path.relative_to(root))
                # Beside an installed package lie all others.
                near = name.partition(".")[0] == top or "-packages" not in root.name
                if known in found or not near or not path.is_file():
                    continue
                found[known] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                for node in ast.walk(ast.parse(path.read_bytes())):
                    if isinstance(node, ast.Import):
                        todo += [alias.name for alias in node.names]
                    elif isinstance(node, ast.ImportFrom):
                        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                        todo += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return which of the ``sources`` recorded differ now, such as "shapes.py has changed"; empty if none."""
    names = [name for name, found in now.items() if recorded.get(name, found) != found]
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} changed" if names else ""


def _targets(node: Any) -> list[str]:
    """Return the names of the classes in a node and below."""
    inner = [*node.values()] if isinstance(node, Mapping) else node if isinstance(node, list) else []
    own = [str(node["_target_"])] if isinstance(node, Mapping) and "_target_" in node else []
    return own + [target for value in inner for target in _targets(value)]


def is_ours(module: str) -> bool:
    """Return whether a module is of this package or of torch, whose classes are known to be right and pure."""
    return module.partition(".")[0] in (_OWN, "torch")


def is_own(node: Mapping[str, Any]) -> bool:
    """Return whether the class of a node is one of this package."""
    return str(node.get("_target_")).startswith(f"{_OWN}.")


def evaluation_name(config: Mapping[str, Any], recipe: int = RECIPE) -> str:
    """Return the name of an evaluation within its run: readable parts, and a hash of all that decides its numbers."""
    evaluation = config["evaluation"]
    first = {"images": evaluation["images"]} if evaluation.get("images") else {}  # missing in older records
    if "estimator" in config:
        parts = {key: evaluation[key] for key in ("weights", "seed", "binarization_seed")}
        parts |= {"splits": sorted(evaluation["splits"]), "precision": config["device"]["precision"], **first}
        if of_class := getattr(_class(config["estimator"]), "recipe", 0):
            parts |= {"recipe": of_class}
        return f"{estimator_name(config)}-{parts['weights']}-{_digest(parts | {'estimator': config['estimator']})}"
    parts = {key: evaluation[key] for key in ("k", "weights", "seed", "binarization_seed", "jackknife")}
    parts |= {"splits": sorted(evaluation["splits"]), "precision": evaluation_precision(config), **first}
    if evaluation.get("refine", 0):  # missing in older records
        parts |= {"refine": evaluation["refine"], "recipe": recipe}
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
