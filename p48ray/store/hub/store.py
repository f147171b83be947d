"""HubStore: the files of one repository on the Hugging Face Hub at one commit, to be read.

A branch moves, so a store that was opened at one looks its commit up once and keeps to it. A
commit's files never change: their sizes and digests (SHA-256 of what git LFS or Xet keeps, git's
own SHA-1 of the rest) come from one listing, and whatever is read whole is held against them. The
token is taken from huggingface_hub's own places (HF_TOKEN, the login file) where the store is made;
it travels with the store to other processes, and is in no text that the store makes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote

from p48ray.errors import ConfigError, ObjectMissingError, P48Error, TransientStoreError
from p48ray.store.base import (
    Buffers,
    ObjectInfo,
    Piece,
    Traffic,
    Written,
    check_key,
    check_prefix,
    check_range,
)
from p48ray.store.hub.api import api, ask, response
from p48ray.store.hub.place import (
    parse_place,
)

STREAM_BYTES = 2**20
"""Bytes of one piece of a streamed file."""
SKIPPED_BYTES = 32 * 2**20
"""Where a server sends a whole file instead of a range, so much of it is read past at most."""


def latest_commit(uri: str) -> str:
    """The commit that a place's revision stands at now. Raises: ConfigError if none can be read."""
    place = parse_place(uri)
    return HubStore(place.at(place.revision, "").uri).commit


