"""The group ``evaluation`` for tests that construct it: ``conf/evaluation/smoke.yaml`` with changes."""

from __future__ import annotations

from typing import Any

import yaml

from iwae_cli.cli.help import conf_folder
from iwae_cli.evaluation.settings import Evaluation


def evaluation(**changed: Any) -> Evaluation:
    node = yaml.safe_load((conf_folder() / "evaluation" / "smoke.yaml").read_text())
    del node["_target_"]
    return Evaluation(**node | changed)
