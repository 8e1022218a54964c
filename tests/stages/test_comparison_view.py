import matplotlib
import pytest

from dsv3.stages.compare import compare
from dsv3.stages.comparison_view import drawing, markdown, table
from dsv3.stages.drawing import STYLE, save
from tests.stages.comparable import write_run


@pytest.fixture
def comparison(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"baseline-seed{seed}", "baseline", seed, passed=270 + 3 * seed)
        write_run(tmp_path / f"mtp-off-seed{seed}", "mtp-off", seed, passed=240 + 3 * seed, stdlib=1.9)
    return compare(sorted(tmp_path.iterdir()))


def test_table(comparison):
    head, *rows = table(comparison)
    assert head == ["figure", "variant", "mean", "difference", "report", "reproduces"]
    assert rows[:2] == [
        ["validation loss, stdlib", "baseline", "3.6000 ± 0.0000", "", "", ""],
        ["", "mtp-off", "3.8000 ± 0.0000", "+0.2000 ± 0.0000", "the same (Table 4)", "no"],
    ]
    assert rows[2:4] == [
        ["bits per byte, stdlib", "baseline", "1.8000 ± 0.0000", "", "", ""],
        ["", "mtp-off", "1.9000 ± 0.0000", "+0.1000 ± 0.0000", "the same (Table 4)", "no"],
    ]
    assert rows[6:8] == [
        ["pass@1, tinypy", "baseline", "91.0 ± 1.0%", "", "", ""],
        ["", "mtp-off", "81.0 ± 1.0%", "-10.0 ± 0.0%", "lower (Table 4)", "yes"],
    ]
    assert [row[0] for row in rows if row[0]][-1] == "MaxVio"


def test_markdown_has_the_table_and_what_it_means(comparison):
    lines = markdown(comparison).splitlines()
    assert lines[0] == "| figure | variant | mean | difference | report | reproduces |"
    assert lines[5] == "|  | mtp-off | 1.9000 ± 0.0000 | +0.1000 ± 0.0000 | the same (Table 4) | no |"
    assert "6 runs, seeds 0, 1, 2, after 10,000 tokens, on a device. MaxVio: mean over the last 20%" in lines[13]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_drawing_has_every_figure_variant_and_sign(comparison, tmp_path, ending):
    with matplotlib.rc_context(STYLE):
        figure = drawing(comparison)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "validation loss, stdlib", "bits per byte, stdlib", "bits per byte, tinypy", "pass@1, tinypy %", "MaxVio",
    ]  # fmt: skip
    loss, bits, _, solved, violation = figure.axes
    assert list(loss.lines[1].get_ydata()) == pytest.approx([4.4, 4.0, 3.8])
    assert list(bits.lines[1].get_ydata()) == pytest.approx([2.5, 2.1, 1.9])
    assert list(solved.lines[0].get_ydata()) == pytest.approx([36.33, 72.67, 91.0], abs=0.01)
    assert violation.lines[0].get_ydata()[-1] == pytest.approx(0.2)
    legend = [text.get_text() for text in solved.get_legend().get_texts()]
    assert legend == ["baseline", "mtp-off (report: lower; here: yes)"]
    save(lambda: figure, tmp_path / "new" / f"comparison.{ending}")
    assert (tmp_path / "new" / f"comparison.{ending}").stat().st_size > 10_000
