import json
import re
import time
from dataclasses import replace

import pytest

from tests.serving.fake_engine import TEXT

HELLO = [{"role": "user", "content": "hello"}]


def events(response):
    """The data of server-sent events, in order."""
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_chat_completion(serve, tokenizer):
    client, engine = serve()
    reply = client.post("/v1/chat/completions", json={"messages": HELLO, "model": "tiny", "temperature": 0}).json()
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    count, prompt = len(tokenizer.encode(TEXT)), len(engine.added[0][0])
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": count,
        "total_tokens": prompt + count,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "prompt_cache_hit_tokens": 2,
        "prompt_cache_miss_tokens": prompt - 2,
    }
    assert tokenizer.decode(engine.added[0][0]) == "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜>"
    assert engine.added[0][1].temperature == 0
    assert engine.added[0][1].max_tokens == 512 - prompt


def test_a_stream_is_the_whole_answer_in_pieces(serve):
    client, _ = serve({"width": 3})
    request = {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=request).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/chat/completions", json=request | options)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *lines, done = events(response)
    assert done == "[DONE]"
    *chunks, usage = [json.loads(line) for line in lines]
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in mine) == TEXT
        logprobs = [token for each in mine for token in (each["logprobs"] or {"content": []})["content"]]
        assert logprobs == whole["choices"][index]["logprobs"]["content"]
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert len(logprobs[0]["top_logprobs"]) == 2
    assert bytes(byte for token in logprobs for byte in token["bytes"]).decode() == TEXT


def test_completions_of_texts_and_ids(serve, tokenizer):
    client, engine = serve()
    reply = client.post("/v1/completions", json={"prompt": ["a", [5, 6]], "n": 2, "max_tokens": 5}).json()
    assert [each["index"] for each in reply["choices"]] == [0, 1, 2, 3]
    text = tokenizer.decode(tokenizer.encode(TEXT)[:5])
    assert {(each["text"], each["finish_reason"]) for each in reply["choices"]} == {(text, "length")}
    assert [each[0] for each in engine.added] == [[tokenizer.bos_id, *tokenizer.encode("a")], [5, 6]]
    client.post("/v1/completions", json={"prompt": "a", "suffix": "c"})
    expected = [tokenizer.bos_id, tokenizer.fim_begin_id, *tokenizer.encode("a"), tokenizer.fim_hole_id]
    assert engine.added[2][0] == [*expected, *tokenizer.encode("c"), tokenizer.fim_end_id]


def test_echo_with_logprobs_as_lm_eval_asks(serve, tokenizer):
    client, engine = serve()
    request = {"prompt": "naïve 😀", "echo": True, "logprobs": 1}
    for max_tokens in (0, 1):
        [choice] = client.post("/v1/completions", json=request | {"max_tokens": max_tokens}).json()["choices"]
        new = tokenizer.decode(tokenizer.encode(TEXT)[:max_tokens])
        assert choice["text"] == "naïve 😀" + new
        shape, ids = choice["logprobs"], engine.added[-1][0] + tokenizer.encode(TEXT)[:max_tokens]
        assert {len(each) for each in shape.values()} == {len(ids)}
        assert (shape["token_logprobs"][0], shape["top_logprobs"][0]) == (None, None)
        assert set(shape["token_logprobs"][1:]) == {-0.25}
        assert shape["tokens"][0] == "<｜begin▁of▁sentence｜>"
        assert shape["text_offset"][:2] == [0, 0]
        assert shape["text_offset"][2] == len(tokenizer.token_bytes(ids[1]).decode(errors="ignore"))
        if max_tokens:
            assert shape["text_offset"][-1] == len("naïve 😀")


def test_streamed_completions_echo_once(serve):
    client, _ = serve()
    request = {"prompt": ["a", "b"], "echo": True, "max_tokens": 4, "logprobs": 2}
    whole = client.post("/v1/completions", json=request).json()["choices"]
    chunks = [json.loads(line) for line in events(client.post("/v1/completions", json=request | {"stream": True}))[:-1]]
    for index, each in enumerate(whole):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == each["text"]
        for key, values in each["logprobs"].items():
            assert [value for piece in mine for value in piece["logprobs"][key]] == values


def test_reasoning_and_tool_calls(serve):
    begin, end = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    answer = f'<think>Hm.</think>\n\nWait.{begin}function<｜tool▁sep｜>add\n```json\n{{"a": 1}}\n```{end}'
    client, engine = serve({"texts": [answer] * 3}, max_model_len=4096)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    request = {"messages": HELLO, "tools": [tool], "max_tokens": 200}
    [choice] = client.post("/v1/chat/completions", json=request).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Wait.", "Hm.")
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert '"name": "add"' in client.post("/detokenize", json={"tokens": engine.added[0][0]}).json()["prompt"]
    chunks = [json.loads(x) for x in events(client.post("/v1/chat/completions", json=request | {"stream": True}))[:-1]]
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(each["function"]["arguments"] for each in deltas) == '{"a": 1}'
    # What a client got may be sent back.
    again = [*HELLO, message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "2"}]
    assert client.post("/v1/chat/completions", json=request | {"messages": again}).status_code == 200
    assert (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>2"
        in (client.post("/detokenize", json={"tokens": engine.added[2][0]}).json()["prompt"])
    )


