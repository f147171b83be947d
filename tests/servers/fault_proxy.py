"""A proxy over real sockets that stands before an S3 server and breaks chosen requests in chosen
ways.

A client signs the Host header, so the proxy passes it on as it came. Faults come from rules ("the
2nd PUT whose path matches this") or, seeded, at random. Every request is recorded with the fault it
met.
"""

import http.client
import random
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import urlsplit


class Fault(Enum):
    """What happens to a request."""

    LATENCY = "answered late"
    BUSY = "503 SlowDown, not forwarded"
    INTERNAL_ERROR = "500, not forwarded"
    CONFLICT = "409 ConditionalRequestConflict, not forwarded"
    RESET_BEFORE = "connection reset before the request is forwarded"
    RESET_IN_UPLOAD = "connection reset while the request's body is read"
    LOST_REPLY = "forwarded, and the connection reset instead of a reply"
    GARBLED_REPLY = "forwarded, and 500 with an empty body instead of the reply"
    RESET_IN_BODY = "the reply's body stops in the middle with a reset"
    TRUNCATED_BODY = "the reply's body stops in the middle with a regular end of the connection"
    SHORTENED_BODY = "half of the reply's body, with a Content-Length that agrees"
    FLIPPED_BIT = "one bit of the reply's body is another"
    EMPTIED_BODY = "a reply without body"
    NOT_IMPLEMENTED = "501 NotImplemented, not forwarded"


LATENCY_S = 0.3
REFUSALS = {
    Fault.BUSY: (503, "SlowDown"),
    Fault.INTERNAL_ERROR: (500, "InternalError"),
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.NOT_IMPLEMENTED: (501, "NotImplemented"),
}
PASSING_FAULTS = [fault for fault in Fault if fault is not Fault.NOT_IMPLEMENTED]
RANDOM_FAULTS = [fault for fault in PASSING_FAULTS if fault is not Fault.FLIPPED_BIT]
"""Without TLS nothing but a checksum can tell a flipped bit, and a ranged GET has none: it is tried
where there is one."""
COPY_MARK = " copied"
"""Ends the path of a recorded UploadPartCopy, which is an UploadPart but for a header."""


@dataclass
class Rule:
    """The `nth` matching request (from 1) and the `times` - 1 after it meet the fault."""

    fault: Fault
    method: str = ".*"
    path: str = ".*"
    nth: int = 1
    times: int = 1
    seen: int = 0

    def applies(self, method: str, path: str) -> bool:
        """Counts matching requests."""
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


@dataclass
class Request:
    """What the proxy saw."""

    method: str
    path: str
    fault: Fault | None
    num_body_bytes: int
    num_reply_bytes: int = 0


@dataclass
class FaultProxy:
    """`endpoint_url` answers as the server at `upstream_url` does, but for the faults."""

    upstream_url: str
    rules: list[Rule] = field(default_factory=list)
    random_share: float = 0.0
    random_source: random.Random = field(default_factory=lambda: random.Random(0))
    requests: list[Request] = field(default_factory=list)
    endpoint_url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, method: str, path: str, num_body_bytes: int) -> Request:
        """Every rule sees every request; the first that applies decides."""
        with self.lock:
            hits = [rule.fault for rule in self.rules if rule.applies(method, path)]
            fault = hits[0] if hits else None
            if fault is None and self.random_source.random() < self.random_share:
                fault = self.random_source.choice(RANDOM_FAULTS)
            self.requests.append(Request(method, path, fault, num_body_bytes))
            return self.requests[-1]

    def seen(self, method: str = ".*", path: str = ".*") -> list[Request]:
        """The requests so far that match."""
        return [
            request
            for request in self.requests
            if re.fullmatch(method, request.method) and re.search(path, request.path)
        ]

    def heal(self) -> None:
        """No more faults."""
        with self.lock:
            self.rules.clear()
            self.random_share = 0.0


@contextmanager
def fault_proxy(
    upstream_url: str, *rules: Rule, random_share: float = 0.0, seed: int = 0
) -> Iterator[FaultProxy]:
    """A running proxy on a free port."""
    proxy = FaultProxy(upstream_url, list(rules), random_share, random.Random(seed))
    with _Listener(("127.0.0.1", 0), _Connection) as listener:
        listener.proxy = proxy
        proxy.endpoint_url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(
            target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown()
            thread.join()


class _Listener(socketserver.ThreadingTCPServer):
    proxy: FaultProxy
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news here."""


class _Connection(socketserver.StreamRequestHandler):
    """Requests of one kept-alive connection, one after another."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while self._one_request():
            pass

    def _one_request(self) -> bool:
        """Returns: whether the connection can carry another request."""
        line = self.rfile.readline().decode("latin-1").split()
        if len(line) != 3:
            return False
        method, path, _ = line
        headers = http.client.parse_headers(self.rfile)
        num_body_bytes = int(headers.get("Content-Length", 0))
        proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]
        request = proxy.choose(
            method, path + (COPY_MARK if "x-amz-copy-source" in headers else ""), num_body_bytes
        )
        fault = request.fault
        if headers.get("Expect"):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.RESET_IN_UPLOAD:
            self.rfile.read(num_body_bytes // 2)
            return self._reset()
        body = self.rfile.read(num_body_bytes)
        if fault is Fault.RESET_BEFORE:
            return self._reset()
        if fault in REFUSALS:
            return self._refuse(method, *REFUSALS[fault])
        if fault is Fault.LATENCY:
            time.sleep(LATENCY_S)
        reply = self._forward(proxy, method, path, headers, body)
        request.num_reply_bytes = len(reply[2])
        return self._answer(method, fault, reply)

    def _forward(
        self, proxy: FaultProxy, method: str, path: str, headers: Any, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(urlsplit(proxy.upstream_url).netloc, timeout=60)
        try:
            upstream.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            reply = upstream.getresponse()
            kept = [
                (name, value)
                for name, value in reply.getheaders()
                if name.lower() not in ("transfer-encoding", "connection")
            ]
            return reply.status, kept, reply.read()
        except OSError:
            return 502, [], b""  # the server is down, as another proxy would say it
        finally:
            upstream.close()

    def _answer(
        self, method: str, fault: Fault | None, reply: tuple[int, list[tuple[str, str]], bytes]
    ) -> bool:
        status, headers, body = reply
        if fault is Fault.LOST_REPLY:
            return self._reset()
        if fault is Fault.GARBLED_REPLY:
            status, headers, body = 500, [], b""
        if fault is Fault.SHORTENED_BODY:
            body = body[: len(body) // 2]
        if fault is Fault.EMPTIED_BODY:
            body = b""
        if fault is Fault.FLIPPED_BIT and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if method != "HEAD":
            headers = [
                (name, value) for name, value in headers if name.lower() != "content-length"
            ] + [("Content-Length", str(len(body)))]
        head = [
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}",
            *(f"{name}: {value}" for name, value in headers),
        ]
        self.wfile.write("\r\n".join([*head, "", ""]).encode("latin-1"))
        if fault in (Fault.RESET_IN_BODY, Fault.TRUNCATED_BODY):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self._reset() if fault is Fault.RESET_IN_BODY else False
        self.wfile.write(body)
        return True

    def _refuse(self, method: str, status: int, code: str) -> bool:
        text = f"<Error><Code>{code}</Code><Message>{code}, says the proxy</Message></Error>"
        body = b"" if method == "HEAD" else text.encode()
        self.wfile.write(
            f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nContent-Length:"
            f" {len(body)}\r\n\r\n".encode()
            + body
        )
        return True

    def _reset(self) -> bool:
        """Closing with lingering off and zero sends RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        return False
