"""HTTP/1.1 of the servers that Darkroom runs itself: clients that say nothing, or too much, do not hold them."""

import asyncio

from h11 import DONE, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10
"""Time for a client to send the header of a request."""
MAX_CONNECTIONS = 128
"""Maximum number of connections; another one closes that which has waited longest for a header."""


class BoundedProtocol(H11Protocol):
    """Connection with a deadline for each header and one request at a time, of which there is a limited number."""

    header_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a header, in the place of the connection that has waited longest if there are too many."""
        super().connection_made(transport)
        self._wait_for_header()
        if len(self.connections) > MAX_CONNECTIONS:
            deadlines = {
                each.header_deadline.when(): each
                for each in self.connections
                if isinstance(each, BoundedProtocol) and each.header_deadline is not None
            }
            deadlines[min(deadlines)].transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Answer a request; a client that sends another one before it has the answer is disconnected.

        While uvicorn keeps that one for later it reads no further, and would not see that the client left.
        """
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self.conn.their_state is DONE and self.conn.trailing_data[0]:
            self.transport.abort()

    def handle_websocket_upgrade(self, event: Request) -> None:
        """Leave the connection to another protocol."""
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Wait for the next header."""
        self._wait_for_header()
        super().on_response_complete()

    def _wait_for_header(self) -> None:
        self._stop_waiting()
        self.header_deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self.header_deadline is not None:
            self.header_deadline.cancel()
            self.header_deadline = None
