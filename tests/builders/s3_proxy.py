"""A proxy before a real S3 server, by which the server refuses requests or reads them otherwise than it does."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPConnection
from urllib.parse import parse_qs, unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.builders.http_server import QuietHandler, serving

DROPPED = {"authorization", "connection", "content-length", "expect", "host", "x-amz-content-sha256", "x-amz-date"}
"""Headers that are made anew."""


@dataclass
class Request:
    """What a client asks for, with headers that may be changed."""

    method: str
    key: str
    """Empty: it is about the bucket."""
    query: Mapping[str, str]
    headers: Message
    body: bytes = field(repr=False)
    client: str = "127.0.0.1"
    """Address from which it comes."""

    @property
    def access_key(self) -> str:
        """Of the client; its signature is not looked at."""
        match = re.search(r"Credential=([^/]+)/", self.headers["Authorization"])
        assert match
        return match[1]


Intercept = Callable[[Request], str | None]
"""Changes a request, and says by which error code it is refused; None: it goes on to the server."""
CUT = "cut"
"""In the place of an error code: the connection drops in the middle of the server's answer."""


@contextmanager
def proxied(server: Mapping[str, str], intercept: Intercept, host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a proxy before the S3 server that the variables ``server`` name, whose keys it signs with."""
    keys = Credentials(server["AWS_ACCESS_KEY_ID"], server["AWS_SECRET_ACCESS_KEY"])
    address = urlsplit(server["AWS_ENDPOINT_URL_S3"]).netloc

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
            key = unquote(parts.path).lstrip("/").partition("/")[2]
            request = Request(self.command, key, query, self.headers, body, self.client_address[0])
            if (code := intercept(request)) and code != CUT:
                error_body = f"<Error><Code>{code}</Code><Message>by a drill</Message></Error>".encode()
                status = 503 if code == "SlowDown" else 403
                self.reply(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else error_body)
                return
            headers = {name: value for name, value in request.headers.items() if name.lower() not in DROPPED}
            signed = AWSRequest(self.command, f"http://{address}{self.path}", headers, body)
            S3SigV4Auth(keys, "s3", "us-east-1").add_auth(signed)
            server = HTTPConnection(address, timeout=60)
            server.request(self.command, self.path, body, dict(signed.headers))
            with server.getresponse() as response:
                self.reply(response.status, response.getheaders(), response.read(), code == CUT)
            server.close()

        def reply(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            length = [value for name, value in headers if name.lower() == "content-length"]
            for name, value in headers:
                if name.lower() not in {"connection", "content-length", "transfer-encoding"}:
                    self.send_header(name, value)
            # The answer to a HEAD names the size of what it does not send.
            if status != 204:
                self.send_header("Content-Length", length[0] if length else str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection |= cut

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815

    with serving(Handler, host) as url:
        yield url
