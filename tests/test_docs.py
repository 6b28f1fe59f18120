"""README and docs: commands compose, code runs, choices and messages match the program, links and tests exist."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from regenerate_docs import NOTEBOOK, executed, groups
from small_runs import TINY, finished, read_json, run_folders

from iwae_cli.cli.compose import plan
from iwae_cli.cli.help import choices, conf_folder
from iwae_cli.config.build import trust

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES["README.md"] = README
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
CHOICES = choices([conf_folder()])
CONFIG = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
SMALL = (*TINY[:2], "evaluation.k=50", "evaluation.refine=0", "logger=disabled")
PLUGINS = {"ray": "ray", "submitit_local": "submitit", "sweeps/search": "optuna"}
"""Choices that need an extra -> the module that the extra brings."""


def blocks(page: str, language: str = "") -> list[str]:
    """Return the code blocks of a page in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [text for fence, text in found if fence == language]


def commands(page: str, program: str) -> list[list[str]]:
    """Return the arguments of every command of `program`: in code blocks and inline, without refused ones."""
    lines = re.findall(rf"`({program} [^`\n]+=[^`\n]+)`", PAGES[page])
    for block in blocks(page):
        lines += re.findall(
            rf"^(?:\$ |(?:\w+=\S+ )+)?({program}(?= |$).*)\n(?!{program}: )", block.replace("\\\n", ""), re.M
        )
    return [shlex.split(line.replace("<run>", "run"), comments=True)[1:] for line in lines if "..." not in line]


def named_blocks(page: str) -> dict[str, str]:
    """Return the code blocks that begin with the name of their file."""
    texts = [text for language in ("python", "yaml") for text in blocks(page, language)]
    return {found[1]: text for text in texts if (found := re.match(r"# (\S+\.(?:py|yaml))\n", text))}


