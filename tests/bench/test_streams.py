import asyncio

import pytest

from dsv3.bench import streams
from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import RunError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.huggingface import save_pretrained

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    config = ModelConfig.preset("debug", max_position_embeddings=256)
    save_pretrained(DeepSeekV3(config).initialize("fan_in", seed=1), directory)
    train_tokenizer(["def add(first, second):\n    return first + second\n"] * 20, 320).save(directory)
    return directory


def test_passes_the_engine_and_the_server_are_timed(directory):
    result = streams.bench_streams(directory, 4, 100, device="cpu")
    assert [row.name for row in result.rows] == ["passes alone", "engine", "server"]
    steps = [row.figures["ms a step"] for row in result.rows]
    assert 0 < steps[0] < steps[1]
    for row, step in zip(result.rows, steps, strict=True):
        assert row.tokens_per_second.median == pytest.approx(4000 / step)
        assert row.figures["beside passes"] == pytest.approx(step - steps[0])
    assert result.ratios[0].value.median == pytest.approx(steps[0] / steps[2])
    assert result.ratios[0].target == pytest.approx(0.952, abs=1e-3)


def test_a_server_that_does_not_start_or_refuses_is_an_error(directory, tmp_path):
    with pytest.raises(RunError, match="did not start"), streams.serving(tmp_path, 1, "auto", "cpu"):
        pass
    with streams.serving(directory, 1, "auto", "cpu") as port, pytest.raises(RunError, match="400 Bad Request"):
        asyncio.run(streams.with_server(port, [[400]], 100))


def test_pieces_count_wherever_they_are_cut():
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + b'data: {"a": 1}\n\n' * 5 + b"data: [DONE]\n\n"
    for size in (1, 7, 20, len(answer)):

        async def client(size=size):
            async def serve(reader, writer):
                await reader.readuntil(b"}")
                for start in range(0, len(answer), size):
                    writer.write(answer[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0)
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            async with server:
                pieces = [0]
                await streams.stream(server.sockets[0].getsockname()[1], [1], 5, pieces, 0)
            return pieces

        assert asyncio.run(client()) == [5]
