"""Whole objects of an S3 bucket by Rust: s3fs takes 1.5 ms of Python's lock for each, which bounds what an actor with a
GPU can score, and obstore a tenth of that (tests.bench.storage)."""

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
"""How long s3fs does everything after a fault; twice as long after each that follows at once."""

_CREDENTIALS_LIVE = timedelta(minutes=10)
"""obstore asks for them anew when half of it is left. botocore hands none out that end sooner, where it can renew."""


class Bucket:
    """Reads and writes a bucket with the endpoint, region, certificates and credentials of an s3fs file system.

    It only tries. What fails is to be done again by s3fs, whose errors are told apart, which waits and retries, and
    which follows a bucket to its region.
    """

    def __init__(self, name: str, fs: Any) -> None:
        """fs: an s3fs.S3FileSystem."""
        self._name, self._fs = name, fs
        self._store: S3Store | None = None
        # What fsspec's own configuration adds to requests is known to s3fs alone; a colon is that of an access point.
        is_plain = not (fs.key or fs.req_kw or fs.s3_additional_kwargs or ":" in name)
        self._rests_until = 0.0 if is_plain else float("inf")
        self._rest_s = _REST_S

    def get(self, key: str) -> bytes | None:
        """The object, or None."""
        return self._attempt(key, lambda store: bytes(obstore.get(store, key).bytes()))

    def put(self, key: str, data: bytes, content_type: str | None) -> bool:
        """Creates or replaces the object in one step. Returns whether that is certain."""
        attributes = {"Content-Type": content_type} if content_type else {}
        put = self._attempt(
            key, lambda store: obstore.put(store, key, data, attributes=attributes, use_multipart=False)
        )
        return put is not None

    def _attempt(self, key: str, act: Callable[[S3Store], _T]) -> _T | None:
        # obstore would leave out a slash at either end, and with it reach another object.
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
        if now < self._rests_until:  # another thread met the same
            return
        logger.warning("bucket %s: %s; by s3fs for %.0f s, which is slower", self._name, reason, self._rest_s)
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
