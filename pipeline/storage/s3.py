"""Operations of S3 that fsspec does not offer: multipart uploads, conditional writes, paged listings.

Every `fs` is an s3fs.S3FileSystem; every `path` is bucket and key, such as bucket/folder/name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.storage.chunks import read_chunks
from pipeline.storage.faults import patiently
from pipeline.storage.listing import ObjectInfo, Page
from pipeline.storage.prefetch import map_ahead

PART_BYTES = 16 << 20
"""Bytes per part. S3 allows 10,000 parts, so objects may have up to 160 GB."""

_PARTS_AT_ONCE = 4


def upload_parts(fs: Any, path: str, file: Path, **options: Any) -> None:
    """Uploads a local file as one object, which readers see whole at the end or not at all.

    options: of the object, such as ContentType; IfMatch and IfNoneMatch are conditions on the object that it replaces.
    Raises OSError; its code_of is PreconditionFailed where a condition does not hold.
    """
    conditions = {name: options.pop(name) for name in ("IfMatch", "IfNoneMatch") if name in options}
    where = _where(path)
    where["UploadId"] = patiently(fs.call_s3)("create_multipart_upload", **where, **options)["UploadId"]

    def send(part: tuple[int, bytes]) -> dict[str, Any]:
        number, data = part
        sent = patiently(fs.call_s3)("upload_part", **where, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        with ThreadPoolExecutor(_PARTS_AT_ONCE, "upload") as pool:
            parts = list(map_ahead(pool, send, enumerate(read_chunks(file, PART_BYTES), 1), ahead=_PARTS_AT_ONCE))
        patiently(fs.call_s3)("complete_multipart_upload", **where, MultipartUpload={"Parts": parts}, **conditions)
    except BaseException:
        # The parts of an abandoned upload cost money until they are removed.
        with contextlib.suppress(Exception):
            fs.call_s3("abort_multipart_upload", **where)
        raise


def replace_object(fs: Any, path: str, data: bytes | Path, version: str) -> None:
    """Replaces an object only if its version (ETag) is still `version`. Raises OSError as upload_parts does."""
    condition = {"IfMatch": f'"{version}"'}
    if isinstance(data, Path):
        upload_parts(fs, path, data, **condition)
    else:
        patiently(fs.call_s3)("put_object", **_where(path), Body=data, **condition)


def list_pages(fs: Any, path: str, root: str) -> Iterator[Page]:
    """Lists every object below a path, by page; keys are relative to `root`. s3fs.find would hold all in memory."""
    bucket, _, prefix = path.partition("/")
    base = root.partition("/")[2]
    skip = len(base) + 1 if base else 0
    page: dict[str, Any] = {}
    while True:
        arguments = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        if page:
            arguments["ContinuationToken"] = page["NextContinuationToken"]
        page = patiently(fs.call_s3)("list_objects_v2", **arguments)
        yield Page.of(
            [
                ObjectInfo(item["Key"][skip:], item["Size"], item["ETag"].strip('"'), item["LastModified"].timestamp())
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")
            ]
        )
        if not page.get("IsTruncated"):
            return


def _where(path: str) -> dict[str, Any]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}
