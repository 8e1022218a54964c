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
