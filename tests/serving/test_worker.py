"""How results reach the streams: together, and none late or lost."""

import asyncio

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")

from dsv3.inference.engine import Delta
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import TokenLogprobs
from dsv3.serving import worker as module
from dsv3.serving.metrics import Metrics
from dsv3.serving.worker import Stream, Worker, joined
from tests.serving.fake_engine import FakeEngine


def delta(text, *tokens, index=0, **other):
    return Delta("a-0", index, text, list(tokens), **other)


def test_deltas_of_a_continuation_are_joined():
    logprobs = [TokenLogprobs(token, -1.0, 1, {}) for token in (1, 2, 3)]
    first = delta("a", 1, logprobs=logprobs[:1], prompt_logprobs=[None], routing=[[[0]]], num_cached_tokens=5)
    second = delta("bc", 2, 3, logprobs=logprobs[1:], routing=[[[1]], [[2]]], finish_reason="stop", stop_reason="x")
    both = joined(first, second)
    assert (both.text, both.token_ids, both.logprobs, both.routing) == (
        "abc",
        [1, 2, 3],
        logprobs,
        [[[0]], [[1]], [[2]]],
    )
    assert (both.finish_reason, both.stop_reason, both.prompt_logprobs) == ("stop", "x", [None])
    assert joined(delta("a", 1), delta("b", 2)).logprobs is None


def test_a_stream_gives_what_came_since_it_was_asked_last():
    async def run():
        stream = Stream("a", 2)
        stream.ids = {"a-0": 0}
        for each in (
            delta("x", 1),
            delta("u", 7, index=1),
            delta("y", 2),
            delta("v", 8, index=1, finish_reason="stop"),
        ):
            stream.put(each)
        found = await stream.next()
        assert [(number, each.index, each.text) for number, each in found] == [(0, 0, "xy"), (0, 1, "uv")]
        stream.put(delta("z", 3, finish_reason="length"))
        assert [each.text for _, each in await stream.next()] == ["z"]
        assert await stream.next() == []

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_results_come_together_while_many_are_open(tokenizer, monkeypatch, seconds):
    monkeypatch.setattr(module, "DELIVERY_SECONDS", seconds)

    async def run():
        engine = FakeEngine(tokenizer, seconds=0.002)
        worker = Worker(engine, 8, Metrics("tiny", engine.stats()))
        worker.start()
        pieces = list[str]()
        with worker.open("a", 1) as stream:
            await worker.submit(stream, [[1]], SamplingParams(max_tokens=64), "", False)
            while deltas := await stream.next():
                pieces.extend(each.text for _, each in deltas)
        await worker.stop()
        return pieces

    pieces = asyncio.run(run())
    assert "".join(pieces) == FakeEngine(tokenizer).text[: len("".join(pieces))] != ""
    steps = len(tokenizer.encode(FakeEngine(tokenizer).text, specials=True)[:64])
    assert len(pieces) <= steps / 4 if seconds else len(pieces) > steps / 8
