import asyncio
import hashlib
import hmac
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
from starlette.datastructures import Headers

from dsv3.serving.guard import Guard
from dsv3.serving.settings import Settings

KEYED = [
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("GET", "/openapi.json"),
]
KEYED += [("GET", "/version"), ("POST", "/detokenize"), ("GET", "/nowhere"), ("POST", "/v1/chat/completions")]


@pytest.fixture
def locked(serve):
    return serve(
        api_keys=("first", "secönd"), max_body_bytes=10_000, body_seconds=0.3, hosts=("127.0.0.1", "localhost")
    )


def test_every_route_but_two_asks_for_a_key(locked):
    client, engine = locked
    assert client.get("/health").status_code == client.get("/").status_code == 200
    for method, path in KEYED:
        for header in (None, "Bearer third", "Basic first", "Bearer firstsecond"):
            reply = client.request(method, path, headers={"authorization": header} if header else {})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), (path, header)
            assert reply.headers["www-authenticate"] == "Bearer"
    assert not engine.added


def test_keys_are_tenants(locked):
    client, engine = locked
    for key in ("first", "secönd", "first"):
        headers = {"authorization": f"Bearer {key}".encode()}
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers).status_code == 200
    salts = [salt for _, _, salt, _ in engine.added]
    assert salts[0] == salts[2] != salts[1]
    assert "first" not in "".join(salts)


def test_long_bodies_are_refused_unread(locked):
    client, engine = locked
    headers = {"authorization": "Bearer first"}
    assert client.post("/v1/completions", json={"prompt": "a" * 20_000}, headers=headers).status_code == 413
    pieces = (b'{"prompt": "' if i == 0 else b"a" * 1000 for i in range(30))
    reply = client.post("/v1/completions", content=pieces, headers=headers | {"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "invalid_request_error")
    assert not engine.added


def test_a_body_that_does_not_come(locked):
    client, _ = locked
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as raw:
        raw.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first\r\nContent-Length: 10\r\n\r\n{"
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_headers_have_a_limit(locked):
    client, _ = locked
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000)
        assert raw.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert client.get("/health").status_code == 200


def test_foreign_names_reach_nothing(locked):
    """A page elsewhere that has its own name point here (DNS rebinding)."""
    client, _ = locked
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"host": "localhost:8000"}).status_code == 200


def test_a_form_of_another_page_is_no_request(serve):
    """A page elsewhere may send text without asking; JSON it may not."""
    client, engine = serve()
    reply = client.post("/v1/completions", content='{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert not engine.added


def test_every_known_key_is_compared_in_constant_time(locked, monkeypatch):
    """By digests of one length, also behind one that is right, so that no answer comes earlier than another."""
    client, _ = locked
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    for key in ("first", "secönd", "wrong"):
        compared.clear()
        client.get("/version", headers={"authorization": f"Bearer {key}".encode("latin-1")})
        given = hashlib.sha256(key.encode("latin-1")).digest()
        assert compared == [(given, hashlib.sha256(known.encode()).digest()) for known in ("first", "secönd")]


def test_a_body_in_many_pieces_is_read_in_linear_time():
    guard = Guard(None, Settings(name="tiny", max_model_len=8))
    messages = iter([*([{"type": "http.request", "body": b"a", "more_body": True}] * 50_000), {"type": "http.request"}])

    async def receive():
        return next(messages)

    began = time.process_time()
    assert asyncio.run(guard._body(Headers(), receive)) == b"a" * 50_000
    assert time.process_time() - began < 2
