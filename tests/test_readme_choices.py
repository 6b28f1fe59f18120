"""What the README says of choices, keys and messages is what the program says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from iwae_cli.cli.help import choices, conf_folder, summary
from iwae_cli.cli.train import train

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
FOUND = choices([conf_folder()])
CONFIG = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
MESSAGES = re.findall(r"^\$ iwae-train (\S+=\S+)\n(iwae-train: .+)$", README, re.MULTILINE)


def test_the_table_of_groups_is_the_groups() -> None:
    rows = re.findall(r"^\| `(\w+)=` \| (.+?) \|", README, re.MULTILINE)
    default = {group: name for entry in CONFIG["defaults"] if isinstance(entry, dict) for group, name in entry.items()}
    assert [group for group, _ in rows] == [group for group in default if group in FOUND]
    for group, listed in rows:
        names = listed.split(", ")
        expected = [re.sub(r" \(.*", "", name) for name in summary(FOUND[group])]
        assert sorted(name.strip("*") for name in names) == sorted(expected)
        marked = [name.strip("*") for name in names if name.startswith("**")]
        assert marked == ([] if group == "experiment" else [default[group]])


def test_every_objective_has_a_row() -> None:
    table = README[README.index("| objective | bound | source |") :].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == FOUND["objective"]


def test_every_key_of_the_root_is_named() -> None:
    keys = set(CONFIG) - {"defaults", "hydra"}
    further = re.search(r"^Further keys: (.+?)\.", README, re.MULTILINE | re.DOTALL)
    assert further and keys == {name for name in re.findall(r"`(\w+)`", further[1]) if name.islower()}


@pytest.mark.parametrize("message", range(2))
def test_the_messages_are_these(message: int, capsys: pytest.CaptureFixture[str]) -> None:
    override, said = MESSAGES[message]
    assert train([override]) == 2
    assert capsys.readouterr().err == f"{said}\n"