def open_model(uri: str) -> "HubStore":
    """Raises: ConfigError unless it is the whole repository of a model."""
    place = parse_place(uri)
    if place.kind != "model" or place.path:
        expected = "hf://owner/name[@revision], the whole repository of a model"
        raise ConfigError(f"{uri}: expected {expected}")
    return HubStore(uri)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. `sha256`: of files in LFS or Xet; `git_sha1`: of the others, over git's
    blob header and the bytes."""

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None

    def digest(self) -> "FileDigest":
        return FileDigest(self)


class FileDigest:
    """Counts and hashes the bytes of one file as they come."""

    def __init__(self, file: HubFile) -> None:
        self.file, self.num_bytes, self.sha256 = file, 0, hashlib.sha256()
        self.git_sha1 = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self.sha256.update(data)
        if self.file.sha256 is None:
            self.git_sha1.update(data)

    def check(self, where: str) -> None:
        """Raises: TransientStoreError if the bytes are not those that the Hub names: a cut or
        changed
        transfer is worth another try."""
        f = self.file
        name, expected = ("SHA-256", f.sha256) if f.sha256 else ("git's SHA-1", f.git_sha1)
        found = self.sha256.hexdigest() if f.sha256 else self.git_sha1.hexdigest()
        if (self.num_bytes, found) != (f.size_bytes, expected):
            raise TransientStoreError(
                f"{where}: expected {f.size_bytes} bytes with {name} {expected} as the Hub lists"
                f" it, downloaded {self.num_bytes} bytes with {found}"
            )


class HubStore:
    """Files under a folder of a repository, read-only. Picklable; listings and counters belong to
    the process."""

    def __init__(self, uri: str, endpoint: str | None = None, token: str | None = None) -> None:
        """Nothing is asked before first use.

        Args:
            uri: see parse_place; its path is a folder.
            endpoint, token: None for those of this process's huggingface_hub, at first use.
        """
        self.place = parse_place(uri)
        self.uri = self.place.uri
        self._prefix = f"{self.place.path}/" if self.place.path else ""
        self._endpoint, self._token = endpoint, token
        self._commit = self.place.commit
        self._trees: dict[str, dict[str, HubFile]] = {}
        self.traffic = Traffic()

    def __reduce__(self) -> tuple[type["HubStore"], tuple[str, str, str | None]]:
        """At the commit, and with the endpoint and the token of this process: another one need have
        none of them."""
        self._connect()
        return (
            HubStore,
            (
                self.place.at(self._commit or self.place.revision).uri,
                self._endpoint or "",
                self._token,
            ),
        )

    def __repr__(self) -> str:
        """Without the token."""
        return f"HubStore({self.uri!r})"

    @property
    def commit(self) -> str:
        """The commit whose files these are, looked up once. Raises: ConfigError, naming the reason,
        if there is none to be read."""
        if self._commit is None:
            place, hub = self.place, self._api()
            info = self._ask(
                place.uri,
                lambda: hub.repo_info(place.repo, repo_type=place.kind, revision=place.revision),
            )
            self._commit = str(info.sha)
        return self._commit

    def file(self, key: str) -> HubFile | None:
        """What the Hub lists about one file; None if it lists none."""
        full = self._prefix + check_key(key)
        return self._tree(full.rpartition("/")[0]).get(full)

    def identity(self, key: str) -> str | None:
        """The digest that the Hub lists: SHA-256, or git's own SHA-1 of a small file."""
        listed = self.file(key)
        return (listed.sha256 or listed.git_sha1) if listed else None

    def stream(self, key: str) -> Iterator[bytes]:
        """See `download`. Raises: ObjectMissingError too."""
        return self.download(self._existing(key).digest())

    def download(self, digest: FileDigest) -> Iterator[bytes]:
        """A whole file in pieces of STREAM_BYTES at most, taken up again where a connection breaks,
        and held against its digest at the end.

        Args:
            digest: of the file, nothing counted yet; it counts what is handed on. What the Hub
                lists is not asked for again.
        Raises: TransientStoreError, after the last piece, if the bytes are not those that the Hub
            lists.
        """
        file = digest.file
        pieces: Iterator[bytes] | None = None
        where = self._where(file.path)

        def next_piece() -> bytes:
            """b"" at the end. An attempt that fails leaves no answer, so the next one asks for what
            is left."""
            nonlocal pieces
            at = digest.num_bytes
            if pieces is None and at >= file.size_bytes:
                return b""
            answer, pieces = pieces or self._pieces(file.path, at, None), None
            data = next(answer, b"")
            if not data and at < file.size_bytes:
                raise TransientStoreError(f"{where}: the answer held no bytes from byte {at} on")
            pieces = answer
            return data

        while data := ask(where, next_piece, partial(self.traffic.add, retries=1)):
            digest.update(data)
            yield data
        digest.check(where)

    def get(self, key: str) -> bytes:
        """See Store.get. Raises: TransientStoreError if what came is not what the Hub lists,
        several times over."""
        file = self._existing(key)

        def read() -> bytes:
            data, digest = b"".join(self._pieces(file.path, 0, None)), file.digest()
            digest.update(data)
            digest.check(self._where(file.path))
            return data

        return self._ask(self._where(file.path), read) if file.size_bytes else b""

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """See Store.get_range."""
        file = self._existing(key)
        check_range(key, start, num_bytes, file.size_bytes)
        if not num_bytes:
            return b""

        def read() -> bytes:
            data = b"".join(self._pieces(file.path, start, start + num_bytes - 1))
            if len(data) != num_bytes:
                raise TransientStoreError(
                    f"{self._where(file.path)}: asked for {num_bytes} bytes from byte {start} on,"
                    f" got {len(data)}"
                )
            return data

        return self._ask(self._where(file.path), read)

    def head(self, key: str) -> ObjectInfo | None:
        """See Store.head. From the listing; SHA-256 where the Hub has it."""
        file = self.file(key)
        return None if file is None else ObjectInfo(key, file.size_bytes, file.sha256)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list."""
        full = self._prefix + check_prefix(prefix)
        files = [f for f in self._tree(full.rpartition("/")[0]).values() if f.path.startswith(full)]
        infos = [
            ObjectInfo(f.path.removeprefix(self._prefix), f.size_bytes, f.sha256) for f in files
        ]
        return iter(sorted(infos, key=lambda info: info.key.encode()))

    def put(self, key: str, data: bytes) -> None:
        """Never: see `_refuse`."""
        self._refuse()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Never: see `_refuse`."""
        self._refuse()

    def write_once(self, key: str, buffers: Buffers) -> Written:
        """Never: see `_refuse`."""
        self._refuse()

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        """Never: see `_refuse`."""
        self._refuse()

    def delete(self, key: str) -> None:
        """Never: see `_refuse`."""
        self._refuse()

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        """Nothing is ever written here."""
        return 0

    def _refuse(self) -> NoReturn:
        """Raises: ConfigError: jobs/publish.py is what writes to the Hub, in commits."""
        raise ConfigError(
            f"{self.uri}: a repository on the Hub can only be read from; use a local folder or"
            " s3://bucket/prefix"
        )

    def _connect(self) -> str:
        """Endpoint (and token) as huggingface_hub finds them, once."""
        if not self._endpoint:
            from huggingface_hub import constants, get_token

            self._endpoint = constants.ENDPOINT
            if self._token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
                self._token = get_token()
        return self._endpoint

    def _api(self) -> Any:
        return api(self._connect(), self._token)

    def _ask(self, what: str, call: Any) -> Any:
        self.traffic.add(requests=1)
        return ask(what, call, partial(self.traffic.add, requests=1, retries=1))

    def _tree(self, folder: str) -> dict[str, HubFile]:
        """Every file under a folder of the repository, by its path there; listed once. Empty if
        there is no such folder."""
        held = next(
            (
                tree
                for name, tree in self._trees.items()
                if not name or f"{folder}/".startswith(f"{name}/")
            ),
            None,
        )
        if held is not None:
            return held
        hub, where, commit = self._api(), self._where(folder), self.commit

        def list_files() -> dict[str, HubFile]:
            from huggingface_hub.errors import HfHubHTTPError

            try:
                entries = hub.list_repo_tree(
                    self.place.repo,
                    folder or None,
                    recursive=True,
                    revision=commit,
                    repo_type=self.place.kind,
                )
                return {e.path: _described(e) for e in entries if hasattr(e, "blob_id")}
            # a 404 without a reason, at a commit that was just looked up: the folder is what is
            # missing
            except HfHubHTTPError as error:
                if folder and type(error) is HfHubHTTPError and error.response.status_code == 404:
                    return {}
                raise

        try:
            found: dict[str, HubFile] = self._ask(where, list_files)
        except ObjectMissingError:
            found = {}
        self._trees[folder] = found
        return found

    def _existing(self, key: str) -> HubFile:
        file = self.file(key)
        if file is None:
            raise ObjectMissingError(f"{key}: no such file in {self.place.at(self._commit).uri}")
        return file

    def _where(self, path: str) -> str:
        return self.place.at(self._commit or self.place.revision, path).uri

    def _pieces(self, path: str, start: int, last: int | None) -> Iterator[bytes]:
        """Bytes of one answer, from `start` to `last` inclusive. Raises: whatever the transport
        raises, for a body cut short too."""
        kind = "datasets/" if self.place.kind == "dataset" else ""
        url = f"{self._connect()}/{kind}{self.place.repo}/resolve/{self.commit}/{quote(path)}"
        with response(url, self._token, start, last) as reply:
            skip = _skipped_bytes(reply, start, self._where(path))
            left = None if last is None else last - start + 1
            for piece in reply.iter_bytes(STREAM_BYTES):
                data = piece[skip:]
                skip -= len(piece) - len(data)
                data = data if left is None else data[:left]
                if left is not None:
                    left -= len(data)
                if data:
                    self.traffic.add(bytes_read=len(data))
                    yield data
                if left == 0:
                    return


def _skipped_bytes(reply: Any, start: int, where: str) -> int:
    """Bytes of the body before those that were asked for: none, or where a server knows no ranges,
    `start`."""
    if reply.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", reply.headers.get("content-range", ""))
        if not found or int(found[1]) != start:
            raise P48Error(
                f"{where}: asked for bytes from {start} on, found"
                f" {reply.headers.get('content-range', 'no Content-Range')!r}"
            )
        return 0
    if start > SKIPPED_BYTES:
        raise P48Error(
            f"{where}: asked for bytes from {start} on, the server sends the whole file: it does"
            " not do ranges"
        )
    return start


def _described(entry: Any) -> HubFile:
    """A huggingface_hub RepoFile."""
    sha256 = entry.lfs.sha256 if entry.lfs else None
    return HubFile(
        entry.path,
        entry.lfs.size if entry.lfs else entry.size,
        sha256,
        None if sha256 else entry.blob_id,
    )
