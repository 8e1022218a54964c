"""What `make quickstart` promises, measured on the real recipe: several minutes, so `make prove` runs it and `make test` does not."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
MINUTES = 8


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The run's directory, and the minutes it took by the clock and of processors."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    started, used = time.monotonic(), processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "dsv3", "quickstart", "--out", str(run)],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run, (time.monotonic() - started) / 60, (processor_seconds() - used) / 60


@pytest.mark.prove
@pytest.mark.long
@pytest.mark.timeout(8 * MINUTES * 60)
def test_the_quickstart_keeps_its_promises(quickstart):
    """One seed. Two cores for eight minutes are asserted as processor time: a busy machine gives the same model, later."""
    run, minutes, processor_minutes = quickstart
    lines = (run / "pretrain" / "evaluations.jsonl").read_text().splitlines()
    before, after = json.loads(lines[0]), json.loads(lines[-1])
    tasks = after["pass_at_1"]["tinypy"]
    print(
        f"bits per byte {before['bits_per_byte']['stdlib']:.3f} -> {after['bits_per_byte']['stdlib']:.3f}, "
        f"pass@1 {tasks['passed']} of {tasks['total']}, {minutes:.1f} minutes, "
        f"{processor_minutes:.1f} minutes of processor time"
    )
    assert before["bits_per_byte"]["stdlib"] > 3.0
    assert after["bits_per_byte"]["stdlib"] < 2.0
    assert tasks["total"] == 300
    assert tasks["passed"] >= 0.45 * 300
    assert (run / "report.html").is_file()
    assert processor_minutes <= 2 * MINUTES


@pytest.mark.prove
@pytest.mark.long
@pytest.mark.timeout(8 * MINUTES * 60)
def test_its_context_grows_to_four_times_its_length(quickstart, tmp_path):
    """Both phases of `dsv3 extend`; the tool fails when loss or needles are not as promised."""
    figures = tmp_path / "extension.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.extension", "--start", str(quickstart[0]), "--out", str(tmp_path), "--json", str(figures)],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    scores = json.loads(figures.read_text())["scores"]
    # Without YaRN, the very weights that it carries to four times their length fail beyond it.
    plain, scaled = (scores[name]["loss_by_position"]["tinypy"]["nats"] for name in ("start", "start, YaRN on"))
    assert max(plain[2:]) > 2 * max(plain[:2])
    assert max(scaled[2:]) < 1.2 * max(scaled[:2])


def processor_seconds() -> float:
    """Of all finished child processes, user and system together."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
