import pytest

from dsv3.errors import RunError
from tools.interop import speed


def test_every_prompt_has_a_client_of_its_own_and_no_prompt_comes_twice(monkeypatch):
    asked = []

    def answer(url, content):
        assert url == "http://here/v1/completions"
        assert (content["max_tokens"], content["temperature"], content["ignore_eos"]) == (7, 0, True)
        asked.append(tuple(content["prompt"]))
        return {"usage": {"completion_tokens": 7}}

    monkeypatch.setattr(speed, "ask", answer)
    prompts = speed.Prompts(100)
    for _ in range(2):
        prompts.answered("http://here", 3, 20, 7)
    assert len(set(asked)) == 6
    assert all(len(each) == 20 and set(each) <= set(range(100)) for each in asked)


def test_a_server_that_gives_fewer_tokens_is_named(monkeypatch):
    monkeypatch.setattr(speed, "ask", lambda url, content: {"usage": {"completion_tokens": len(content["prompt"])}})
    with pytest.raises(RunError, match=r"http://here gave \[5, 4\] tokens, and was asked for 5 each"):
        speed.answer_all("http://here", [[1] * 5, [1] * 4], 5)
