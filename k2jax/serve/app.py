"""The Starlette application: paths, and what becomes of a request that fails."""

import asyncio
import functools
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from k2jax.config import ConfigError, nearest
from k2jax.inference.request import QueueFull
from k2jax.serve import guard, prometheus, tokens
from k2jax.serve.ask import Ask
from k2jax.serve.body import parse_object
from k2jax.serve.chat_request import read_chat
from k2jax.serve.completion_request import read_completion
from k2jax.serve.refusal import Refusal, from_mistake, internal_error, too_busy
from k2jax.serve.response import Answer, answer_chat, answer_completion, write_json
from k2jax.serve.running import Bridge, Running
from k2jax.serve.service import Service

GONE = 499  # nginx's word for a client that left
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """The application.

    Args:
        service: the model and its rules.
    """
    api = _Api(service)
    routes: list[tuple[str, Endpoint, str]] = [
        ("/", api.page, "GET"),
        ("/health", api.health, "GET"),
        ("/metrics", api.metrics, "GET"),
        ("/v1/models", api.models, "GET"),
        ("/v1/models/{name:path}", api.model, "GET"),
        ("/v1/chat/completions", api.chat, "POST"),
        ("/v1/completions", api.completion, "POST"),
        ("/tokenize", api.tokenize, "POST"),
        ("/detokenize", api.detokenize, "POST"),
        ("/tokenizer_info", api.tokenizer_info, "GET"),
    ]
    paths = [path for path, _, _ in routes]

    async def answer_no_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 405:
            verbs = (error.headers or {}).get("Allow", "another method")
            message, code = f"{path} takes {verbs}, not {request.method}", "method_not_allowed"
        else:
            message, code = f"there is no {path!r}; {nearest(path, paths)}", "not_found"
        refusal = Refusal(message, status=error.status_code, code=code)
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    app = Starlette(
        routes=[Route(p, api.guarded(p, call), methods=[verb]) for p, call, verb in routes],
        exception_handlers={HTTPException: answer_no_path},
    )
    app.router.redirect_slashes = False
    return app


