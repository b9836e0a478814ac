"""Store: all input and output of alfa, over fsspec (file, s3, gs, az, memory).

Writes are atomic: a reader sees the whole object or none. `create` is create-only: of many writers one wins.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import posixpath
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage import s3
from pipeline.storage.bucket import Bucket
from pipeline.storage.chunks import RangeReader, read_chunks, sha256_of
from pipeline.storage.faults import (
    DISK_ERRORS,
    LOST,
    NO_BUCKET,
    AddressError,
    DiskError,
    NoBucketError,
    StoreError,
    advice_on,
    code_of,
    is_transient,
    patiently,
)
from pipeline.storage.listing import STAGING, ObjectInfo, Page, describe, local_etag, walk_local
from schemas.job import Storage

_T = TypeVar("_T")

_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")

_CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".png": "image/png"}


class Store:
    """A folder or a prefix of a bucket. Keys are relative to it, with `/` between their parts.

    Methods raise FileNotFoundError for a missing object, StoreError where the whole store is out of use, and
    OSError for what stays wrong after retries.
    """

    def __init__(self, root: str, storage: Storage | None = None) -> None:
        """root: a path or an fsspec URI; storage: how object storage is reached (credentials: the environment).

        Raises AddressError where fsspec knows no such kind of store, or wants a package for it that is not installed.
        """
        self._storage = storage or Storage()
        try:
            fs, path = url_to_fs(root, **_fs_options(root, self._storage))
        except (ValueError, ImportError) as error:
            raise AddressError(f"{root} cannot be opened: {error}") from None
        self.fs: fsspec.AbstractFileSystem = fs
        fs.retries = 1  # patiently retries
        self.path: str = path.rstrip("/") or "/"
        self.is_local = isinstance(fs, LocalFileSystem)
        self.is_s3 = "s3" in _protocols(fs)
        self._buckets: dict[str, Bucket] = {}
        folder = self.path.rstrip("/") + "/"
        self.prefix: str = folder if self.is_local else str(fs.unstrip_protocol(folder))
        """What an address begins with: uri(key) is prefix + key."""

    def __repr__(self) -> str:
        return f"Store({self.uri('')!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri(""), self._storage)

    def uri(self, key: str) -> str:
        """The address of a key: an absolute path on local disk, else a URI."""
        if key:
            return self.prefix + _inside(key)
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    def key_of(self, uri: str) -> str | None:
        """The key below this root of an address in the same file system; None where it lies elsewhere."""
        if uri.startswith(self.prefix):
            return uri[len(self.prefix) :]
        path, prefix = self.path_of(uri), self.path.rstrip("/") + "/"
        return path[len(prefix) :] if path.startswith(prefix) else None

    def path_of(self, uri: str) -> str:
        """The path of an address in this file system: bucket and key, or the local path; else the address."""
        scheme, separator, _ = uri.partition("://")
        is_foreign = separator and scheme not in _protocols(self.fs)
        return uri if is_foreign else str(self.fs._strip_protocol(uri))

    def overlaps(self, other: Store) -> bool:
        """Whether one of the two roots is the other or lies in it; symbolic links are followed, s3a is s3."""
        if type(self.fs) is not type(other.fs):
            return False
        roots = [os.path.realpath(store.path) if store.is_local else store.path for store in (self, other)]
        first, second = (root.rstrip("/") + "/" for root in roots)
        return first.startswith(second) or second.startswith(first)

    def read(self, key: str) -> bytes:
        """The whole object."""
        return self._read(self._path(key))

    def open(self, key: str) -> BinaryIO:
        """The object as a file to seek and read in, for one of which a part is wanted, or that is larger than memory.

        Elsewhere than on a local disk each read is a request. The object must not be replaced meanwhile.
        """
        path = self._path(key)
        if self.is_local:
            with _as_store_error(self, key):
                return open(path, "rb")

        def read(start: int, end: int) -> bytes:
            with _as_store_error(self, key):
                return bytes(patiently(self.fs.cat_file)(path, start=start, end=end))

        return cast(BinaryIO, RangeReader(read, self.info(key).size or 0))

    def read_uri(self, uri: str) -> bytes:
        """The whole object at an address, inside or outside this root; see store_of.

        Raises AddressError where it names another bucket than this store's, and there is none: this store can be used.
        """
        store = self.store_of(uri)
        path = store.path_of(uri)
        try:
            return store._read(path)
        except NoBucketError:
            if store is self and path.partition("/")[0] == self.path.partition("/")[0]:
                raise
            raise AddressError(f"{uri}: there is no such bucket") from None

    def store_of(self, uri: str) -> Store:
        """The store to read an address from: this one for its own file system, else the object store that it names.

        Raises AddressError for other addresses: a table in a bucket has no say in what is read from a machine's disk.
        """
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme in _protocols(self.fs):
            return self
        if scheme not in _OBJECT_STORES:
            raise AddressError(f"{uri} is not read from {self.uri('')}; an image may lie there, or in s3, gs or az")
        return open_store(f"{scheme}://{rest.partition('/')[0]}", self._storage)

    def write(self, key: str, data: bytes | Path) -> None:
        """Creates or replaces the object in one step: after a crash either the old or the new one is there, whole.

        data: the bytes, or a local file, which need not fit in memory.
        """
        with _as_store_error(self, key):
            if self.is_local:
                self._write_local(key, data, replace=True)
                return
            path, kind = self._path(key), _CONTENT_TYPES.get(posixpath.splitext(key)[1])
            # Without its type, a browser saves what a bucket serves instead of showing it.
            headers = {"ContentType": kind} if kind and self.is_s3 else {}
            data = _in_memory(data)
            if isinstance(data, Path) and self.is_s3:
                s3.upload_parts(self.fs, path, data, **headers)
            elif isinstance(data, Path):
                patiently(self.fs.put_file)(str(data), path)
            elif not (self.is_s3 and self._put_by_rust(path, data, kind)):
                patiently(self.fs.pipe_file)(path, data, **headers)

    def create(self, key: str, data: bytes | Path) -> bool:
        """Writes the object only if there is none (S3: If-None-Match). Returns whether it was this call that did.

        data: as in write. Contenders must write different data (an owner, a time).
        """

        with _as_store_error(self, key):
            if self.is_local:
                return self._write_local(key, data, replace=False)
            try:
                self._create_remote(key, data)
                return True
            except FileExistsError:
                pass
            except OSError as error:
                # s3fs has no exception of its own for an If-None-Match that did not match.
                if code_of(error) != "PreconditionFailed":
                    raise
        # A request whose answer was lost is sent again (by aiohttp too, unasked), and meets its own object.
        return self.holds(key, data)

    def holds(self, key: str, data: bytes | Path) -> bool:
        """Whether the object is there and has this content."""
        try:
            if isinstance(data, bytes):
                return self.read(key) == data
            with self.open(key) as found:
                chunks = iter(lambda: found.read(s3.PART_BYTES), b"")
                return sha256_of(chunks) == sha256_of(read_chunks(data))
        except FileNotFoundError:
            return False

    def version(self, key: str) -> str | None:
        """What `replace` compares: another one for each object that is written here; None where there is none."""
        if self.is_local:
            return _local_version(Path(self._path(key)))
        try:
            return self.info(key).etag
        except FileNotFoundError:
            return None

    def replace(self, key: str, data: bytes | Path, version: str | None) -> bool:
        """Writes the object only if it is still of this version (None: there is none yet). Returns whether it was.

        data: as in write. In one step on S3 (If-Match; `alfa check` tells whether the store honours it) and on a local
        disk (a lock that holds between processes of one host); in other stores it is compared first, then written.
        Writers must write different data (an owner, a time).
        """
        if version is None:
            return self.create(key, data)
        with _as_store_error(self, key):
            if self.is_local:
                with self._locked():
                    if _local_version(Path(self._path(key))) != version:
                        return False
                    return self._write_local(key, data, replace=True)
            if self.is_s3:
                return self._replace_s3(key, data, version)
        if self.version(key) != version:
            return False
        self.write(key, data)
        return True

    def exists(self, key: str) -> bool:
        """Whether the object is there, asked anew (no cached listing)."""
        with _as_store_error(self, key):
            try:
                self.info(key)
            except LOST:
                return False
            return True

    def info(self, key: str) -> ObjectInfo:
        """Size and version of one object, as a listing gives them."""
        if self.is_local:
            status = os.stat(self._path(key))
            return ObjectInfo(key, status.st_size, local_etag(status.st_mtime_ns, status.st_size), status.st_mtime)
        with _as_store_error(self, key):
            self.fs.invalidate_cache()
            return describe(key, patiently(self.fs.info)(self._path(key)))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below a folder, streamed in a steady order, sub-folders included; none where it is missing."""
        for page in self.pages(prefix):
            yield from page.objects()

    def pages(self, prefix: str = "") -> Iterator[Page]:
        """What list gives, some thousand objects at a time, for who lists millions."""
        with _as_store_error(self, prefix):
            top = self._path(prefix) if prefix else self.path
            if self.is_local:
                yield from walk_local(top, f"{prefix}/" if prefix else "")
            elif self.is_s3:
                yield from s3.list_pages(self.fs, top, self.path)
            else:
                self.fs.invalidate_cache()
                root = self.path.rstrip("/") + "/"
                found = sorted(self.fs.find(top, detail=True).items())
                yield Page.of([describe(str(path)[len(root) :], info) for path, info in found])

    def leftovers(self) -> Iterator[ObjectInfo]:
        """What writers that died have left of unfinished objects: local disks alone have such files."""
        if self.is_local:
            for page in walk_local(f"{self.path}/{STAGING}", f"{STAGING}/"):
                yield from page.objects()

    def probe(self) -> None:
        """Raises StoreError where the store as a whole does not answer, rather than one object."""
        try:
            next(self.list(), None)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{self.uri('')} does not answer ({type(error).__name__}: {error})") from error

    def delete(self, key: str) -> None:
        """Removes the object; one that is not there is no error."""
        with _as_store_error(self, key), contextlib.suppress(FileNotFoundError):
            patiently(self.fs.rm_file)(self._path(key))

    def _path(self, key: str) -> str:
        return posixpath.join(self.path, _inside(key))

    def _read(self, path: str) -> bytes:
        with _as_store_error(self, path):
            if self.is_s3:
                bucket, name = self._bucket_of(path)
                if (data := bucket.get(name)) is not None:
                    return data
            try:
                return bytes(patiently(self.fs.cat_file)(path))
            except ValueError as error:  # a NUL, or what no encoding of names can hold
                raise OSError(errno.EINVAL, f"no object can have such a name: {error}") from None

    def _bucket_of(self, path: str) -> tuple[Bucket, str]:
        """The bucket of a path, and the object's name in it."""
        name, _, key = path.partition("/")
        if name not in self._buckets:
            self._buckets[name] = Bucket(name, self.fs)
        return self._buckets[name], key

    def _put_by_rust(self, path: str, data: bytes, content_type: str | None) -> bool:
        bucket, name = self._bucket_of(path)
        return bucket.put(name, data, content_type)

    def _write_local(self, key: str, data: bytes | Path, *, replace: bool) -> bool:
        target, staged = self._path(key), posixpath.join(self.path, STAGING, uuid.uuid4().hex)
        try:
            with _in_folder(staged, lambda: open(staged, "xb")) as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                _in_folder(target, lambda: os.replace(staged, target))
                return True
            try:
                # A hard link fails where the target exists, and shows the whole file at once: rename would overwrite.
                _in_folder(target, lambda: os.link(staged, target))
            except FileExistsError:
                return False
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):  # rename has taken it away
                os.unlink(staged)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl  # POSIX alone has it

        folder = Path(self.path) / STAGING
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _create_remote(self, key: str, data: bytes | Path) -> None:
        path, data = self._path(key), _in_memory(data)
        if isinstance(data, bytes):
            patiently(self.fs.pipe_file)(path, data, mode="create")
        elif self.is_s3:
            s3.upload_parts(self.fs, path, data, IfNoneMatch="*")
        else:
            patiently(self.fs.put_file)(str(data), path, mode="create")

    def _replace_s3(self, key: str, data: bytes | Path, version: str) -> bool:
        try:
            s3.replace_object(self.fs, self._path(key), _in_memory(data), version)
        except FileNotFoundError:
            return self.holds(key, data)
        except OSError as error:
            if code_of(error) != "PreconditionFailed":
                raise
            # As in create: the answer may have been lost, and the second request met the first one's object.
            return self.holds(key, data)
        return True


