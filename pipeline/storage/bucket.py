"""Reads and writes whole objects of an S3 bucket by obstore (Rust).

s3fs holds Python's lock for 1.5 ms per object, which limits how many photos an actor with a GPU can score; obstore
holds it for a tenth of that (tests.bench.storage).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec.asyn
import obstore
from obstore.store import S3Store

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_REST_S, _LONGEST_REST_S = 60.0, 3600.0
"""Seconds for which s3fs takes over after a fault: they double with each fault that follows, up to the second value."""

_CREDENTIALS_LIVE = timedelta(minutes=10)
"""The lifetime that obstore is told; it asks for new credentials when half is left. botocore renews its credentials
more than ten minutes before they expire."""


class Bucket:
    """Reads and writes a bucket with the endpoint, region, certificates and credentials of an s3fs file system.

    It tries each request once. The caller repeats a failed one with s3fs, which distinguishes errors, retries, and
    finds a bucket in another region.
    """

    def __init__(self, name: str, fs: Any) -> None:
        """fs: an s3fs.S3FileSystem."""
        self._name, self._fs = name, fs
        self._store: S3Store | None = None
        # obstore does not know the options that fsspec's configuration adds, nor access points (names with a colon).
        is_plain = not (fs.key or fs.req_kw or fs.s3_additional_kwargs or ":" in name)
        self._rests_until = 0.0 if is_plain else float("inf")
        self._rest_s = _REST_S

    def get(self, key: str) -> bytes | None:
        """Returns the content of the object; None if the request failed for any reason."""
        return self._attempt(key, lambda store: bytes(obstore.get(store, key).bytes()))

    def put(self, key: str, data: bytes, content_type: str | None) -> bool:
        """Creates or replaces the object in one step. Returns True only if it was certainly written."""
        attributes = {"Content-Type": content_type} if content_type else {}
        put = self._attempt(
            key, lambda store: obstore.put(store, key, data, attributes=attributes, use_multipart=False)
        )
        return put is not None

    def _attempt(self, key: str, act: Callable[[S3Store], _T]) -> _T | None:
        # obstore drops slashes at both ends of a key, and would reach another object.
        if time.monotonic() < self._rests_until or key != key.strip("/"):
            return None
        try:
            self._store = self._store or self._open()
            result = act(self._store)
        except (FileNotFoundError, ValueError):  # a missing object or bucket; a key such as a//b
            return None
        except Exception as error:
            self._rest(str(error).partition("\n")[0])
            return None
        self._rest_s = _REST_S
        return result

    def _rest(self, reason: str) -> None:
        now = time.monotonic()
        if now < self._rests_until:  # another thread has met the same fault
            return
        logger.warning("bucket %s: %s; using s3fs for %.0f s, which is slower", self._name, reason, self._rest_s)
        self._rests_until = now + self._rest_s
        self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)

    def _open(self) -> S3Store:
        client = self._fs.s3.meta
        certificates = self._fs.session.get_config_variable("ca_bundle")
        options: ClientConfig = {
            "allow_http": client.endpoint_url.startswith("http://"),
            "connect_timeout": "10s",
            "read_timeout": "60s",
            "timeout": "10m",
        }
        if certificates:
            options["root_certificate"] = Path(certificates).read_bytes()
        return S3Store(
            self._name,
            endpoint=client.endpoint_url,
            region="us-east-1" if client.region_name in (None, "aws-global") else client.region_name,
            virtual_hosted_style_request=False,
            skip_signature=self._fs.anon,
            credential_provider=None if self._fs.anon else self._credentials,
            client_options=options,
            retry_config={"max_retries": 0},
        )

    def _credentials(self) -> S3Credential:
        keys = fsspec.asyn.sync(self._fs.loop, _freeze_credentials, self._fs.session)
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LIVE,
        }


async def _freeze_credentials(session: Any) -> Any:
    credentials = await session.get_credentials()
    if credentials is None:
        raise PermissionError("no credentials are set")
    return await credentials.get_frozen_credentials()
