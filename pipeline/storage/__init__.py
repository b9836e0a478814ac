"""All input and output on object stores and disks, and the keys of everything in the output.

In: addresses and bytes. Out: bytes, listings, leases, keys of the lake, rows of finished shards.
May import: schemas.
"""

from pipeline.storage import leases, paths
from pipeline.storage.chunks import read_chunks, sha256_of
from pipeline.storage.faults import AddressError, DiskError, StoreError
from pipeline.storage.leases import LeaseLostError
from pipeline.storage.listing import STAGING, ObjectInfo, Page
from pipeline.storage.names import safe_segment
from pipeline.storage.prefetch import map_ahead
from pipeline.storage.redaction import redact
from pipeline.storage.runs import Run, encode_shard, read_shard, read_shards
from pipeline.storage.store import Store, open_store

__all__ = [
    "STAGING",
    "AddressError",
    "DiskError",
    "LeaseLostError",
    "ObjectInfo",
    "Page",
    "Run",
    "Store",
    "StoreError",
    "encode_shard",
    "leases",
    "map_ahead",
    "open_store",
    "paths",
    "read_chunks",
    "read_shard",
    "read_shards",
    "redact",
    "safe_segment",
    "sha256_of",
]
