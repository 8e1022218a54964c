import json
import os
import sys

import pytest

from dsv3.errors import RunError
from tools.interop import server
from tools.interop.server import Reply, ask, complete, draft_counts, free_port, serving

# Answers as vLLM does; it and a child that ignores SIGTERM hold a pipe open while they live.
FAKE = """
import http.server, json, signal, subprocess, sys
port, pipe = int(sys.argv[1]), open(sys.argv[2], "w")
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignore], stdout=pipe)

def choice(index):
    steps = [{"token_id:7": -0.25, "token_id:3": -1.5}, {"token_id:1": -0.125 * index}]
    return {"index": index, "token_ids": [7, 1], "logprobs": {"top_logprobs": steps}}

METRICS = '''# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="dsv3"} 211.0
vllm:spec_decode_num_draft_tokens_created{engine="0",model_name="dsv3"} 1.79e+09
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="dsv3"} 170.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="dsv3",position="0"} 170.0
'''

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        self.answer(200, METRICS if self.path == "/metrics" else "{}")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["max_tokens"] > 2:
            return self.answer(400, "too long")
        right = asked["temperature"] == 0 and asked["ignore_eos"] and asked["return_tokens_as_token_ids"]
        self.answer(200, json.dumps({"choices": [choice(1), choice(0)] if right else []}))

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def pipe(tmp_path):
    """A named pipe's path, and a function that returns when nobody holds it open any more."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    def closed():
        os.set_blocking(reader, True)
        return os.read(reader, 1) == b""

    yield tmp_path / "pipe", closed
    os.close(reader)


def fake(tmp_path, pipe):
    port = free_port()
    return serving([sys.executable, "-c", FAKE, str(port), str(pipe)], port, tmp_path / "log", 60)


def test_the_server_is_asked_and_ended_with_its_children(tmp_path, pipe):
    path, closed = pipe
    with fake(tmp_path, path) as url:
        assert complete(url, [[1], [2]], 2) == [
            Reply([7, 1], [{7: -0.25, 3: -1.5}, {1: 0.0}]),
            Reply([7, 1], [{7: -0.25, 3: -1.5}, {1: -0.125}]),
        ]
        assert draft_counts(url) == (211, 170)
        with pytest.raises(RunError, match="/v1/completions answered 400: too long"):
            complete(url, [[1]], 3)
    assert closed()
    with pytest.raises(OSError, match="refused"):
        ask(f"{url}/version")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_server_is_ended_when_its_user_fails(tmp_path, pipe, error):
    path, closed = pipe
    with pytest.raises(error), fake(tmp_path, path):
        raise error
    assert closed()


def test_a_server_that_ignores_the_request_to_end_is_ended(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(server, "STOP_SECONDS", 0.2)
    path, closed = pipe
    port = free_port()
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{FAKE}"
    with serving([sys.executable, "-c", stubborn, str(port), str(path)], port, tmp_path / "log", 60):
        pass
    assert closed()


def test_a_server_that_ends_early_is_explained_by_its_first_error(tmp_path):
    code = "print('WARNING: an OSError: this is none'); raise ValueError('no such architecture')"
    with (
        pytest.raises(RunError, match=r"ended with code 1 .*'ValueError: no such architecture'.*log$"),
        serving([sys.executable, "-c", code], free_port(), tmp_path / "log"),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up(tmp_path, pipe):
    path, closed = pipe
    code = "import sys, time; pipe = open(sys.argv[1], 'w'); time.sleep(600)"
    with (
        pytest.raises(RunError, match="not ready after 1 seconds"),
        serving([sys.executable, "-c", code, str(path)], free_port(), tmp_path / "log", 1),
    ):
        pass
    assert closed()


def test_settings_reach_the_server_and_our_source_path_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "src")
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    with (
        pytest.raises(RunError, match="ended with code 0"),
        serving([sys.executable, "-c", code, str(tmp_path / "seen")], free_port(), tmp_path / "log"),
    ):
        pass
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["VLLM_TARGET_DEVICE"] == "cpu"
    assert "PYTHONPATH" not in seen
