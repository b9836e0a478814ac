"""Errors of storage: which are worth another try, and what to advise on the others."""

from __future__ import annotations

import errno

from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

NO_BUCKET = "no such bucket; check the URI and the endpoint"
"""Advice where a bucket does not exist."""

NOT_FOUND = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors of a key that holds no object."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers of a disk that is full or read-only."""
_DENIED_CODES = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed")
"""S3 codes that concern all requests. AccessDenied is not among them, because it may concern one object alone."""
_TRANSIENT_CODES = ("IncompleteBody", "BadDigest", "RequestTimeout", "ConditionalRequestConflict")
"""S3 codes for a body that the network damaged, or a concurrent write. s3fs reports them as bad arguments."""


class AddressError(OSError):
    """No store can be opened at an address; the message says why."""


class StoreError(OSError):
    """The store cannot be used as a whole: wrong or expired credentials, no such bucket, disk full, read-only."""


class NoBucketError(StoreError):
    """The bucket does not exist."""


class DiskError(StoreError):
    """A disk is full or read-only; it may be the disk of a single node."""


def code_of(error: BaseException) -> str:
    """Returns the S3 error code of an exception, or an empty string. s3fs keeps botocore's error as its cause.

    Errors of Azure have an HTTP response in place of botocore's dict.
    """
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_transient(error: BaseException) -> bool:
    """Whether an error is worth another try: time-outs, resets and overload are; missing objects, denials and full
    disks are not."""
    if isinstance(error, (*NOT_FOUND, FileExistsError, PermissionError, StoreError)):
        return False
    if code_of(error) in _TRANSIENT_CODES:
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
"""Retries a call to a store: exponential backoff with jitter, seven tries, half a minute. Nothing else retries."""


def advice_on(error: OSError) -> str | None:
    """Advises what to do about an error that concerns the whole store; None if it may concern one object alone."""
    cause = str(error) + str(error.__cause__ or "")
    if any(code in cause for code in _DENIED_CODES):
        return "access denied; check the credentials in the environment, and that they have not expired"
    if "NoSuchBucket" in cause or "bucket does not exist" in cause:
        return NO_BUCKET
    by_number = {errno.ENOSPC: "the disk is full; free space", errno.EDQUOT: "the quota is used up; free space"}
    by_number[errno.EROFS] = "read-only; mount it writable"
    return by_number.get(error.errno or 0)
