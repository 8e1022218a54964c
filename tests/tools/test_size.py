import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("size", ROOT / "tools" / "size.py")
assert spec is not None
assert spec.loader is not None
size = importlib.util.module_from_spec(spec)
spec.loader.exec_module(size)


def repository(root: Path, files: dict[str, int], budget: str) -> Path:
    for name, lines in files.items():
        path = root / "src" / "dsv3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * lines)
    (root / "pyproject.toml").write_text(f"[tool.dsv3.size]\n{budget}\n")
    return root


FILES = {"errors.py": 10, "data/a.py": 20, "data/deep/b.py": 30, "model/page.j2": 5, "model/notes.txt": 99}


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ('file = 30\ntotal = 65\nfolders = { data = 50, model = 5, "." = 10 }', None),
        ('file = 29\ntotal = 65\nfolders = { data = 50, model = 5, "." = 10 }', "b.py holds 30 lines of 29"),
        ('file = 30\ntotal = 64\nfolders = { data = 50, model = 5, "." = 10 }', "the source holds 65 lines of 64"),
        ('file = 30\ntotal = 65\nfolders = { data = 49, model = 5, "." = 10 }', "data holds 50 lines of 49"),
        ('file = 30\ntotal = 65\nfolders = { data = 50, "." = 10 }', "model has no budget"),
    ],
)
def test_every_budget_is_enforced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str, problem: str | None
) -> None:
    assert size.main(repository(tmp_path, FILES, budget)) == (0 if problem is None else 1)
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].split()[:3] == ["all", "4", "65"]
    assert (shown.err == "") if problem is None else (problem in shown.err and shown.err.count("\n") == 1)
