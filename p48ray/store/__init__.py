"""Where bytes live: one small protocol (base.Store) and its backends. Keys are relative posix paths under the store's root."""

from p48ray.store.base import ByteRange, ObjectInfo, Piece, Store, Traffic, check_key
from p48ray.store.hub import HubStore
from p48ray.store.local import LocalStore
from p48ray.store.memory import MemoryStore
from p48ray.store.open import SCHEMES, Scheme, open_store, scheme_of
from p48ray.store.probe import Capabilities, probe
from p48ray.store.s3 import S3Store

__all__ = [
    "SCHEMES",
    "ByteRange",
    "Capabilities",
    "HubStore",
    "LocalStore",
    "MemoryStore",
    "ObjectInfo",
    "Piece",
    "S3Store",
    "Scheme",
    "Store",
    "Traffic",
    "check_key",
    "open_store",
    "probe",
    "scheme_of",
]
