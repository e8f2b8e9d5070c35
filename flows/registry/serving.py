"""HTTP server of a model, ``darkroom model serve``: MLflow's scoring protocol within limits.

``mlflow models serve`` reads and parses bodies of any size, goes on when the client left, and ends when the last
request does. Here a body is measured before it is parsed, a generation ends with its client, its deadline or the
server, and nothing but weights is read from the registry.
"""

import asyncio
import base64
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Annotated, Any, Self

import uvicorn
from mlflow.client import MlflowClient
from mlflow.version import VERSION
from pydantic import Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError, describe_validation_error
from diffusion.generation.limits import Budget, BusyError, StoppedError
from flows.config import Params
from flows.local_stack.http_protocol import BoundedProtocol
from flows.local_stack.same_origin import refusal
from flows.registry.model_versions import cached_weights, resolve
from flows.registry.pyfunc_model import MAX_TABLE_IMAGES, ServedModel, to_mlflow_error
from flows.registry.takedown_marks import warn_of_takedown

MAX_SEPARATORS = 2**17
"""Maximum commas and line ends of a body: each may become a value of some hundred bytes."""
TRANSFER_SECONDS = 30
"""Time for a client to send its request, and again to read the answer."""
GRACE_SECONDS = 1
"""Time for answers to be sent when the server ends."""

JSON = "application/json"
Records = Annotated[list[dict[str, Any]], Field(max_length=MAX_TABLE_IMAGES)]


class SplitTable(Config):
    """Table as the names of its columns and the cells of its rows."""

    columns: list[str]
    data: list[list[Any]] = Field(max_length=MAX_TABLE_IMAGES)
    index: list[Any] | None = None


class ScoringRequest(Config):
    """Body of a request in MLflow's protocol: a table, in one of its forms, and parameters."""

    dataframe_records: Records | None = None
    instances: Records | None = None
    dataframe_split: SplitTable | None = None
    inputs: dict[str, list[Any]] | None = None
    """Cells of each column."""
    params: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_one_table(self) -> Self:
        tables = (self.dataframe_records, self.instances, self.dataframe_split, self.inputs)
        if sum(table is not None for table in tables) != 1:
            raise ValueError("give one of dataframe_records, dataframe_split, instances and inputs")
        assert self.rows is not None  # raises ValueError for rows or columns of different lengths
        return self

    @property
    def rows(self) -> Records:
        """Rows of the table; raises ValueError if they are of different lengths."""
        if self.dataframe_split is not None:
            return [dict(zip(self.dataframe_split.columns, row, strict=True)) for row in self.dataframe_split.data]
        if self.inputs is not None:
            return [dict(zip(self.inputs, row, strict=True)) for row in zip(*self.inputs.values(), strict=True)]
        return self.dataframe_records or self.instances or []