def write_files(page: str, folder: Path) -> None:
    for name, text in named_blocks(page).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def call(program: str, arguments: list[str]) -> tuple[int, str]:
    """Return exit code and error output of a command, run in this process."""
    error = io.StringIO()
    module, _, function = SCRIPTS[program].partition(":")
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        code = getattr(import_module(module), function)(arguments)
    return code, error.getvalue()


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tests import `mine` in the current folder; the commands of the pages need no more than --config-dir."""
    monkeypatch.syspath_prepend(tmp_path)
    yield
    trust(None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("outputs"), "experiment=smoke", "schedule.passes=1", *SMALL)


def test_settings_in_pairs(tmp_path: Path) -> None:
    write_files("docs/sweeps.md", tmp_path)
    (arguments,) = [words for words in commands("docs/sweeps.md", "iwae-train") if "--config-dir" in words]
    one_seed = [word.partition(",")[0] if word.startswith("seed=") else word for word in arguments]
    code, error = call("iwae-train", [*one_seed, "schedule.passes=1", *SMALL])
    assert code == 0, error
    results = [read_json(folder / "result.json") for folder in run_folders(tmp_path / "outputs")]
    found = [tuple(result["objective"].get(key) for key in ("name", "m", "k")) for result in results]
    assert sorted(found, key=str) == [("iwae_10", None, 10), ("miwae_2x5", 2, 5)]


TRAIN = {shlex.join(arguments): (page, arguments) for page in PAGES for arguments in commands(page, "iwae-train")}


@pytest.mark.parametrize(("page", "arguments"), TRAIN.values(), ids=TRAIN)
def test_training_commands_compose(page: str, arguments: list[str], own_files: None, tmp_path: Path) -> None:
    for choice, module in PLUGINS.items():
        if any(argument.endswith(f"={choice}") for argument in arguments) and find_spec(module) is None:
            pytest.skip(f"{choice} needs {module}")
    write_files(page, tmp_path)
    folder = arguments[arguments.index("--config-dir") + 1] if "--config-dir" in arguments else None
    overrides = [argument for argument in arguments if argument not in ("-m", "--config-dir", folder)]
    assert plan(overrides, "-m" in arguments, folder).jobs


def test_evaluation_commands_compose(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run").symlink_to(trained)
    asked: list[Any] = []
    monkeypatch.setattr("iwae_cli.runs.evaluate.evaluate_run", lambda folder, config: asked.append(config))
    found = [
        arguments for page in PAGES for arguments in commands(page, "iwae-eval") if "--config-dir" not in arguments
    ]
    for arguments in found:
        assert call("iwae-eval", arguments) == (0, ""), arguments
    assert len(asked) == len(found) >= 5


def test_report_commands_are_read() -> None:
    found = [arguments for page in PAGES for arguments in commands(page, "iwae-report")]
    assert len(found) >= 6
    for arguments in found:
        code, error = call("iwae-report", arguments)
        assert code == 2 and "outputs is not there" in error, "read, and only the runs are missing"


def test_the_objective_of_the_readme(own_files: None, tmp_path: Path) -> None:
    write_files("README.md", tmp_path)
    (arguments,) = [words for words in commands("README.md", "iwae-train") if "--config-dir" in words]
    code, error = call("iwae-train", [*arguments, *SMALL])
    assert code == 0, error
    (folder,) = run_folders(tmp_path / "outputs")
    assert read_json(folder / "result.json")["objective"] == {"name": "halfway", "k": 5, "gradient": "total"}

    from mine.halfway import Halfway

    from iwae_cli.objectives.ciwae import CIWAE

    compare_bounds(Halfway(7), CIWAE(7, 0.5))


def compare_bounds(ours: Any, known: Any) -> None:
    log_w = torch.randn(7, 3, dtype=torch.float64)
    for method in ("bound", "weights", "doubly_weights"):
        torch.testing.assert_close(getattr(ours, method)(log_w), getattr(known, method)(log_w))


def extension_command(section: str) -> tuple[str, list[str]]:
    """Return program and arguments of the only command in a section of extending.md."""
    text = PAGES["docs/extending.md"].partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (line,) = re.findall(r"^(iwae-\w+ --config-dir my_conf .+)$", text, re.MULTILINE)
    program, *arguments = shlex.split(line)
    return program, arguments


@pytest.mark.parametrize("section", ["Objective", "Data set", "Model", "Flow", "Prior", "Logger"])
def test_extensions_train(section: str, own_files: None, tmp_path: Path) -> None:
    write_files("docs/extending.md", tmp_path)
    program, arguments = extension_command(section)
    fast = [
        "schedule.passes=1",
        "evaluation.k=50",
        "evaluation.refine=0",
        *(["logger=disabled"] if section != "Logger" else []),
    ]
    code, error = call(program, [*arguments, *fast])
    assert code == 0, error
    (folder,) = run_folders(tmp_path / "outputs")
    result = read_json(folder / "result.json")
    if section == "Objective":
        assert result["objective"] == {"name": "power", "k": 5, "c": 0.5, "gradient": "total"}
    if section == "Data set":
        assert result["dataset"]["sizes"] == {"train": 800, "validation": 100, "test": 100}
        assert result["dataset"]["name"] == "stripes"
    if section == "Logger":
        header, row = (folder / "bounds.csv").read_text().splitlines()
        assert header == "step,train/bound,validation/bound"
        assert row.split(",")[0] == "65" and float(row.split(",")[1]) < 0


def test_an_extension_estimates(own_files: None, trained: Path, tmp_path: Path) -> None:
    write_files("docs/extending.md", tmp_path)
    shutil.copytree(trained, tmp_path / "outputs" / "run")
    program, arguments = extension_command("Estimator")
    code, error = call(program, [argument.replace("<run>", "run") for argument in arguments])
    assert code == 0, error
    (kept,) = (tmp_path / "outputs" / "run" / "evaluations").glob("rate-*")
    numbers = read_json(kept / "result.json")["test"]
    # -E_q[log w] = rate + distortion, an upper bound on the NLL.
    assert numbers["rate"] + numbers["distortion"] > read_json(trained / "result.json")["test"]["nll"]


def test_the_mixture_is_a_density_and_has_no_closed_form_kl(own_files: None, tmp_path: Path) -> None:
    write_files("docs/extending.md", tmp_path)
    _, arguments = extension_command("Prior")
    code, error = call("iwae-train", [*arguments, "objective=elbo", "objective.analytic_kl=true"])
    assert code == 2 and error.count("\n") == 1 and "analytic_kl" in error
    assert not (tmp_path / "outputs").exists()

    from mine.mixture import MixtureOfGaussians

    prior = MixtureOfGaussians(3, 1)
    prior.initialize(torch.Generator().manual_seed(0))
    grid = torch.linspace(-12, 12, 4001)[:, None, None]
    torch.testing.assert_close(torch.trapezoid(prior.log_prob(grid, None)[:, 0].exp(), dx=24 / 4000), torch.tensor(1.0))


def test_the_objective_of_the_page_is_the_renyi_bound(own_files: None, tmp_path: Path) -> None:
    write_files("docs/extending.md", tmp_path)
    from mine.power import Power

    from iwae_cli.objectives.vr import VR

    compare_bounds(Power(7, 0.25), VR(7, 0.75))


def test_the_flow_is_a_density(own_files: None, tmp_path: Path) -> None:
    write_files("docs/extending.md", tmp_path)
    from mine.flow import Flow

    flow, given = Flow(2, [4], 1).double(), torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    h = torch.sinh(torch.linspace(-9, 9, 4001, dtype=torch.float64))
    density = flow.log_prob(h[:, None, None], given)[:, 0].exp()
    torch.testing.assert_close(torch.trapezoid(density, h), torch.tensor(1.0, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.trapezoid(density * h, h), flow.mean(given)[0, 0], atol=1e-3, rtol=0)


def test_a_run_in_python(trained: Path) -> None:
    (text,) = blocks("docs/usage.md", "python")
    names: dict[str, Any] = {}
    exec(text.replace("outputs/<run>", str(trained)), names)
    n = len(names["test"].x)
    assert names["images"].shape == (16, 64) and set(names["images"].unique().tolist()) <= {0.0, 1.0}
    assert names["log_px"].shape == names["bound"].shape == names["test"].labels.shape == (n,)
    assert names["log_w"].shape == (50, n) and [code.shape for code in names["codes"]] == [(n, 3)]


def test_the_notebook_runs_and_its_output_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(notebook: Any) -> list[tuple[str, list[str]]]:
        """The text, with # for every number, whose digits depend on the machine, and the kinds of all other output."""
        cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
        text = ["".join(out.text for out in outputs if out.get("name") == "stdout") for outputs in cells]
        kinds = [[kind for out in outputs for kind in sorted(out.get("data", ()))] for outputs in cells]
        return [(re.sub(r"-?\d+(\.\d+)?", "#", text), kinds) for text, kinds in zip(text, kinds, strict=True)]

    monkeypatch.delenv("MPLBACKEND")  # figures are drawn where they are shown
    found, kept = executed(tmp_path, dict(os.environ)), nbformat.read(NOTEBOOK, as_version=4)
    assert printed(found)[1:] == printed(kept)[1:]
    assert sum("image/png" in kinds for _, kinds in printed(kept)) == 3
    # The same run, and its NLL within one standard error over images.
    (run,) = (tmp_path / "outputs").iterdir()
    texts = [out.get("text", "") for cell in kept.cells for out in cell.get("outputs", ())]
    (nll,) = (float(text.split()[1]) for text in texts if text.startswith("NLL_500: "))
    test = read_json(run / "result.json")["test"]
    assert nll == pytest.approx(test["nll"], abs=test["stderr_images"])
    assert any(run.name in text for text in texts) and not any("/tmp" in text for text in texts)


