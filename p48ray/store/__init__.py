"""Where bytes live: one small protocol and its backends.

Keys are relative posix paths under the store's root. Belongs here: whatever asks what a store is.

Read in this order:
    base                        the protocol: ten operations over whole objects
    open                        from a text to a store; one Scheme says what a kind of store can do
    retry                       how often an outside service is asked again, by named policy
    local, memory, s3, hub      the backends; view: stores made of stores
    probe                       what a bucket can do, tried out
    node_cache, checked_files   what the processes of a node share

To add a store: a module, its Scheme in open.SCHEMES (docs/EXTENDING.md).
"""

from p48ray.store.base import ByteRange, ObjectInfo, Piece, Store, Traffic, check_key
from p48ray.store.hub.store import HubStore
from p48ray.store.local import LocalStore
from p48ray.store.memory import MemoryStore
from p48ray.store.open import SCHEMES, Scheme, open_store, scheme_of
from p48ray.store.probe import Capabilities, probe
from p48ray.store.s3.store import S3Store

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
