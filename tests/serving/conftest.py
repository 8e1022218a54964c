import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3.data.tokenizer import train_tokenizer
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.serving.settings import Settings
from dsv3.weights.huggingface import save_pretrained
from tests.serving.fake_engine import TEXT, FakeEngine

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT] * 20, 400)


@contextlib.contextmanager
def running(app):
    """A server of this app in a thread: its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http="h11"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def server(tokenizer, directory, engine=None, **options):
    """(client, engine) of a server around a fake engine. Options are the engine's and the settings'."""
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    import httpx

    from dsv3.serving.app import make_app

    made = FakeEngine(tokenizer, **(engine or {}))
    settings = Settings(**{"name": "tiny", "max_model_len": 512, "capacity": 8} | options)
    with (
        running(make_app(made, tokenizer, directory, 512, settings)) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client, made


@pytest.fixture
def serve(tokenizer, tmp_path):
    """Starts servers: `serve(engine options, **settings)`."""
    with contextlib.ExitStack() as stack:

        def start(engine=None, **options):
            return stack.enter_context(server(tokenizer, tmp_path, engine, **options))

        yield start


@pytest.fixture(scope="session")
def shared(tokenizer, tmp_path_factory):
    """One server for requests that leave nothing behind."""
    with server(tokenizer, tmp_path_factory.mktemp("served")) as both:
        yield both


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A network of random weights as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("random")
    config = ModelConfig.preset("debug", max_position_embeddings=512)
    save_pretrained(DeepSeekV3(config).initialize("fan_in", seed=1), directory)
    train_tokenizer([TEXT] * 20, 320).save(directory)
    return directory


@pytest.fixture(scope="module")
def start(directory):
    """Starts `dsv3 serve` with options: (process, client)."""
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    import httpx

    processes = []

    def run(*options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "dsv3",
            "serve",
            str(directory),
            "--port",
            str(port),
            "--device",
            "cpu",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), *sys.path]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        end = time.monotonic() + 180
        while True:
            try:
                client.get("/health")
                return process, client
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.1)

    yield run
    for process in processes:
        process.kill()
        process.communicate()
