"""What the server takes beside the model: many streams at once, against the engine without a server, and the model's passes alone
(`dsv3 bench decode --checkpoint RUN --streams 128`)."""

import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dsv3.bench.measure import Progress, Ratio, Result, Row, Spread, take_turns
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import RunError
from dsv3.inference.batch import lay_out
from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.params import SamplingParams
from dsv3.model.device import pick_device
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.latent_pages import PAGE
from dsv3.stages.machine import machine
from dsv3.weights.opening import load_model

TARGET = 1 / 1.05
"""The server's speed over that of the passes: all else takes 5% of a pass at most."""
PROMPT = 32
"""Random tokens of each prompt."""
SETTLED = 16
"""Tokens of every answer that are not timed without the server, at its beginning and at its end."""
PASSES = 50
START_SECONDS = 300.0
STEPS = re.compile(rb"^vllm:iteration_tokens_total_count\{.*\} (\S+)$", re.MULTILINE)
PIECE = b"data: {"


def bench_streams(
    path: Path, streams: int = 128, tokens: int = 256, *, device: str = "auto", progress: Progress = lambda **_: None
) -> Result:
    """So many greedy answers of `tokens` tokens at once, to prompts of random tokens, so that a step reads a token of each.

    In BF16 on a GPU, in the checkpoint's own dtype on a CPU. Raises `RunError` where the server does not start, or refuses.
    """
    where = pick_device(device)
    dtype = "bf16" if where.type == "cuda" else "auto"
    model, directory = load_model(path, dtype=dtype, device=where)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (streams, PROMPT), generator=generator).tolist()
    seconds = without_server(model, Tokenizer.load(directory), prompts, tokens)
    del model
    progress(stage="streams", done=1, total=2)
    with serving(path, streams, dtype, where.type) as port:
        seconds["server"] = asyncio.run(with_server(port, prompts, tokens))
    progress(stage="streams", done=2, total=2)
    milliseconds = {name: 1000 * each for name, each in seconds.items()}
    alone = milliseconds["passes alone"]
    rows = []
    for name, each in milliseconds.items():
        figures = {"ms a step": each, "beside passes": each - alone}
        rows.append(Row(name, f"{streams} streams", Spread.of([1000 * streams / each]), figures))
    ratios = [Ratio("a step", "server", "passes alone", Spread.of([alone / milliseconds["server"]]), TARGET)]
    shapes = {"checkpoint": str(path), "streams": streams, "prompt": PROMPT, "new tokens": tokens, "dtype": dtype}
    return Result("streams", shapes, rows, ratios, {}, machine(where))


def without_server(
    model: DeepSeekV3, tokenizer: Tokenizer, prompts: Sequence[list[int]], tokens: int
) -> dict[str, float]:
    """Seconds of the model's pass over the batch halfway through the answers, argmax included; and of the engine's steps before
    it, on average."""
    blocks = len(prompts) * -(-(PROMPT + tokens) // PAGE)
    engine = Engine(model, tokenizer, EngineConfig(blocks, max_num_seqs=len(prompts), prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params)
    while min(request.generated for [request] in engine.requests.values()) < SETTLED:
        engine.step()
    started, count = time.perf_counter(), (tokens - 2 * SETTLED) // 2
    for _ in range(count):
        engine.step()
    steps = (time.perf_counter() - started) / count
    plan = engine.scheduler.plan()
    assert plan is not None
    batch = lay_out(plan.works, model.config, model.lm_head.weight.device)
    row_N = torch.arange(len(prompts), device=model.lm_head.weight.device)

    @torch.inference_mode()
    def once() -> None:
        engine.runner.passes.main(batch, row_N)[1].argmax(-1).tolist()

    return {"passes alone": statistics.median(take_turns({"pass": once}, PASSES)["pass"]), "engine": steps}


@contextmanager
def serving(path: Path, streams: int, dtype: str, device: str) -> Iterator[int]:
    """`dsv3 serve` in a process of its own: its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = ["--max-num-seqs", str(streams), "--cache-gib", "2", "--dtype", dtype, "--device", device]
    command = [sys.executable, "-m", "dsv3", "serve", str(path), "--port", str(port), "--drain-seconds", "0", *sizes]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RunError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


async def with_server(port: int, prompts: Sequence[list[int]], tokens: int) -> float:
    """Mean seconds of the server's steps, from when every stream has begun until one has ended."""
    pieces = [0] * len(prompts)
    clients = [asyncio.create_task(stream(port, prompt, tokens, pieces, i)) for i, prompt in enumerate(prompts)]
    marks: list[tuple[float, float]] = []
    try:
        while len(marks) < 2:
            await asyncio.sleep(0.001)
            ended = [client for client in clients if client.done()]
            for client in ended:
                client.result()
            if ended and not marks:
                raise RunError("an answer was at its end before others had begun: give --tokens more")
            if ended if marks else all(pieces):
                marks.append((time.perf_counter(), await asyncio.to_thread(steps_made, port)))
        await asyncio.gather(*clients)
    finally:
        for client in clients:
            client.cancel()
    (begun, before), (end, after) = marks
    return (end - begun) / (after - before)


async def stream(port: int, prompt: list[int], tokens: int, pieces: list[int], place: int) -> None:
    """One client: counts the pieces of its answer."""
    body = json.dumps(
        {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RunError(f"the server answered {status.decode().strip()}: {(await reader.read()).decode()}")
    rest = b""
    while read := await reader.read(1 << 16):
        rest += read
        pieces[place] += rest.count(PIECE)
        # A piece that is cut in two is counted with its second half.
        rest = rest[-len(PIECE) + 1 :]
    writer.close()


def steps_made(port: int) -> float:
    """Of the engine, so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        found = STEPS.search(answer.read())
    if found is None:
        raise RunError("the server's /metrics count no steps")
    return float(found[1])
