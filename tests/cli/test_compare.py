import json

from dsv3.cli import main
from tests.stages.comparable import write_run


def test_a_table_markdown_json_and_a_drawing(tmp_path, capsys):
    paths = [
        write_run(tmp_path / f"{name}-seed{seed}", name, seed, stdlib=1.8 + (name == "mtp-off") * seed / 10)
        for name in ("baseline", "mtp-off")
        for seed in (0, 1)
    ]
    command = ["compare", *map(str, paths)]
    assert main.run([*command, "--plot", str(tmp_path / "c.svg")]) == 0
    said = capsys.readouterr()
    assert "the same (Table 4)" in said.out
    assert "4 runs, seeds 0, 1, after 10,000 tokens" in said.out
    assert f"drawn: {tmp_path / 'c.svg'}" in said.err
    assert "bits per byte, stdlib" in (tmp_path / "c.svg").read_text()
    assert main.run([*command, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| figure | variant | mean |")
    assert main.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"][1]["reproduces"] == "yes"


def test_another_ending_is_refused_before_anything_is_read(tmp_path, capsys):
    assert main.run(["compare", str(tmp_path / "nothing"), "--plot", "c.pdf"]) == 2
    assert "expected a name that ends in .svg or .png" in capsys.readouterr().err