def test_every_code_block_is_tested() -> None:
    python = sum(len(blocks(page, "python")) + len(blocks(page, "yaml")) for page in PAGES)
    assert python == len(blocks("docs/usage.md", "python")) + sum(len(named_blocks(page)) for page in PAGES)
    assert not [
        page
        for page in PAGES
        if named_blocks(page) and page not in ("README.md", "docs/extending.md", "docs/sweeps.md")
    ]


def test_groups_of_the_readme_are_those_of_conf() -> None:
    made = groups()
    assert f"<!-- The groups of conf -->\n{made}\n" in README
    assert re.findall(r"^\| `(\w+)=`", made, re.M) == [
        key for entry in CONFIG["defaults"] for key in entry if key in CHOICES
    ]


@pytest.mark.parametrize(("heading", "expected"), [
    ("| objective | bound | source |", CHOICES["objective"]),
    ("| `data=` | images | source |", CHOICES["data"]),
    ("| key | default | meaning |", sorted(set(CONFIG) - {"defaults", "hydra"})),
])  # fmt: skip
def test_tables_of_usage_are_complete(heading: str, expected: list[str]) -> None:
    table = PAGES["docs/usage.md"].partition(heading)[2].partition("\n\n")[0]
    assert (
        sorted(name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])) == expected
    )


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_error_messages(page: str) -> None:
    ((override, message),) = re.findall(r"^\$ iwae-train (\S+=\S+)\n(iwae-train: .+)$", PAGES[page], re.MULTILINE)
    assert call("iwae-train", [override]) == (2, f"{message}\n")


def test_links_lead_somewhere_and_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            file, _, anchor = "".join(target).partition("#")
            if file.startswith("https://"):
                continue
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), (page, target)
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, (page, target)


def test_names_on_the_page_of_the_code_exist() -> None:
    walk = PAGES["docs/code.md"].partition("\n## From")[2]
    linked = {(ROOT / "docs" / path).read_text(encoding="utf-8") for path in re.findall(r"\]\((\S+\.py)\)", walk)}
    names = re.findall(r"`(\w+)`", walk)
    assert len(names) > 20
    assert not [name for name in names if not any(re.search(rf"\b(def|class) {name}\b", text) for text in linked)]


def test_every_promise_names_its_tests() -> None:
    text = PAGES["docs/promises.md"]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert not [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")]
    for promise in text.split("\n## ")[1:]:
        assert "`tests/" in promise, promise.splitlines()[0]
