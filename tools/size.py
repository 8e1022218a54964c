"""`make size`: how many lines each folder of the source holds, against what `pyproject.toml` allows.

A code base that is to be read in a week-end has to stay that small. Exits with 1 when a file, a folder or the whole is
too long, or when a folder has no budget. Needs nothing but Python.
"""

import sys
import tomllib
from pathlib import Path

COUNTED = (".py", ".j2", ".html", ".css", ".js")


def count(source: Path) -> dict[str, dict[Path, int]]:
    """Lines of every counted file, by the folder of the house it belongs to; files beside the folders count under `.`"""
    lines: dict[str, dict[Path, int]] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix in COUNTED:
            parts = path.relative_to(source).parts
            folder = parts[0] if len(parts) > 1 else "."
            lines.setdefault(folder, {})[path] = len(path.read_text(encoding="utf-8").splitlines())
    return lines


def report(source: Path, budget: dict) -> tuple[str, list[str]]:
    """The table, and what exceeds the budget."""
    lines = count(source)
    folders, most = budget["folders"], budget["file"]
    rows, problems = [f"{'folder':<14}{'files':>6}{'lines':>8}{'budget':>8}"], []
    for folder in [*(name for name in folders if name in lines), *(name for name in lines if name not in folders)]:
        files, total, allowed = lines[folder], sum(lines[folder].values()), folders.get(folder)
        rows.append(f"{folder:<14}{len(files):>6}{total:>8}{allowed or '-':>8}")
        if allowed is None:
            problems.append(f"{folder} has no budget: add it to tool.dsv3.size.folders in pyproject.toml")
        elif total > allowed:
            problems.append(f"{folder} holds {total} lines of {allowed}")
        problems += [f"{path} holds {size} lines of {most}" for path, size in files.items() if size > most]
    total = sum(sum(files.values()) for files in lines.values())
    rows.append(f"{'all':<14}{sum(map(len, lines.values())):>6}{total:>8}{budget['total']:>8}")
    if total > budget["total"]:
        problems.append(f"the source holds {total} lines of {budget['total']}")
    return "\n".join(rows), problems


def main(root: Path) -> int:
    """Prints the table for the repository at `root`; the exit code."""
    budget = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dsv3"]["size"]
    table, problems = report(root / "src" / "dsv3", budget)
    print(table)
    for problem in problems:
        print(f"size: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[1]))
