import subprocess
import sys

from click.testing import CliRunner

from dsv3.cli.report import report


def test_it_writes_beside_the_run_and_says_where(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    result = CliRunner().invoke(report, [str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output == f"report: {tmp_path / 'report.html'}\n"
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_it_writes_where_it_is_told(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    out = tmp_path / "new" / "page.html"
    assert CliRunner().invoke(report, [str(tmp_path), "--out", str(out)], catch_exceptions=False).exit_code == 0
    assert out.is_file()
    assert not (tmp_path / "report.html").exists()


def test_the_command_loads_no_plotting_and_the_page_no_torch():
    code = "import sys, dsv3.cli.report; assert 'matplotlib' not in sys.modules; import dsv3.stages.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
