"""What goes wrong with storage: what is worth another try, and what to tell a person of the rest."""

from __future__ import annotations

import errno

from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

NO_BUCKET = "no such bucket; check the URI and the endpoint"
"""What is told of a store that is none."""

LOST = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of the errors of a disk that is full or read-only."""
_DENIED_CODES = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed")
"""Codes that every request will meet; AccessDenied may concern one object alone."""
_PASSING_CODES = ("IncompleteBody", "BadDigest", "RequestTimeout", "ConditionalRequestConflict")
"""What a server says of a body that the network mangled, or while another writes: s3fs reports it as a bad argument."""


class AddressError(OSError):
    """No store can be opened at an address; the message says why."""


class StoreError(OSError):
    """The store cannot be used as a whole: wrong or expired credentials, no such bucket, disk full, read-only."""


class NoBucketError(StoreError):
    """There is no such bucket."""


class DiskError(StoreError):
    """A disk is full or read-only: perhaps that of one node alone."""


def code_of(error: BaseException) -> str:
    """The S3 error code behind an exception: s3fs hangs botocore's on as its cause."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def is_transient(error: BaseException) -> bool:
    """Worth another try: time-outs, resets and overload; not a missing object, a denial or a full disk."""
    if isinstance(error, (*LOST, FileExistsError, PermissionError, StoreError)):
        return False
    if code_of(error) in _PASSING_CODES:
        return True
    if isinstance(error, OSError):
        return error.errno not in (*DISK_ERRORS, errno.EINVAL, errno.ENAMETOOLONG)
    return type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "asyncio", "gcsfs", "azure")


patiently = retry(
    retry=retry_if_exception(is_transient),
    wait=wait_random_exponential(multiplier=0.2, max=10.0),
    stop=stop_after_attempt(7),
    reraise=True,
)
"""The one place where storage is retried: exponential backoff with jitter, seven tries, about half a minute."""


def advice_on(error: OSError) -> str | None:
    """What to do where a fault concerns the whole store; None where it may concern one object."""
    cause = str(error) + str(error.__cause__ or "")
    if any(code in cause for code in _DENIED_CODES):
        return "access denied; check the credentials in the environment, and that they have not expired"
    if "NoSuchBucket" in cause or "bucket does not exist" in cause:
        return NO_BUCKET
    by_number = {errno.ENOSPC: "the disk is full; free space", errno.EDQUOT: "the quota is used up; free space"}
    by_number[errno.EROFS] = "read-only; mount it writable"
    return by_number.get(error.errno or 0)
