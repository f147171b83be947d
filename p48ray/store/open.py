"""From the text in a configuration to a store."""

import re
from pathlib import Path
from urllib.parse import unquote

from p48ray.errors import ConfigError
from p48ray.store.base import Store
from p48ray.store.hub import HubStore
from p48ray.store.local import LocalStore
from p48ray.store.memory import MemoryStore
from p48ray.store.s3 import S3Store

ENDPOINT_VARIABLES = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
"""Where commands look for an endpoint, as boto3 itself does; given to S3Store, it also decides how a bucket is addressed, and it travels to other processes."""


def open_store(uri: str | Path, endpoint_url: str | None = None, server_copy: bool = True) -> Store:
    """The store that a path, `file:///path`, `memory://name`, `s3://bucket/prefix` or `hf://owner/name@revision` names. Opening touches nothing.

    Args: endpoint_url, server_copy: of an S3 server that is not AWS, see S3Store; other stores have no use for them.
    Raises: ConfigError for anything unknown.
    """
    if isinstance(uri, Path):
        return LocalStore(uri.expanduser())
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if not found:
        if not uri.strip():
            raise ConfigError("a store needs a path or a uri, found an empty text")
        return LocalStore(Path(uri).expanduser())
    scheme, rest = found[1].lower(), uri[found.end() :]
    if scheme == "file":
        return LocalStore(_file_path(uri, rest))
    if scheme == "memory":
        if not rest:
            raise ConfigError(f"{uri}: expected memory://NAME, found no name")
        return MemoryStore(rest)
    if scheme == "s3":
        return S3Store(f"s3://{rest}", endpoint_url, server_copy)
    if scheme == "hf":
        return HubStore(f"hf://{rest}")
    raise ConfigError(f"{uri}: unknown scheme {scheme}://; known are a plain path, file://, memory://, s3:// and hf://")


def _file_path(uri: str, rest: str) -> str:
    """file:///a%20b and file://localhost/a%20b -> /a b. Another host would silently read the wrong machine's disk."""
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"{uri}: expected file:///absolute/path, found {f'host {host}' if host else 'no path'}")
    return "/" + unquote(path)
