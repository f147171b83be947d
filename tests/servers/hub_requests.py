"""One request to the tests' Hub, from its arrival to its answer, and the host where objects lie.

What repositories are asked is in hub_front.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote

if TYPE_CHECKING:
    from tests.servers.hub import Fault, Hub

TOKEN = "hf_ThisIsTheOnlySecretThatTheServerKnows"
PIECE_BYTES = 2**16

Route = tuple[str, bool, Callable[..., None]]
"""Pattern of "METHOD /path", whether it wants a token, and what answers the pattern's groups."""


class LostConnectionError(Exception):
    """Raised by a callback: the request ends here, without an answer."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    """What both hosts share: counts, faults, the token, and the forms of an answer."""

    hub: "Hub"
    routes: ClassVar[list[Route]] = []
    fault: "Fault | None" = None
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16
    """An answer in one packet: a second one waits 40 ms for the first one's acknowledgement."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        self.fault = self.hub.take_fault(self.counted_as(path), self.headers.get("Range"))
        token = self.headers.get("Authorization")
        is_known = self.takes(token)
        if self.fault and self.fault.status:
            self.body()
            self.answer(self.fault.status, {"error": "a fault"}, **self.fault.headers)
            return
        method = "GET" if self.command == "HEAD" else self.command
        for pattern, needs_token, action in self.routes:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                if is_known and (token or not needs_token):
                    action(self, *(unquote(group or "") for group in found.groups()))
                    return
                self.body()
                said = "Invalid credentials in Authorization header"
                self.answer(401, {"error": said}, X_Error_Message=said)
                return
        self.body()
        self.answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def counted_as(self, path: str) -> str:
        """How counts and faults name this request."""
        return f"{self.command} {path}"

    def takes(self, token: str | None) -> bool:
        """Whether a request with this token, or with none, is listened to at all."""
        return token in (None, f"Bearer {TOKEN}")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def head(self, status: int, size: int, **headers: str) -> None:
        """Everything before the body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.head(status, len(data), **{"Content-Type": "application/json", **headers})
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str, status: int = 404, **headers: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def give(self, path: str, data: bytes, pace: float = 0.0, **headers: str) -> None:
        """A file, or the range of it that was asked for. Args: pace: seconds before each piece."""
        if self.command == "HEAD":
            self.head(200, len(data), **headers)
            return
        asked = self.headers.get("Range")
        with self.hub.lock:
            self.hub.ranges.append((path, asked))
        flip, cut = (self.fault.flip, self.fault.cut) if self.fault else (None, None)
        if flip is not None:
            data = data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :]
        status, body = 200, data
        if asked and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            first, last = int(found[1]), min(len(data) - 1, int(found[2] or len(data) - 1))
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            status, body = 206, data[first : last + 1]
        self.head(status, len(body), **headers)
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            if cut is not None and start + len(piece) > cut:
                self.wfile.write(piece[: max(0, cut - start)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            time.sleep(pace)
            self.wfile.write(piece)
            with self.hub.lock:
                self.hub.sent[path] += len(piece)


class Storage(Handler):
    """The host where large files lie. Its addresses are signed, so no token should reach it."""

    def counted_as(self, path: str) -> str:
        """A download by the file's path alone: a test knows that, and not the digest."""
        if self.command == "GET":
            return f"OBJECT {path.lstrip('/').partition('/')[2]}"
        return super().counted_as(path)

    def takes(self, token: str | None) -> bool:
        if token:
            self.hub.leaked.append(token)
        return True

    def get_object(self, oid: str, path: str) -> None:
        self.give(path, self.hub.object(oid).read_bytes(), self.hub.pace)

    def received(self, oid: str) -> bytes:
        data = self.body()
        with self.hub.lock:
            self.hub.received[oid] += len(data)
        return data

    def put_object(self, oid: str, size: str) -> None:
        keep(self, oid, int(size), self.received(oid))

    def put_part(self, oid: str, size: str, number: str) -> None:
        data = self.received(oid)
        etag = hashlib.md5(data).hexdigest()
        (self.hub.folder / f".{oid}.{number}.{etag}").write_bytes(data)
        self.answer(200, ETag=etag)


def keep(handler: Handler, oid: str, size: int, data: bytes) -> None:
    """An object whose bytes have all come, if they are what its name says."""
    hub = handler.hub
    if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
        said = f"expected {size} bytes of SHA-256 {oid}, received {len(data)}"
        handler.answer(400, {"error": said})
        return
    temp = hub.folder / f".{oid}-{threading.get_ident()}"
    temp.write_bytes(data)
    temp.replace(hub.object(oid))
    hub.happen("object", handler)
    handler.answer(200)


Storage.routes = [
    (r"GET /([0-9a-f]{64})/(.+)", False, Storage.get_object),
    (r"PUT /lfs/([0-9a-f]{64})/(\d+)", False, Storage.put_object),
    (r"PUT /lfs/([0-9a-f]{64})/(\d+)/(\d+)", False, Storage.put_part),
]
