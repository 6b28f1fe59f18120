"""Every yaml of ``conf/data`` holds exactly the keyword arguments of one class."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from iwae_cli.data.base import Dataset

FILES = sorted((Path(__file__).resolve().parents[2] / "conf" / "data").glob("*.yaml"))
WITHOUT_DATA_DIR = {"digits", "linear_gaussian", "file", "folder"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_the_arguments_of_a_data_set_of_that_name(file: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(values, dict)
    module, _, name = values.pop("_target_").rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, Dataset) and kind.name == file.stem
    parameters = {} if kind.__init__ is object.__init__ else dict(inspect.signature(kind).parameters)
    assert set(values) == set(parameters)
    for key, parameter in parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        if key == "data_dir":
            assert values[key] == "${data_dir}"
        else:
            assert values[key] == parameter.default
    assert ("data_dir" in values) == (file.stem not in WITHOUT_DATA_DIR)
