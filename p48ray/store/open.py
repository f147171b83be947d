"""From the text in a configuration to a store, and to what is known of stores of its kind.

    "s3://bucket/prefix" ──scheme_of──▶ Scheme (is_local, is_writable, ...)      nothing is opened
                         ──open_store─▶ S3Store, whose uri has the same Scheme

Everything outside this folder asks a Scheme, never a text for its "://" nor a store for its class.
A new kind of store is a class with the operations of base.Store, and one entry in SCHEMES.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from p48ray.errors import ConfigError
from p48ray.store.base import Store
from p48ray.store.hub import store as hub
from p48ray.store.hub.place import at_commit, repository, split_texts
from p48ray.store.hub.store import HubStore
from p48ray.store.local import LocalStore
from p48ray.store.memory import MemoryStore
from p48ray.store.s3.store import S3Store

ENDPOINT_VARIABLES = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
"""Where commands look for an endpoint, as boto3 itself does; given to S3Store, it also decides how
a bucket is addressed, and it travels to other processes."""


def first_part(place: str) -> tuple[str, str]:
    """scheme://bucket/a/b -> (scheme://bucket, a/b)."""
    scheme, _, rest = place.partition("://")
    root, _, key = rest.partition("/")
    return f"{scheme}://{root}", key


def told_sha256(store: Store, key: str) -> str | None:
    """SHA-256 of an object, where `head` tells it."""
    held = store.head(key)
    return held.sha256 if held else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisions:
    """Of places whose words may mean other bytes tomorrow: commit and at are about one place."""

    commit: Callable[[str], str]
    """The commit that a place stands at now. Raises: ConfigError if there is none to be read."""
    at: Callable[[str, str], str]
    """The same place at a commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What callers ask about a kind of store. The defaults: a bucket without digests."""

    name: str
    """Before the ://, in small letters; "" for a plain path."""
    noun: str
    """What such a place is, for messages: "a bucket"."""
    example: str
    """How such a place is written, for messages: "s3://bucket/prefix"."""
    open: Callable[[str, str | None, bool], Store]
    """From a place, an endpoint url and server_copy (see S3Store) to its store."""
    is_local: bool = False
    """A folder of a machine, so that another node of a cluster may have another one there."""
    is_writable: bool = True
    """Runs and outputs may lie there, and every process finds them."""
    must_be_probed: bool = False
    """Servers differ in what a run rests on: it is tried out once (store.probe)."""
    keeps_sha256: bool = False
    """`head` tells SHA-256 of what was written whole; the rest is left to verification."""
    lists_digests: bool = False
    """`identity` costs no request, and is a digest of the bytes themselves."""
    identity: Callable[[Any, str], str | None] = told_sha256
    """Of (store, key): what the store keeps that other bytes would not have; None: read them."""
    split: Callable[[str], tuple[str, str]] = first_part
    """A place of texts: the store to open, and the file or folder in it. Raises: ConfigError."""
    served: Callable[[str], tuple[str, str | None]] | None = None
    """What inference servers and tokenizers take for it, and a revision; None: they can not."""
    revisions: Revisions | None = None
    """Where words may come to mean other bytes; None: they do not, or nobody can tell."""
    mirror: Callable[[str], HubStore] | None = None
    """Opens a source that a run copies before anybody reads it; None: it is read where it lies."""

    @property
    def is_path(self) -> bool:
        """A plain path, which may be relative and begin with ~."""
        return self.name == ""


def _open_path(place: str, *_: object) -> Store:
    if not place.strip():
        raise ConfigError("a store needs a path or a uri, found an empty text")
    return LocalStore(Path(place).expanduser())


def _open_file(place: str, *_: object) -> Store:
    """file:///a%20b and file://localhost/a%20b -> /a b. Another host has another disk: refused."""
    host, slash, path = place.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        found = f"host {host}" if host else "no path"
        raise ConfigError(f"{place}: expected file:///absolute/path, found {found}")
    return LocalStore("/" + unquote(path))


def _open_memory(place: str, *_: object) -> Store:
    name = place.partition("://")[2]
    if not name:
        raise ConfigError(f"{place}: expected memory://NAME, found no name")
    return MemoryStore(name)


