"""Resume an Optuna search; the only file that imports optuna."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iwae_cli.core.errors import UserError

_LOST = "lost"
"""Mark of a trial whose process died; its parameters are tried again under another number."""


def remaining(sweeper: Mapping[str, Any], folder: Path) -> dict[str, str | int]:
    """Return keys and values for what is left of ``n_trials``; trials that were cut short come first.

    They are stored in the ``folder`` of the sweep if Hydra's node of the ``sweeper`` names no other place. Where that
    cannot be opened, a UserError says so.
    """
    file = folder / "optuna.db"
    # In an address a question mark ends the path.
    address = f"file:{quote(str(file))}?uri=true" if "?" in str(file) else file
    storage = sweeper["storage"] or f"sqlite:///{address}"
    name = sweeper["study_name"] or folder.name
    # Optuna 2.10 is older than SQLAlchemy 2, and says so of itself.
    os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
    except Exception as error:
        raise UserError(f"hydra.sweeper.storage={storage} cannot be opened: {error}") from error
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.enqueue_trial(trial.params)
            study._storage.set_trial_user_attr(trial._trial_id, _LOST, True)
            study.tell(trial.number, state=TrialState.FAIL)
    done = sum(
        trial.state.is_finished() and not trial.user_attrs.get(_LOST) for trial in study.get_trials(deepcopy=False)
    )
    left = {"storage": storage, "study_name": name, "n_trials": max(0, sweeper["n_trials"] - done)}
    seed = sweeper["sampler"].get("seed")
    if seed is not None:
        # The same seed would suggest the same values as at the beginning.
        left["sampler.seed"] = seed + len(trials)
    return {f"hydra.sweeper.{key}": value for key, value in left.items()}