def test_a_function_that_has_to_be_called(serve, tokenizer):
    pytest.importorskip("llguidance")
    client, engine = serve({"texts": ['{"a": 1}']}, max_model_len=4096)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    choice = {"type": "function", "function": {"name": "add"}}
    request = {"messages": HELLO, "tools": [tool], "tool_choice": choice}
    [choice] = client.post("/v1/chat/completions", json=request).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert tokenizer.decode(engine.added[0][0]).endswith("function<｜tool▁sep｜>add\n```json\n")
    assert engine.added[0][1].grammar is not None
    others = {"type": "function", "function": {"name": "sub"}}
    request |= {"tools": [tool, others], "tool_choice": "required"}
    engine.text = "sub\n```json\n{}\n```"
    [choice] = client.post("/v1/chat/completions", json=request).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "sub", "arguments": "{}"}
    assert tokenizer.decode(engine.added[1][0]).endswith("<｜tool▁call▁begin｜>function<｜tool▁sep｜>")


def test_json_is_asked_of_the_engine(serve):
    pytest.importorskip("llguidance")
    client, engine = serve()
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": schema}):
        assert client.post("/v1/chat/completions", json={"messages": HELLO, "response_format": form}).status_code == 200
    assert [params.grammar is not None for _, params, *_ in engine.added] == [True, True]
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    reply = client.post("/v1/chat/completions", json={"messages": HELLO, "response_format": bad})
    assert reply.status_code == 400
    assert "nonsense" in reply.json()["error"]["message"]


def test_extras(serve):
    client, engine = serve()
    request = {"messages": HELLO, "max_tokens": 2, "return_token_ids": True, "return_routing": True, "cache_salt": "s"}
    [choice] = client.post("/v1/chat/completions", json=request).json()["choices"]
    assert len(choice["token_ids"]) == len(choice["routing"]) == 2
    assert engine.added[0][2:] == (":s", True)


def test_small_routes(serve, tokenizer):
    client, _ = serve()
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 512
    assert "version" in client.get("/version").json()
    reply = client.post("/tokenize", json={"prompt": "add"}).json()
    assert reply["tokens"] == [tokenizer.bos_id, *tokenizer.encode("add")]
    assert reply["count"] == len(reply["tokens"])
    assert client.post("/detokenize", json={"tokens": reply["tokens"][1:]}).json() == {"prompt": "add"}
    chat = client.post("/tokenize", json={"messages": HELLO}).json()
    assert tokenizer.decode(chat["tokens"]).endswith("hello<｜Assistant｜>")


def figures(client):
    """The samples of /metrics without labels, buckets and times of creation."""
    found = re.findall(r"^vllm:(\w+)\{[^}]*\} (\S+)$", client.get("/metrics").text, flags=re.MULTILINE)
    return {name: float(value) for name, value in found if not name.endswith(("_bucket", "_created"))}


def test_metrics_have_vllms_names_and_their_times_add_up(serve):
    client, engine = serve({"seconds": 0.02})
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    found = figures(client)
    for name, value in {
        "generation_tokens_total": 3,
        "num_requests_running": 0,
        "request_generation_tokens_sum": 3,
        "request_prompt_tokens_sum": 2,
        "iteration_tokens_total_sum": engine.counts.tokens_read,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 2,
        "request_success_total": 1,
    }.items():
        assert found[name] == value, name
    assert 'finished_reason="length"' in client.get("/metrics").text
    whole, queue, prefill, decode, inference = (
        found[f"{name}_seconds_sum"]
        for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time")
    )  # fmt: skip
    assert (prefill, decode) > (0.015, 0.03)
    assert queue > 0
    assert prefill + decode == pytest.approx(inference)
    assert queue + inference == pytest.approx(whole)
    assert queue + prefill == pytest.approx(found["time_to_first_token_seconds_sum"])


REFUSED = {
    "unknown field": ({"temprature": 1}, "temprature"),
    "n": ({"n": 10**9}, "n"),
    "logprobs": ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    "temperature": ({"temperature": -1}, "temperature"),
    "max_tokens": ({"max_tokens": 10**6}, "more than the 512 tokens"),
    "stop": ({"stop": [""]}, "stop"),
    "many stops": ({"stop": ["a"] * 17}, "stop"),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "content",
    ),
    "prefix": ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "prefix"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "UTF-8"),
    "tool": ({"tool_choice": "required"}, "tool_choice"),
    "schema": ({"response_format": {"type": "json_schema"}}, "json_schema"),
    "long": ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "characters"),
    "tokens": ({"messages": [{"role": "user", "content": "x y" * 400}]}, "tokens"),
    "bias": ({"logit_bias": {"5": 1e6}}, "logit_bias"),
}


