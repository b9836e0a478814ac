"""All input and output of alfa, over fsspec (file, s3, gs, az, memory)."""

from pipeline.storage.faults import AddressError, StoreError
from pipeline.storage.listing import STAGING, ObjectInfo, Page
from pipeline.storage.store import Store, open_store

__all__ = ["STAGING", "AddressError", "ObjectInfo", "Page", "Store", "StoreError", "open_store"]
