"""evaluation.refine from the command line: what a run records, and what is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import TINY, arrays, finished, read_json, run, snapshot

from iwae_cli.cli.help import conf_folder
from iwae_cli.evaluation import likelihood

DISCRETE = ("model=discrete", "model.latent_sizes=[3]", "objective=vimco", "objective.k=5")


def asked(refine: str, *overrides: str) -> tuple[str, ...]:
    kept = [item for item in TINY if not item.startswith(("model.", "evaluation.refine", "evaluation.splits"))]
    model = () if DISCRETE[0] in overrides else TINY[:2]
    few = "evaluation.images=50"
    return (*model, *kept, few, "evaluation.splits=[test,validation]", f"evaluation.refine={refine}", *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("refine"), *asked("30"))


def test_the_gap_is_that_of_the_kept_values_of_each_image(trained: Path) -> None:
    result, kept = read_json(trained / "result.json"), arrays(trained / "log_likelihood.npz")
    for split, prefix in (("test", ""), ("validation", "validation_")):
        numbers = result[split]
        by_q, refined = kept[f"{prefix}log_px"], kept[f"{prefix}refined_log_px"]
        assert len(refined) == numbers["refined"]["n"] == 30 < len(by_q) == numbers["n"]
        gap = refined - by_q[:30]
        assert numbers["gap_q"] == pytest.approx(gap.mean(), abs=1e-12)
        assert numbers["gap_q_stderr"] == pytest.approx(gap.std(ddof=1) / np.sqrt(30), abs=1e-12)
        assert numbers["gap_q"] > 0.02
        assert numbers["refined"]["nll"] == pytest.approx(-refined.mean(), abs=1e-12)
        assert np.median(kept[f"{prefix}refined_ess"]) > 2 * np.median(kept[f"{prefix}ess"])
        assert "nll_refined" not in numbers


def test_with_all_the_whole_split_has_its_refined_number_and_nll_stays_what_it_was(trained: Path) -> None:
    before = read_json(trained / "result.json")
    out = trained.parent
    code, printed, err = run(*asked("all"), "evaluation.splits=[test]", f"output_dir={out}")
    assert code == 0, err
    assert "nothing was trained now" in printed and "NLL_50 by refined proposals, nats" in printed
    after, kept = read_json(trained / "result.json"), arrays(trained / "log_likelihood.npz")
    assert after["test"]["nll"] == before["test"]["nll"]
    assert after["test"]["nll_refined"] == pytest.approx(-kept["refined_log_px"].mean(), abs=1e-12)
    assert len(kept["refined_log_px"]) == len(kept["log_px"]) == len(kept["refined_khat"])
    # The first images, in a smaller number of them, had the same values.
    assert after["test"]["refined"]["stderr_images"] == pytest.approx(
        kept["refined_log_px"].std(ddof=1) / np.sqrt(len(kept["refined_log_px"])), abs=1e-12
    )
    code, _, err = run(*asked("30"), f"output_dir={out}")
    assert code == 0, err
    assert read_json(trained / "result.json")["test"] == before["test"]


def test_discrete_latents_have_a_reason_instead_of_a_gap(tmp_path: Path) -> None:
    folder = finished(tmp_path, *asked("200", *DISCRETE))
    result = read_json(folder / "result.json")
    assert result["test"]["gap_q"] is None and "refined" not in result["test"]
    assert "real latents" in result["reasons"]["test.gap_q"]
    assert result["test"]["nll"] is not None


def test_a_model_that_a_gaussian_does_not_serve_keeps_what_q_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a class from outside whose latents are positive; after a training no number may be lost by that."""

    def refused(*arguments: object) -> None:
        raise ValueError("Expected value argument within the support")

    monkeypatch.setattr(likelihood, "refine", refused)
    result = read_json(finished(tmp_path, *asked("30")) / "result.json")
    assert result["test"]["gap_q"] is None and "refined" not in result["test"] and result["test"]["nll"] > 0
    assert "ValueError: Expected value argument within the support" in result["reasons"]["test.gap_q"]


def test_the_default_serves_data_with_fewer_images() -> None:
    """tests/cli/test_configs.py runs it on twenty images."""
    default = yaml.safe_load((conf_folder() / "evaluation" / "default.yaml").read_text())
    assert default["refine"] == likelihood.DEFAULT_REFINED


@pytest.mark.usefixtures("coarse")
def test_an_interruption_while_refining_harms_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished run stays as it was; the same command then evaluates it."""
    before = snapshot(trained)
    fitted = likelihood.refine

    def interrupting(*arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return fitted(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "refine", interrupting)
        code, _, err = run(*asked("40"), f"output_dir={trained.parent}")
    assert code == 143 and "interrupted by signal 15" in err
    assert all(list(folder.iterdir()) for folder in (trained / "evaluations").iterdir())
    changed = {name for name, (_, content) in snapshot(trained).items() if before.get(name, (0, b""))[1] != content}
    assert changed <= {"train.log"}
    code, _, err = run(*asked("40"), f"output_dir={trained.parent}")
    assert code == 0, err
    assert read_json(trained / "result.json")["test"]["refined"]["n"] == 40
