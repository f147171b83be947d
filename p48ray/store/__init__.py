"""Where bytes live: one small protocol (base.Store) and its backends. Keys are relative posix paths under the store's root."""

from p48ray.store.base import ByteRange, ObjectInfo, Piece, Store, check_key
from p48ray.store.local import LocalStore
from p48ray.store.memory import MemoryStore
from p48ray.store.open import open_store

__all__ = ["ByteRange", "LocalStore", "MemoryStore", "ObjectInfo", "Piece", "Store", "check_key", "open_store"]
