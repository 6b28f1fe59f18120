"""Every yaml of ``conf/data`` holds exactly the keyword arguments of one class, with its defaults."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

from iwae_cli.data.base import Dataset

FILES = sorted((Path(__file__).resolve().parents[2] / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_the_arguments_of_a_data_set_of_that_name(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    module, _, name = values.pop("_target_").rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, Dataset) and kind.name == file.stem
    parameters = {} if kind.__init__ is object.__init__ else inspect.signature(kind).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    assert values == defaults | ({"data_dir": "${data_dir}"} if "data_dir" in defaults else {})
