"""Many clients at once, a third of whom leave at random: nobody is lost, nothing leaks, health answers."""

import asyncio
import json
import os
import random
import re
import time
from pathlib import Path

import pytest

CLIENTS = 200
SECONDS = float(os.environ.get("DSV3_LOAD_SECONDS", "300"))
FLAT = 1.15
"""How much the server's memory may grow from a sixth of the time on."""


def resident(process):
    """Bytes of a process in memory."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


async def ask(client, rng, counts):
    """One streamed request: complete, refused, or left in the middle."""
    request = {
        "prompt": "def " * rng.randint(1, 9),
        "max_tokens": rng.randint(1, 48),
        "stream": True,
        "ignore_eos": True,
    }
    leave_after = rng.randint(0, 20) if rng.random() < 1 / 3 else None
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            counts["refused"] += 1
            return await asyncio.sleep(1)
        assert response.status_code == 200, await response.aread()
        seen, last = 0, ""
        async for line in response.aiter_lines():
            if leave_after is not None and seen >= leave_after:
                counts["left"] += 1
                return
            seen, last = seen + line.startswith("data: {"), line or last
            assert "error" not in line
        assert last == "data: [DONE]"
        counts["complete"] += 1


async def health(base_url):
    """Seconds to an answer, by a program of its own: this one is busy with its clients."""
    command = ("curl", "-sf", "-o", "/dev/null", "-w", "%{time_total}", f"{base_url}/health")
    curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    seconds, _ = await curl.communicate()
    assert curl.returncode == 0
    return float(seconds)


async def load(base_url, process):
    import httpx

    counts = {"complete": 0, "left": 0, "refused": 0}
    slowest, memory, end = 0.0, [], time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=CLIENTS + 1)
    async with httpx.AsyncClient(base_url=base_url, timeout=120, limits=limits) as client:

        async def one(seed):
            rng = random.Random(seed)
            while time.monotonic() < end:
                await ask(client, rng, counts)

        async with asyncio.TaskGroup() as group:
            for seed in range(CLIENTS):
                group.create_task(one(seed))
            while time.monotonic() < end:
                slowest = max(slowest, await health(base_url))
                memory.append(resident(process))
                await asyncio.sleep(1)
    return counts, slowest, memory


@pytest.mark.prove
@pytest.mark.long
@pytest.mark.timeout(900)
def test_load(start):
    process, client = start("--max-num-seqs", "64", "--max-waiting", "100", "--num-speculative-tokens", "1")
    try:
        counts, slowest, memory = asyncio.run(load(str(client.base_url), process))
    except ExceptionGroup as error:
        process.terminate()
        raise AssertionError(process.communicate()[1][-5000:]) from error
    print(json.dumps({**counts, "slowest health": slowest, "memory": [memory[len(memory) // 6], memory[-1]]}))
    assert counts["complete"] > CLIENTS
    assert counts["left"] > CLIENTS / 4
    assert slowest < 1
    assert memory[-1] < FLAT * memory[len(memory) // 6]
    end = time.monotonic() + 5
    while True:
        text = client.get("/metrics").text
        left = [float(re.search(rf"^vllm:{name}\{{.*\}} (.*)$", text, re.MULTILINE)[1])
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]  # fmt: skip
        if not any(left):
            return
        assert time.monotonic() < end, left
        time.sleep(0.1)
