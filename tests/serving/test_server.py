"""The server as a process: `dsv3 serve`, its end by a signal, and many clients at once."""

import json
import signal
import threading

import pytest


def test_answers_are_those_of_the_engine_and_sigterm_drains(start, directory):
    from dsv3.inference.llm import LLM
    from dsv3.inference.params import SamplingParams

    process, client = start("--name", "debug", "--num-speculative-tokens", "1", "--max-num-seqs", "4")
    [expected] = LLM(directory, device="cpu").generate(["def add"], SamplingParams(temperature=0, max_tokens=24))
    request = {"model": "debug", "prompt": "def add", "temperature": 0, "max_tokens": 24}
    reply = client.post("/v1/completions", json=request).json()
    assert reply["choices"][0]["text"] == expected.outputs[0].text
    long = request | {"max_tokens": 100, "ignore_eos": True, "stream": True, "n": 4}
    with client.stream("POST", "/v1/completions", json=long) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert sum(each["choices"][0]["finish_reason"] == "length" for each in data) == 4
    process.wait(timeout=120)
    with pytest.raises(Exception, match="refused"):
        client.get("/health")


def test_what_cannot_be_served_is_one_paragraph(directory):
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    from click.testing import CliRunner

    from dsv3.cli.serve import serve
    from dsv3.errors import UserError
    from dsv3.serving import settings

    result = CliRunner().invoke(serve, [str(directory), "--api-key", ""])
    assert isinstance(result.exception, UserError)
    assert "--api-key is empty" in str(result.exception)
    result = CliRunner().invoke(serve, [str(directory), "--fp8-cache", "--device", "cpu"])
    assert "leave fp8_cache (--fp8-cache) out" in str(result.exception)
    text = CliRunner().invoke(serve, ["--help"]).output
    assert "429" in text
    for name in (each for each in dir(settings) if each.startswith("MAX_")):
        value = getattr(settings, name)
        assert str(value >> 10 if name.endswith("BYTES") else value) in text, name
    for said in ("10 s to tokenise", "10 s to compile", "30 s for the body", "60 s without reading"):
        assert said in text


def test_weights_are_loaded_in_a_thread_that_ends(directory, monkeypatch):
    """With it end OpenMP's workers that it started: beside them, those of the engine's thread would be too many for the cores."""
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    from click.testing import CliRunner

    from dsv3.cli.serve import serve
    from dsv3.serving import server
    from dsv3.weights import opening

    loading, load = [], opening.load_model

    def spied(*arguments, **options):
        loading.append(threading.current_thread())
        return load(*arguments, **options)

    monkeypatch.setattr(opening, "load_model", spied)
    monkeypatch.setattr(server, "run", lambda *_: loading.append(loading[0].is_alive()))
    assert CliRunner().invoke(serve, [str(directory), "--device", "cpu"]).exception is None
    thread, alive = loading
    assert thread is not threading.current_thread()
    assert not alive