def _fs_options(root: str, storage: Storage) -> dict[str, Any]:
    if urlsplit(root).scheme not in ("s3", "s3a"):
        return {}
    client: dict[str, Any] = {}
    if storage.region:
        client["region_name"] = storage.region
    endpoint = storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {
        "anon": storage.anonymous,
        "endpoint_url": endpoint,
        "client_kwargs": client,
        "config_kwargs": {
            "max_pool_connections": 32,
            "retries": {"total_max_attempts": 1},  # patiently retries
            **({"s3": {"addressing_style": "path"}} if endpoint else {}),
        },
        "use_listings_cache": False,
        "max_concurrency": 1,  # above it, every read begins with a HEAD, whose denial has no code
    }


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _in_folder(path: str, act: Callable[[], _T]) -> _T:
    """Makes the folder of path where that is what act lacks: nearly always it is there."""
    try:
        return act()
    except FileNotFoundError:
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        return act()


def _in_memory(data: bytes | Path) -> bytes | Path:
    """The content of a small file, as S3 takes it in one request."""
    return data.read_bytes() if isinstance(data, Path) and data.stat().st_size <= s3.PART_BYTES else data


def _local_version(path: Path) -> str | None:
    # Every write makes a new file, so its number tells apart what came within one tick of the clock.
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _inside(key: str) -> str:
    if key.startswith("/") or ".." in key.split("/"):
        raise ValueError(f"{key!r} would leave the store")
    return key


