import base64
import json
import shutil
import time

import pytest

from tests.serving.browser import browse

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=document.title='evil'><script>document.title='evil'</script> & done"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browse(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def open_page(serve, browser):
    """A new tab with the page of a server around a fake engine: (tab, engine)."""

    def start(engine, **settings):
        client, made = serve(engine, **settings)
        browser.open(str(client.base_url))
        browser.until("document.getElementById('form') && document.readyState === 'complete'")
        return browser, made

    return start


def say(page, text):
    page.run(f"$('text').value = {json.dumps(text)}; $('send').click()")


def test_a_conversation(open_page, tmp_path):
    page, engine = open_page({"text": EVIL, "width": 2, "seconds": 0.005}, max_model_len=2048)
    page.until("$('model').textContent === 'tiny'")
    page.run("$('system').value = 'Be brief.'; $('temperature').value = '0'; $('seed').value = '7'")
    say(page, "<b>hi</b>")
    page.until("!$('send').disabled && $('talk').children.length === 3")
    turns = page.run("[...document.querySelectorAll('.turn')].filter((t) => !t.hidden).map((t) => t.textContent)")
    assert turns == ["<b>hi</b>", EVIL]
    assert page.run("document.title") == "tiny"
    assert page.run("document.querySelectorAll('#talk *:not(.turn)').length") == 0
    assert "tokens/s" in page.run("$('figures').textContent")
    assert "tokens a step" in page.run("$('figures').textContent")
    # Experts 1 and 2 of the first block, 3 and 4 of the second.
    lit = page.run("""[...Array(2).keys()].map((y) => [...Array(5).keys()].map((x) =>
        $('map').getContext('2d').getImageData(x, y, 1, 1).data[3] > 0))""")
    assert lit == [[False, True, True, False, False], [False, False, False, True, True]]
    params = engine.added[0][1]
    assert (params.temperature, params.seed, params.max_tokens) == (0, 7, 256)
    say(page, "again")
    page.until("!$('send').disabled && $('talk').children.length === 6")
    prompt = engine.tokenizer.decode(engine.added[1][0])
    assert prompt.startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜><b>hi</b><｜Assistant｜>" + EVIL)
    picture = base64.b64decode(page.call("Page.captureScreenshot")["data"])
    (tmp_path / "page.png").write_bytes(picture)
    asked = {
        event["params"]["request"]["url"] for event in page.events if event.get("method") == "Network.requestWillBeSent"
    }
    home = page.run("location.origin")
    assert asked
    assert all(url.startswith(home) for url in asked)
    refused = [event for event in page.events if "Content Security Policy" in json.dumps(event)]
    assert not refused


def test_stop_ends_the_answer_here_and_in_the_engine(open_page):
    page, engine = open_page({"text": "endless " * 200, "seconds": 0.02}, max_model_len=4096)
    page.run("$('max_tokens').value = '3000'")
    say(page, "hi")
    page.until("document.querySelector('.assistant') && document.querySelector('.assistant').textContent.length > 20")
    page.run("$('stop').click()")
    page.until("!$('send').disabled")
    assert page.run("document.querySelectorAll('.error').length") == 0
    page.until("!going", seconds=1)
    end = time.monotonic() + 30
    while not engine.aborted and time.monotonic() < end:  # the server learns of it a little later
        time.sleep(0.01)
    assert engine.aborted


def test_a_refusal_is_shown(open_page):
    page, _ = open_page({}, api_keys=("secret",))
    say(page, "hi")
    page.until("document.querySelector('.error')")
    assert "Authorization" in page.run("document.querySelector('.error').textContent")
    page.run("$('key').value = 'secret'; $('key').dispatchEvent(new Event('change'))")
    page.until("$('model').textContent === 'tiny' && !$('send').disabled")
    say(page, "hi")
    page.until("[...document.querySelectorAll('.assistant')].some((t) => t.textContent.startsWith('Hello'))")