def _open_unknown(place: str, *_: object) -> Store:
    *names, last = [f"{name}://" for name in SCHEMES if name]
    known = f"{', '.join(['a plain path', *names])} and {last}"
    scheme = place.partition("://")[0].lower()
    raise ConfigError(f"{place}: unknown scheme {scheme}://; known are {known}")


LOCAL_PATH = Scheme(
    name="",
    noun="a folder",
    example="a local folder",
    open=_open_path,
    is_local=True,
    served=lambda path: (str(Path(path).resolve()), None),
)
SCHEMES: dict[str, Scheme] = {
    "": LOCAL_PATH,
    "file": replace(
        LOCAL_PATH,
        name="file",
        example="file:///folder",
        open=_open_file,
        served=lambda place: (_open_file(place).uri, None),
    ),
    "memory": Scheme(
        name="memory",
        noun="the memory of one process",
        example="memory://name",
        open=_open_memory,
        is_writable=False,
    ),
    "s3": Scheme(
        name="s3",
        noun="a bucket",
        example="s3://bucket/prefix",
        open=S3Store,
        must_be_probed=True,
        keeps_sha256=True,
        identity=S3Store.identity,
    ),
    "hf": Scheme(
        name="hf",
        noun="a repository on the Hub",
        example="hf://owner/name@revision",
        open=lambda place, *_: HubStore(place),
        is_writable=False,
        keeps_sha256=True,
        lists_digests=True,
        identity=HubStore.identity,
        split=split_texts,
        served=repository,
        revisions=Revisions(commit=hub.latest_commit, at=at_commit),
        mirror=hub.open_model,
    ),
}
"""Every kind of store, by the name before ://."""
UNKNOWN = Scheme(name="?", noun="nothing known", example="", open=_open_unknown, is_writable=False)


def scheme_of(place: str) -> Scheme:
    """What is known of a place's kind of store; UNKNOWN for a stranger. Args: place: or a store's
    uri."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", place)
    return SCHEMES.get(found[1].lower(), UNKNOWN) if found else LOCAL_PATH


def open_store(uri: str | Path, endpoint_url: str | None = None, server_copy: bool = True) -> Store:
    """The store that a path or a uri names, see SCHEMES. Opening touches nothing.

    Args:
        endpoint_url, server_copy: of an S3 server that is not AWS, see S3Store; other stores have
            no use for them.
    Raises: ConfigError for anything unknown.
    """
    place = str(uri)
    scheme = scheme_of(place) if isinstance(uri, str) else LOCAL_PATH
    if not scheme.is_path:
        place = with_small_scheme(place)
    return scheme.open(place, endpoint_url, server_copy)


def is_within(inner: Store, outer: Store) -> bool:
    """Whether one place is the other or lies in it: a folder by whatever path it is reached, a
    prefix of a bucket at one endpoint."""
    if scheme_of(inner.uri).is_local and scheme_of(outer.uri).is_local:
        path, other = Path(inner.uri).resolve(), Path(outer.uri).resolve()
        return any(
            place == other or (place.exists() and other.exists() and place.samefile(other))
            for place in (path, *path.parents)
        )
    ends = [getattr(store, "endpoint_url", None) for store in (inner, outer)]
    return ends[0] == ends[1] and f"{inner.uri}/".startswith(f"{outer.uri}/")


def with_small_scheme(place: str) -> str:
    """S3://Bucket -> s3://Bucket; a plain path or an unknown scheme as it is."""
    scheme = scheme_of(place)
    if scheme.is_path or scheme.name not in SCHEMES:
        return place
    return f"{scheme.name}://{place.partition('://')[2]}"


def mirror_source(place: str) -> HubStore | None:
    """A source that is copied into the run root first; None for one that is read where it lies.

    Raises: ConfigError for a place that is no whole checkpoint.
    """
    opening = scheme_of(place).mirror
    return opening(place) if opening else None


def writable_examples() -> str:
    """Where runs and outputs may lie, as one writes it: "a local folder or s3://bucket/prefix"."""
    found = [s.example for s in SCHEMES.values() if s.is_writable and (s.is_path or not s.is_local)]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))
