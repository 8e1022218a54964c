"""The routes."""

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from dsv3 import __version__
from dsv3.data.chat import ChatTemplate
from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.engine import Engine
from dsv3.serving.errors import add_handlers
from dsv3.serving.guard import Guard
from dsv3.serving.metrics import Metrics
from dsv3.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dsv3.serving.service import Service
from dsv3.serving.settings import Settings
from dsv3.serving.worker import Worker


def make_app(engine: Engine, tokenizer: Tokenizer, directory: Path, vocab_size: int, settings: Settings) -> FastAPI:
    """The server of an engine, whose thread lives as long as the app; `directory` has the chat template."""
    metrics = Metrics(settings.name, engine.stats())
    worker = Worker(engine, settings.capacity, metrics)
    service = Service(worker, tokenizer, ChatTemplate.load(directory, tokenizer), vocab_size, settings)
    page, policy = chat_page()
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    # FastAPI's documentation pages would load scripts from elsewhere.
    app = FastAPI(title="dsv3", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    add_handlers(app)
    app.add_middleware(Guard, settings=settings)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request.scope["tenant"])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request.scope["tenant"])

    def card() -> dict[str, Any]:
        return {
            "id": settings.name,
            "object": "model",
            "created": started,
            "owned_by": "dsv3",
            "max_model_len": settings.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        ids = await service.tokenize(body)
        return {"count": len(ids), "max_model_len": settings.max_model_len, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        return {"prompt": await service.detokenize(body.tokens)}

    @app.get("/health")
    async def health() -> Response:
        worker.check_alive()
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=policy)

    return app


def chat_page() -> tuple[str, dict[str, str]]:
    """The chat page, and headers that allow only its own script and style, and nothing from elsewhere."""
    page = files("dsv3.serving").joinpath("page.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inline]
        return " ".join(f"'sha256-{each}'" for each in hashes)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
