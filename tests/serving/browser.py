"""Headless Chromium by its debugging protocol over a pipe: no driver, no package."""

import contextlib
import json
import os
import subprocess
from itertools import count

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--window-size=1100,800",
]


class Page:
    """One tab."""

    def __init__(self, commands, answers):
        self.commands, self.answers, self.numbers, self.session = commands, answers, count(1), None
        self.events = []

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            answer = json.loads(self.read())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self):
        out = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            out += byte
        return out

    def open(self, url):
        """A new tab, which `call` and `run` speak to from now on."""
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call("Page.navigate", url=url)

    def run(self, script):
        """The value of an expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition, seconds=60):
        """Waits until an expression is true in the page."""
        script = f"""new Promise((done) => {{
            const end = Date.now() + {seconds * 1000};
            const look = () => ({condition}) ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 20);
            look(); }})"""
        assert self.run(script), condition


@contextlib.contextmanager
def browse(executable, profile):
    """A browser with one tab that is not open yet."""
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    command = [executable, *FLAGS, f"--user-data-dir={profile}"]
    shell = ["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", *command]
    process = subprocess.Popen(shell, pass_fds=(from_us, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(from_us)
    os.close(to_us)
    with os.fdopen(to_browser, "wb") as commands, os.fdopen(from_browser, "rb") as answers:
        page = Page(commands, answers)
        try:
            yield page
        finally:
            page.session = None
            with contextlib.suppress(AssertionError, BrokenPipeError):
                page.call("Browser.close")
            process.wait(timeout=20)
