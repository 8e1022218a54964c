import contextlib
import socket
import threading
import time

import pytest

from dsv3.data.tokenizer import train_tokenizer
from dsv3.serving.settings import Settings
from tests.serving.fake_engine import TEXT, FakeEngine


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
        httpx.Client(base_url=url, timeout=20) as client,
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