class RefusedRequestError(UserError):
    """Request that is not answered, or whose body is not read or not parsed, by its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def parse_body(body: bytearray) -> ScoringRequest:
    """Parse the body of a request; raises UserError, for too many values before they take memory."""
    if body.count(b",") + body.count(b"\n") > MAX_SEPARATORS:
        raise RefusedRequestError(
            f"the table has over {MAX_SEPARATORS:,} values: give at most {MAX_TABLE_IMAGES} records", 413
        )
    try:
        return ScoringRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        words = describe_validation_error(first, ".".join(str(part)[:40] for part in first["loc"]))
        raise UserError(f"the body is not a table in MLflow's protocol: {words}") from error


class ScoringApp:
    """ASGI application of a served model: /invocations, /ping, /health and /version, as MLflow has them."""

    def __init__(self, served: ServedModel, is_local: bool = True) -> None:
        """Answer programs on this machine alone if it ``is_local``: no pages of a browser, under whatever name."""
        self.served, self.limits, self.is_local = served, served.limits, is_local
        self.ending = Event()
        """Set when the server ends."""
        self._threads = ThreadPoolExecutor(self.limits.max_waiting_requests + 1)
        self._unanswered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whose place in the queue is taken until the answer is sent."""
        with ExitStack() as place:
            response = await self._respond(Request(scope, receive), place)
            with suppress(TimeoutError):  # of a client that does not read: uvicorn closes the connection
                async with asyncio.timeout(TRANSFER_SECONDS):
                    await response(scope, receive, send)

    async def _respond(self, request: Request, place: ExitStack) -> Response:
        try:
            method, path = request.method, request.url.path
            if self.is_local and (reason := refusal(method, path, request.headers)):
                raise RefusedRequestError(f"{reason}: give `--host` for other machines", 403)
            match method, path:
                case "GET", "/ping" | "/health":
                    return Response("\n", media_type=JSON)
                case "GET", "/version":
                    return Response(VERSION, media_type=JSON)
                case "POST", "/invocations":
                    body = await self._read_body(request, place)
                    place.enter_context(self.served.queue.take_place())
                    return Response(await self._invoke(request, body), media_type=JSON)
            return Response("there are POST /invocations, and GET /ping, /health and /version\n", 404)
        except DarkroomError as error:
            answer = to_mlflow_error(error)
            status = 503 if self.ending.is_set() else answer.get_http_status_code()  # type: ignore[no-untyped-call]
            if isinstance(error, RefusedRequestError):
                status = error.status
            return Response(answer.serialize_as_json(), status, media_type=JSON)  # type: ignore[no-untyped-call]

    async def _invoke(self, request: Request, body: bytearray) -> bytes:
        """Compute the answer to a request, which ends with its client or the server; raises DarkroomError."""
        left = Event()
        budget = Budget(self.limits, lambda: left.is_set() or self.ending.is_set())

        async def watch_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            left.set()

        watch = asyncio.create_task(watch_client())
        try:
            answer = asyncio.get_running_loop().run_in_executor(self._threads, self._score, body, budget)
            while not (await asyncio.wait([answer], timeout=0.2))[0]:
                # Not all work asks the budget: the decoding of an image does not.
                if self.ending.is_set():
                    raise StoppedError("the server ends")
            return answer.result()
        finally:
            watch.cancel()

    async def _read_body(self, request: Request, place: ExitStack) -> bytearray:
        """Read the body of a request, which counts as unanswered until ``place`` is left; raises UserError."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise RefusedRequestError(f"only JSON is read here: send it with Content-Type: {JSON}", 415)
        body, limit = bytearray(), self.limits.max_request_bytes
        max_unanswered = (self.limits.max_waiting_requests + 1) * limit

        def forget() -> None:
            self._unanswered_bytes -= len(body)

        place.callback(forget)
        too_large = RefusedRequestError(
            f"the request has over {limit:,} bytes: send less, or set DARKROOM_MAX_REQUEST_BYTES to more", 413
        )
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    if self._unanswered_bytes + len(chunk) > max_unanswered:
                        raise BusyError("the requests that are sent at once are too large together: try again later")
                    body += chunk
                    self._unanswered_bytes += len(chunk)
        except TimeoutError as error:
            raise RefusedRequestError(
                f"the request did not arrive within {TRANSFER_SECONDS} s: send it again", 408
            ) from error
        except ClientDisconnect as error:
            raise StoppedError("the client left") from error
        return body

    def _score(self, body: bytearray, budget: Budget) -> bytes:
        table = parse_body(body)
        rows = self.served.answer(table.rows, table.params or {}, budget)
        predictions = [row | {"png": base64.b64encode(row["png"]).decode()} for row in rows]
        return json.dumps({"predictions": predictions}).encode()


class ScoringServer(uvicorn.Server):
    """Server of the application, which ends within seconds of SIGTERM, whatever is computed."""

    def __init__(self, app: ScoringApp) -> None:
        self.app = app
        # With the end of this time the tasks are cancelled and the signal is raised again, which ends the process.
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                lifespan="off",
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End what is generated, then the server."""
        self.app.ending.set()
        super().handle_exit(sig, frame)


def serve(params: Params, model: str, host: str, port: int) -> None:
    """Serve a model file, or the weights of a registered model, until the process is interrupted."""
    if model.endswith(".safetensors"):
        weights = Path(model)
    else:
        version = resolve(MlflowClient(), model)
        warn_of_takedown(version)
        weights, model = cached_weights(version), version.uri
    loaded, served = load_model(weights), ServedModel()
    served.use(loaded, params.resolve_sampling(loaded.config))
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used ({error.strerror}): give another --port") from error
    print(f"{model} at http://{host}:{port}/invocations  (Ctrl+C ends it)", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        ScoringServer(ScoringApp(served, ip_address(listener.getsockname()[0]).is_loopback)).run(sockets=[listener])
    # Not by returning: a thread that decodes would hold the process. SIGTERM has ended it before.
    os._exit(0)