class _Api:
    """Answers each path."""

    def __init__(self, service: Service):
        self._service = service
        self._bridge: Bridge | None = None
        self._page = resources.files("k2jax.serve").joinpath("page.html").read_bytes()

    def guarded(self, path: str, call: Endpoint) -> Endpoint:
        """Wrap an endpoint: who may ask, errors in the API's form, counts and the log."""

        @functools.wraps(call)
        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            try:
                guard.check_origin(request.headers, self._service.hosts)
                if path not in guard.OPEN:
                    guard.check_key(request.headers, self._service.keys)
                response = await call(request)
            except Exception as error:
                refusal = self._to_refusal(error)
                response = JSONResponse(refusal.body(), refusal.status, refusal.headers)
            self._service.meters.count_response(path, response.status_code)
            if path not in (*guard.OPEN, "/metrics"):
                seconds = time.perf_counter() - began
                line = f"{request.method} {path} {response.status_code} {seconds:.3f} s"
                self._service.write_log(line)
            return response

        return answer

    def _to_refusal(self, error: Exception) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, ConfigError):
            return from_mistake(str(error))
        if isinstance(error, QueueFull):
            return too_busy("the queue is full; try again later")
        if isinstance(error, ClientDisconnect):
            return Refusal("the client left", status=GONE)
        # Where, not what: the message of an exception may have a prompt in it.
        place = traceback.extract_tb(error.__traceback__)[-1]
        self._service.write_log(f"{type(error).__name__} in {place.filename}:{place.lineno}")
        return internal_error()

    async def page(self, request: Request) -> Response:
        """The page to chat; nothing in it comes from elsewhere, and no other page may frame it."""
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
            " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
            " frame-ancestors 'none'"
        )
        headers = {
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        return Response(self._page, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, then 503."""
        broken = self._service.engine.error
        status = "failed" if broken else "draining" if self._service.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """What the engine and the server count."""
        text = self._service.meters.render(self._service.engine.stats())
        return PlainTextResponse(text, headers={"content-type": prometheus.CONTENT_TYPE})

    def _describe_model(self) -> dict[str, Any]:
        card = self._service.card
        return {
            "id": card.names[0],
            "object": "model",
            "created": self._service.started,
            "owned_by": "k2jax",
            "root": card.names[-1],
            "max_model_len": card.context,
        }

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        self._service.card.check_name(request.path_params["name"])
        return JSONResponse(self._describe_model())

    async def tokenize(self, request: Request) -> Response:
        """Text or a conversation to ids."""
        content = await self._read(request, tokens.tokenize)
        return JSONResponse(content)

    async def detokenize(self, request: Request) -> Response:
        """Ids to text."""
        return JSONResponse(await self._read(request, tokens.detokenize))

    async def tokenizer_info(self, request: Request) -> Response:
        """Special tokens and the template."""
        return JSONResponse(tokens.describe_tokenizer(self._service.card))

    async def _read(self, request: Request, reader: Callable[..., dict[str, Any]]) -> Any:
        content = await self.read_body(request)
        return await asyncio.to_thread(lambda: reader(parse_object(content), self._service.card))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, read_chat, answer_chat)

    async def completion(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answer(request, read_completion, answer_completion)

    async def _answer(
        self, request: Request, read: Callable[..., Ask], begin: Callable[..., Answer[Any]]
    ) -> Response:
        if self._service.draining:
            raise too_busy("the server ends", 503)
        content = await self.read_body(request)
        if self._bridge is None:
            self._bridge = Bridge(asyncio.get_running_loop())
        # Parsing, templates, tokenising and schemas take time that other streams should not feel.
        ask = await asyncio.to_thread(lambda: read(parse_object(content), self._service))
        self._log_text("request", content)
        answer = begin(ask, self._service.card)
        running = Running(self._service, self._bridge, ask.requests)
        try:
            await asyncio.to_thread(running.submit)
        except ConfigError as error:
            raise from_mistake(str(error), "max_tokens") from None
        if ask.streaming.on:
            stream = answer.stream(running, self._service.limits.keepalive_seconds)
            return EventStream(stream, running, self._service)
        watch = asyncio.ensure_future(_watch(request.receive, running))
        try:
            whole = await answer.collect(running, self._service.limits.keepalive_seconds)
        finally:
            watch.cancel()
            running.close()
        if running.gone:
            raise ClientDisconnect
        text = write_json(whole).encode()
        self._log_text("answer", text)
        return Response(text, media_type="application/json")

    def _log_text(self, name: str, content: bytes) -> None:
        if self._service.log_texts:
            self._service.write_log(f"{name}: {content.decode(errors='replace')}")

    async def read_body(self, request: Request) -> bytes:
        """The body of a request, if it is small enough and comes in time.

        Raises:
            Refusal: it is not, or is of another type than JSON.
        """
        limits = self._service.limits
        kind = request.headers.get("content-type", "application/json").partition(";")[0]
        if kind.strip().lower() != "application/json":
            raise Refusal(f"the body is {kind!r}; it must be application/json", status=415)
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise Refusal(f"the body is coded as {coding!r}; send it plain", status=415)
        length = request.headers.get("content-length", "0")
        chunks, size = [], int(length) if length.isdigit() else 0
        too_large = Refusal(f"the body has more than {limits.body} bytes", status=413)
        if size > limits.body:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limits.body:
                        raise too_large
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal("the body did not come in time", status=408) from None
        return b"".join(chunks)


async def _watch(receive: Receive, running: Running) -> None:
    """End the sequences of a request when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    running.leave()


class EventStream(Response):
    """Server-sent events. A client that leaves, or takes nothing for long, ends its sequences."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], running: Running, service: Service):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._running, self._service = events, running, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        watch = asyncio.ensure_future(_watch(receive, self._running))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for event in self._events:
                if self._service.log_texts:
                    self._service.write_log(f"event: {event.strip()}")
                await self._send(send, _body(event.encode(), more=True))
            await self._send(send, _body(b"", more=False))
        except (TimeoutError, OSError):
            self._running.leave()
        finally:
            watch.cancel()
            self._running.close()

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._service.limits.stalled_seconds):
            await send(message)


def _body(content: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
