import pytest
import torch

from dsv3.errors import RunError
from tools.interop import speed


def test_every_prompt_has_a_client_of_its_own_and_is_drawn_anew(monkeypatch):
    asked = []

    def answer(url, content):
        assert url == "http://here/v1/completions"
        assert (content["max_tokens"], content["temperature"], content["ignore_eos"]) == (7, 0, True)
        asked.append(content["prompt"])
        return {"usage": {"completion_tokens": 7}}

    monkeypatch.setattr(speed, "ask", answer)
    prompts = torch.arange(60).view(2, 3, 10)
    drawn = iter(prompts)
    for _ in range(2):
        speed.turn("http://here", lambda: next(drawn), 7)
    assert sorted(asked) == prompts.flatten(0, 1).tolist()


def test_a_server_that_gives_fewer_tokens_is_named(monkeypatch):
    monkeypatch.setattr(speed, "ask", lambda url, content: {"usage": {"completion_tokens": len(content["prompt"])}})
    with pytest.raises(RunError, match=r"http://here gave \[4, 4\] tokens, and was asked for 5 each"):
        speed.turn("http://here", lambda: torch.ones(2, 4, dtype=torch.int64), 5)