@pytest.mark.parametrize(("change", "names"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(change, names, shared):
    client, engine = shared
    content = json.dumps({"messages": HELLO} | change)
    reply = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert names in error["message"]
    assert not engine.added


def nested(levels):
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '"x"',
        "\xff",
        '{"prompt": "\xff"}',
        "NaN",
        nested(100_000),
        '{"prompt": "x", "temperature": NaN}',
        '{"prompt": "x", "seed": 1' + "0" * 5000 + "}",
        '{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": '
        + nested(99)
        + "}}}",
        '{"prompt": [[]]}',
        '{"prompt": [99999999999999999999]}',
        '{"prompt": [511]}',
        '{"prompt": ""  , "add_special_tokens": false}',
        '{"prompt": "x", "\\ud800": 1}',
    ],
)
def test_poison_is_the_clients_fault(content, shared):
    client, _ = shared
    reply = client.post(
        "/v1/completions", content=content.encode("latin-1"), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/health").status_code == 200


POISON = [
    {"n": 10**9},
    {"n": 64},
    {"max_tokens": 2**31 - 1},
    {"prompt": "a" * 10_000_000},
    {"prompt": [1] * 1_000_000},
    {"stop": ["a" * 257]},
    *(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        for schema in (
            {"type": "nonsense"},
            {"type": "string", "pattern": "("},
            {"$ref": "#/nowhere"},
            json.loads('{"not":' * 40 + "{}" + "}" * 40),
            {"enum": ["x" * 70_000]},
            {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwxyz"]},
        )
    ),
]


def test_poison_fails_alone(serve):
    """While an answer streams: each is refused with its reason, within its time, and the answer is whole."""
    pytest.importorskip("llguidance")
    client, engine = serve({"seconds": 0.015, "text": TEXT * 6}, max_body_bytes=2**24, prepare_seconds=3.0)
    request = {"prompt": "a", "max_tokens": 300}
    with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        for change in POISON:
            reply = client.post("/v1/completions", json=request | change)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error"), str(change)[
                :99
            ]
        pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert len(engine.added) == 1
    assert pieces[-1]["finish_reason"] in ("stop", "length")


def test_ten_megabytes_are_refused_before_they_are_read_to_the_end(serve):
    client, engine = serve()
    reply = client.post("/v1/completions", json={"prompt": "a" * 10_000_000})
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "invalid_request_error")
    assert not engine.added


def test_what_is_cached_is_counted_once_a_prompt(serve):
    client, engine = serve()
    advance = engine.advance
    engine.advance = lambda name, each: replace(advance(name, each), num_cached_tokens=100 * each.index + 1)
    usage = client.post("/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_cache_hit_tokens"] == 1


def test_other_errors_have_the_same_shape(serve):
    client, _ = serve()
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405
    reply = client.post("/v1/completions", json={"prompt": "x", "model": "other"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_aborts(stream, serve):
    """vllm#9428: in both modes."""
    client, engine = serve({"seconds": 0.02, "text": TEXT * 5})
    request = {"prompt": "a", "max_tokens": 400, "stream": stream}
    if stream:
        with client.stream("POST", "/v1/completions", json=request) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(Exception, match="timed out"):
            client.post("/v1/completions", json=request, timeout=0.3)
    wait_for(lambda: engine.aborted and not engine.open, seconds=1)
    wait_for(lambda: figures(client)["num_requests_running"] == 0, seconds=1)


def test_overload_is_refused_and_passes(serve):
    client, engine = serve({"seconds": 0.02, "text": TEXT * 5}, capacity=2)
    request = {"prompt": "a", "max_tokens": 400, "n": 2}
    with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        refused = client.post("/v1/completions", json=request)
        assert (refused.status_code, refused.headers.get("retry-after")) == (429, "1")
    wait_for(lambda: not engine.open)
    wait_for(lambda: client.post("/v1/completions", json=request | {"max_tokens": 1}).status_code == 200)
    assert client.post("/v1/completions", json=request | {"n": 3}).status_code == 400
    assert "admission_rejections_total" in client.get("/metrics").text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_answers_everyone(serve):
    client, engine = serve({"seconds": 0.02, "text": TEXT * 5})
    request = {"prompt": "a", "max_tokens": 400}
    with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        engine.crash = True
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert client.get("/health").status_code == 503
    refused = client.post("/v1/completions", json=request)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_before_the_first_byte(serve):
    client, _ = serve({"crash": True})
    reply = client.post("/v1/completions", json={"prompt": "a"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")


def test_one_request_that_the_engine_gives_up(serve):
    client, engine = serve({"give_up": True})
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 500
    engine.give_up = False
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200


def test_a_silent_stream_is_kept_alive(serve):
    client, _ = serve({"seconds": 0.2}, keep_alive_seconds=0.05)
    response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    assert ": keep-alive\n\n" in response.text
    assert response.text.endswith("data: [DONE]\n\n")
