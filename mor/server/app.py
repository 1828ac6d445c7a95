"""The HTTP interface: paths, and what each answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

import mor
from mor.server import errors
from mor.server.choices import Form, compact
from mor.server.connection import EventStream, WithTransport, before, unless_gone
from mor.server.engine_thread import Job
from mor.server.errors import ApiError, ErrorBody
from mor.server.gate import Gate
from mor.server.protocol import (
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    warning_header,
)
from mor.server.service import Service

CLIENT_LEFT = 499
"""As nginx has it; nobody reads it."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be honoured"},
    "5XX": {"model": ErrorBody, "description": "The server cannot honour it now"},
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with stream: true its events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def make_app(service: Service) -> ASGIApp:
    """The application, whose engine starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        service.structures.close()
        await service.thread.stop()

    app = FastAPI(
        title="mor",
        version=mor.__version__,
        description="Mixture-of-Recursions models behind OpenAI's API",
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=_ERRORS,
    )
    app.add_exception_handler(ApiError, errors.answer_api_error)
    app.add_exception_handler(HTTPException, errors.answer_http_error)
    app.add_exception_handler(RequestValidationError, errors.answer_invalid)
    app.add_exception_handler(Exception, errors.answer_unforeseen)
    _add_answers(app, service)
    _add_facts(app, service)
    _add_page(app)
    config = service.config
    app.add_middleware(
        Gate,
        keys=config.keys,
        max_body_bytes=config.max_body_bytes,
        read_timeout_s=config.read_timeout_s,
    )
    if config.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "Warning"],
        )
    return WithTransport(app)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        return await _answer(service, request, body, *await service.completion(body))

    @app.post("/v1/chat/completions", responses=_EVENTS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(service, request, body, *await service.chat(body))


async def _answer(
    service: Service, request: Request, body: Common, jobs: Sequence[Job], form: Form
) -> Response:
    config, headers = service.config, warning_header(body)
    answer = await service.thread.submit(jobs, streamed=bool(body.stream))
    if body.stream:
        return EventStream(
            form,
            answer,
            headers=headers,
            timeout_s=config.request_timeout_s,
            write_timeout_s=config.write_timeout_s,
        )
    with answer:
        wait = before(config.request_timeout_s, answer.finished())
        requests = await unless_gone(request, wait)
    if requests is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(compact(form.whole(requests)), media_type="application/json", headers=headers)


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        """One model."""
        service.check_model(name)
        return JSONResponse(service.card())

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> JSONResponse:
        """Token ids of a text, or of a conversation with its template."""
        return JSONResponse(await service.tokenize(body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> JSONResponse:
        """Text of token ids."""
        return JSONResponse(await service.detokenize(body))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken; 503 before the model is loaded and after the end."""
        service.thread.check_open()
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> JSONResponse:
        """Of mor."""
        return JSONResponse({"version": mor.__version__})

    @app.get("/stats")
    async def stats() -> JSONResponse:
        """What the engine does, for pages that show it."""
        return JSONResponse(service.stats())

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    """The playground, whose files lie in two folders."""
    folders = [files("mor.server") / "page", files("mor") / "page"]
    parts = {part.name: part for folder in folders for part in folder.iterdir()}

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return file("playground.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return file(name)

    def file(name: str) -> Response:
        kind = PAGE_TYPES.get(name[name.rfind(".") :])
        if kind is None or name not in parts:
            raise HTTPException(404)
        return Response(parts[name].read_bytes(), media_type=kind)
