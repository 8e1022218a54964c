"""The written house and the enforced one are the same."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def test_the_documented_order_is_the_enforced_one() -> None:
    written = re.findall(r"^\| (\(?`\w+`\)?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    enforced = SETTINGS["importlinter"]["contracts"][0]["layers"]
    assert [name.replace("`", "") for name in written] == enforced


def test_every_folder_is_in_the_order_and_has_a_budget() -> None:
    layers = {name.strip("()") for name in SETTINGS["importlinter"]["contracts"][0]["layers"]}
    folders = {path.parent.name for path in (ROOT / "src" / "dsv3").glob("*/__init__.py")}
    assert folders <= layers
    assert folders <= SETTINGS["dsv3"]["size"]["folders"].keys()
