import json
import re
import tomllib
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.stages.report import to_toml, write_report

HOSTILE = "<script>alert('x')</script>\"'&${}{{ 7*7 }} http://example.com/\ud800"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A page as its parser sees it: elements, text by innermost element; refuses elements that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


@pytest.fixture
def page(tmp_path):
    def write(run) -> tuple[Page, str]:
        write_report(run, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text("utf-8")
        return Page(text), re.sub(r"\s+", " ", text)

    return write


def drawn(page: Page) -> list[str]:
    return [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]


def test_a_whole_run(make_run, tmp_path, page):
    parsed, text = page(make_run(tmp_path / "quickstart"))
    assert len(drawn(parsed)) == 5
    assert 'class="missing"' not in text
    assert 'class="state"' not in text
    assert (
        "3.41 → 1.84 bits per byte on held-out standard library · 0% → 62% pass@1 on held-out combinations · "
        "4.7 minutes of training on this machine" in parsed.text["p"]
    )
    assert "186 of 300; 95% interval 56% to 67%" in parsed.text["span"]
    assert "    total = 0\n    for x in xs:\n" in parsed.text["mark"]
    assert "def add(xs):\n" in parsed.text["pre"]
    assert "        total += x\n    return total\n" in parsed.text["pre"]
    assert "The same at step 0" in parsed.text["summary"]
    assert "it reached 1.9 in half of AdamW's tokens" in parsed.text["td"]
    assert 'preset = "tiny"' in parsed.text["pre"]
    assert f"dsv3 chat {tmp_path}/quickstart/pretrain/checkpoints/step-00000930\n" in parsed.text["pre"]


def test_the_page_asks_for_nothing_from_outside(make_run, tmp_path, page):
    parsed, text = page(make_run(tmp_path / "run", steps=60, planned=60))
    for tag, attributes in parsed.elements:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "http" not in text
    assert "@import" not in text
    names = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]*)", text)) <= set(names)


def test_the_same_files_give_the_same_page(make_run, tmp_path, page):
    run = make_run(tmp_path / "run", steps=60, planned=60)
    assert page(run)[1] == page(run)[1]


def test_hostile_text_stays_text(make_run, tmp_path, page):
    parsed, _ = page(make_run(tmp_path / "<script>alert(2)<script>", 60, 60, HOSTILE))
    assert "script" not in {tag for tag, _ in parsed.elements}
    seen = HOSTILE.replace("\ud800", "?")
    assert seen in parsed.text["mark"]
    assert seen in parsed.text["th"]
    assert parsed.text["h1"].startswith("<script>alert(2)<script> ")
    assert "def add(xs):\n" + seen in parsed.text["pre"]
    assert "49" not in parsed.text["mark"]
    assert not [attributes for _, attributes in parsed.elements if "http" in json.dumps(attributes)]
    assert len(drawn(parsed)) == 5


def test_a_run_before_its_first_step(tmp_path, page):
    (tmp_path / "run" / "shards").mkdir(parents=True)
    parsed, _ = page(tmp_path / "run")
    assert "Training has not begun." in parsed.text["p"]
    assert drawn(parsed) == []
    assert "No expert load is recorded yet." in parsed.text["p"]
    assert "There is no checkpoint yet." in parsed.text["li"]


def test_a_run_half_way_with_a_line_being_written(make_run, tmp_path, page):
    run = make_run(tmp_path / "run", steps=465)
    with (run / "pretrain" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 466, "tok')
    parsed, _ = page(run)
    assert "50% of 1.9M tokens" in parsed.text["p"]
    assert "465 steps" in parsed.text["span"]


def test_a_run_without_evaluations(make_run, tmp_path, page):
    run = make_run(tmp_path / "run", steps=20, planned=20)
    (run / "pretrain" / "evaluations.jsonl").unlink()
    parsed, _ = page(run)
    assert len(drawn(parsed)) == 3
    assert "not evaluated yet · 6 seconds of training on this machine" in parsed.text["p"]
    for absent in ("No evaluation of held-out text", "No evaluation by tasks", "No samples"):
        assert absent in parsed.text["p"]
    assert "evaluations.jsonl holds no evaluation yet." in parsed.text["li"]


def test_a_run_with_one_evaluation_of_text_alone_and_no_run_json(make_run, tmp_path, page):
    run = make_run(tmp_path / "run", steps=20, planned=20)
    (run / "pretrain" / "run.json").unlink()
    (run / "pretrain" / "evaluations.jsonl").write_text(
        '{"step": 0, "tokens": 0, "seconds": 1.0, "bits_per_byte": {"mine": 3.4}}\n'
    )
    parsed, _ = page(run)
    assert (
        "3.40 bits per byte on held-out mine, before training · 6 seconds of training on this machine"
        in parsed.text["p"]
    )
    assert len(drawn(parsed)) == 4


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("dsv3 quickstart", "dsv3 quickstart\n"),
        ("dsv3 pretrain a.toml", "dsv3 pretrain a.toml --resume\n"),
        ("dsv3 extend a.toml --out b", "dsv3 extend a.toml --out b --resume\n"),
        ("dsv3 extend a.toml --resume", "dsv3 extend a.toml --resume\n"),
    ],
)
def test_the_command_that_goes_on_with_the_run(make_run, tmp_path, page, command, said):
    about = make_run(tmp_path / "run", steps=20, planned=20) / "pretrain" / "run.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "command": command}))
    assert f"\n{said}" in page(tmp_path / "run")[0].text["pre"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "page.html", tmp_path):
        with pytest.raises(UserError, match=r"cannot be written \(.*--out"):
            write_report(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), min_size=1, max_size=6)
SCALARS = st.one_of(st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), KEYS)
TABLES = st.recursive(
    st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4),
    lambda inner: st.dictionaries(KEYS, st.one_of(SCALARS, inner, st.lists(inner, min_size=1, max_size=2)), max_size=3),
    max_leaves=6,
)


@given(TABLES)
def test_to_toml_reads_back(table):
    assert tomllib.loads(to_toml(table)) == table


def test_to_toml_keeps_absent_values_as_comments():
    assert to_toml({"path": None, "digits": 3}) == "# path is not set\ndigits = 3\n"
