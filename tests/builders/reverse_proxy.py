"""A reverse proxy that serves a server below a path, as nginx does with ``proxy_pass``."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount


@contextmanager
def proxying(port: int, path: str, target: str) -> Iterator[None]:
    """Inside, http://127.0.0.1:PORT/PATH/x is answered by ``target`` for /x, which sees its own address as Host."""
    client = httpx.AsyncClient(base_url=target, timeout=60)

    async def forward(scope: dict, receive: object, send: object) -> None:  # type: ignore[type-arg]
        request = Request(scope, receive)  # type: ignore[arg-type]
        headers = [(name, value) for name, value in request.headers.items() if name != "host"]
        rest = request.url.path.removeprefix(path) + (f"?{request.url.query}" if request.url.query else "")
        sent = client.build_request(request.method, rest, headers=headers, content=await request.body())
        answer = await client.send(sent, stream=True)
        response: Response = StreamingResponse(
            answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose)
        )
        response.raw_headers = answer.headers.raw
        await response(scope, receive, send)  # type: ignore[arg-type]

    @asynccontextmanager
    async def closing(app: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = Starlette(routes=[Mount(path, forward)], lifespan=closing)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join(10)