@contextlib.contextmanager
def _as_store_error(store: Store, key: str) -> Iterator[None]:
    """Turns what makes the whole store unusable into StoreError, with what to do about it, and what clients of object
    stores raise besides OSError into OSError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        advice = advice_on(error)
        if advice is None and code_of(error) == "403":
            advice = _denial_of(store)
        if advice is None:
            raise
        kind = NoBucketError if advice == NO_BUCKET else DiskError if error.errno in DISK_ERRORS else StoreError
        raise kind(f"{store.uri('')}: {advice} ({key or 'root'}: {type(error).__name__})") from error
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise StoreError(
                f"{store.uri('')}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        if not is_transient(error):
            raise
        message = f"{store.uri(key)} did not come through in several attempts: {type(error).__name__}: {error}"
        raise OSError(errno.EIO, message) from error


def _denial_of(store: Store) -> str | None:
    """A HEAD that is denied says nothing of the reason; a listing does."""
    bucket = store.path.partition("/")[0]
    try:
        patiently(store.fs.call_s3)("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except OSError as error:
        return advice_on(error)
    return None


@functools.lru_cache(maxsize=64)
def open_store(root: str, storage: Storage) -> Store:
    """A store shared by all callers of this process: connections and credentials are set up once."""
    return Store(root, storage)
