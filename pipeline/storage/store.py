"""The store: all input and output of alfa, over fsspec (file, s3, gs, az, memory).

Writes are atomic: a reader sees a whole object or none. `create` is create-only: of many writers, one wins.
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
    NO_BUCKET,
    NOT_FOUND,
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
    """A folder, or a prefix of a bucket. Keys are relative to it, with `/` between their parts.

    Methods raise FileNotFoundError for a missing object, StoreError where the whole store cannot be used, and OSError
    for errors that persist after retries.
    """

    def __init__(self, root: str, storage: Storage | None = None) -> None:
        """root: a path or an fsspec URI. storage: how object storage is reached; credentials are in the environment.

        Raises AddressError if fsspec does not know the kind of store, or needs a package that is not installed.
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
        """The start of every address in this store: uri(key) is prefix + key."""

    def __repr__(self) -> str:
        return f"Store({self.uri('')!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri(""), self._storage)

    def uri(self, key: str) -> str:
        """Returns the address of a key: an absolute path on a local disk, else a URI. Raises ValueError for `..`."""
        if key:
            return self.prefix + _inside(key)
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    def key_of(self, uri: str) -> str | None:
        """Returns the key of an address below this root; None if the address lies elsewhere."""
        if uri.startswith(self.prefix):
            return uri[len(self.prefix) :]
        path, prefix = self.path_of(uri), self.path.rstrip("/") + "/"
        return path[len(prefix) :] if path.startswith(prefix) else None

    def path_of(self, uri: str) -> str:
        """Returns the path of an address in this file system (bucket and key, or a local path), else the address."""
        scheme, separator, _ = uri.partition("://")
        is_foreign = separator and scheme not in _protocols(self.fs)
        return uri if is_foreign else str(self.fs._strip_protocol(uri))

    def overlaps(self, other: Store) -> bool:
        """Whether one of the two roots is the other, or lies in it. Symbolic links are followed; s3a equals s3."""
        if type(self.fs) is not type(other.fs):
            return False
        roots = [os.path.realpath(store.path) if store.is_local else store.path for store in (self, other)]
        first, second = (root.rstrip("/") + "/" for root in roots)
        return first.startswith(second) or second.startswith(first)

    def read(self, key: str) -> bytes:
        """Reads a whole object."""
        return self._read(self._path(key))

    def open(self, key: str) -> BinaryIO:
        """Opens an object as a seekable file, to read parts of it, or more than fits in memory.

        Except on a local disk, each read is a request. The object must not be replaced meanwhile.
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
        """Reads the whole object at an address, inside or outside this root; see store_of.

        Raises AddressError where the address names another bucket that does not exist: this store can still be used.
        """
        with self._at(uri) as (store, path):
            return store._read(path)

    def store_of(self, uri: str) -> Store:
        """Returns the store to read an address from: this one for its own file system, else the named object store.

        Raises AddressError for other addresses, so that a table in a bucket cannot make alfa read a local disk.
        """
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme in _protocols(self.fs):
            return self
        if scheme not in _OBJECT_STORES:
            raise AddressError(f"{uri} is not read: images must lie in {self.uri('')}, or in s3, gs or az")
        return open_store(f"{scheme}://{rest.partition('/')[0]}", self._storage)

    def write(self, key: str, data: bytes | Path) -> None:
        """Creates or replaces an object in one step: after a crash, either the old or the new one is there as a whole.

        data: bytes, or a local file, which need not fit in memory.
        """
        with _as_store_error(self, key):
            if self.is_local:
                self._write_local(key, data, replace=True)
                return
            path, kind = self._path(key), _CONTENT_TYPES.get(posixpath.splitext(key)[1])
            # Without a content type, a browser downloads a report from a bucket instead of showing it.
            headers = {"ContentType": kind} if kind and self.is_s3 else {}
            data = _in_memory(data)
            if isinstance(data, Path) and self.is_s3:
                s3.upload_parts(self.fs, path, data, **headers)
            elif isinstance(data, Path):
                patiently(self.fs.put_file)(str(data), path)
            elif not (self.is_s3 and self._put_by_rust(path, data, kind)):
                patiently(self.fs.pipe_file)(path, data, **headers)

    def create(self, key: str, data: bytes | Path) -> bool:
        """Writes an object only if there is none (S3: If-None-Match). Returns whether this call created it.

        data: as in write. Contenders must write different data, such as an owner or a time.
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
                # s3fs raises a plain OSError if the condition If-None-Match does not hold.
                if code_of(error) != "PreconditionFailed":
                    raise
        # A request whose answer was lost is repeated (aiohttp does so by itself), and then finds its own object.
        return self.holds(key, data)

    def holds(self, key: str, data: bytes | Path) -> bool:
        """Whether an object exists and has this content."""
        try:
            if isinstance(data, bytes):
                return self.read(key) == data
            with self.open(key) as found:
                chunks = iter(lambda: found.read(s3.PART_BYTES), b"")
                return sha256_of(chunks) == sha256_of(read_chunks(data))
        except FileNotFoundError:
            return False

    def version(self, key: str) -> str | None:
        """Returns the version of an object for `replace`: it changes with every write. None if there is no object."""
        if self.is_local:
            return _local_version(Path(self._path(key)))
        try:
            return self.info(key).etag
        except FileNotFoundError:
            return None

    def replace(self, key: str, data: bytes | Path, version: str | None) -> bool:
        """Writes an object only if it still has this version (None: only if there is none). Returns whether it did.

        On S3 this is one step (If-Match; `alfa check` tells whether the store honours it), and so it is on a local disk
        (a lock between the processes of one host). Other stores compare first and then write. data: as in write;
        writers must write different data, such as an owner or a time.
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
        """Whether an object exists. Asks the store each time."""
        with _as_store_error(self, key):
            try:
                self.info(key)
            except NOT_FOUND:
                return False
            return True

    def info(self, key: str) -> ObjectInfo:
        """Returns size, version and time of one object, as a listing gives them."""
        return self._info(key, self._path(key))

    def info_uri(self, uri: str) -> ObjectInfo:
        """Returns the same for the object at an address, inside or outside this root; its key is the address.

        Raises AddressError as read_uri does.
        """
        with self._at(uri) as (store, path):
            return store._info(uri, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Streams every object below a folder and its sub-folders, always in the same order.

        A missing folder is empty.
        """
        for page in self.pages(prefix):
            yield from page.objects()

    def pages(self, prefix: str = "") -> Iterator[Page]:
        """Lists as `list` does, but some thousand objects at a time: use it for listings of millions."""
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
        """Lists the unfinished files that dead writers have left. Only local disks have such files."""
        if self.is_local:
            for page in walk_local(f"{self.path}/{STAGING}", f"{STAGING}/"):
                yield from page.objects()

    def probe(self) -> None:
        """Raises StoreError if the whole store does not answer, to tell that from a fault of one object."""
        try:
            next(self.list(), None)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{self.uri('')} does not answer ({type(error).__name__}: {error})") from error

    def delete(self, key: str) -> None:
        """Removes an object; a missing object is no error."""
        with _as_store_error(self, key), contextlib.suppress(FileNotFoundError):
            patiently(self.fs.rm_file)(self._path(key))

    def _path(self, key: str) -> str:
        return posixpath.join(self.path, _inside(key))

    @contextlib.contextmanager
    def _at(self, uri: str) -> Iterator[tuple[Store, str]]:
        """Yields the store to read an address from, and the address's path in it; see read_uri."""
        store = self.store_of(uri)
        path = store.path_of(uri)
        try:
            yield store, path
        except NoBucketError:
            if store is self and path.partition("/")[0] == self.path.partition("/")[0]:
                raise
            raise AddressError(f"{uri}: there is no such bucket") from None

    def _info(self, key: str, path: str) -> ObjectInfo:
        if self.is_local:
            status = os.stat(path)
            return ObjectInfo(key, status.st_size, local_etag(status.st_mtime_ns, status.st_size), status.st_mtime)
        with _as_store_error(self, key):
            self.fs.invalidate_cache()
            return describe(key, patiently(self.fs.info)(path))

    def _read(self, path: str) -> bytes:
        with _as_store_error(self, path):
            if self.is_s3:
                bucket, name = self._bucket_of(path)
                if (data := bucket.get(name)) is not None:
                    return data
            try:
                if self.is_local:
                    # A fifth of the time of the way below, which tries again, or says what is wrong.
                    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                        return file.read()
                return bytes(patiently(self.fs.cat_file)(path))
            except ValueError as error:  # a NUL, or characters that cannot be encoded
                raise OSError(errno.EINVAL, f"no object can have such a name: {error}") from None

    def _bucket_of(self, path: str) -> tuple[Bucket, str]:
        """Returns the bucket of a path, and the object's name in it."""
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
                # A hard link fails if the target exists, and shows the whole file at once; a rename would overwrite.
                _in_folder(target, lambda: os.link(staged, target))
            except FileExistsError:
                return False
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):  # os.replace has moved it
                os.unlink(staged)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl  # not on Windows

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
            # As in create: if the first answer was lost, the repeated request finds the object of the first.
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
        "max_concurrency": 1,  # above 1, every read begins with a HEAD request, whose denial carries no error code
    }


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _in_folder(path: str, act: Callable[[], _T]) -> _T:
    """Calls act; if the folder of path is missing, which is rare, makes it and calls act again."""
    try:
        return act()
    except FileNotFoundError:
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        return act()


def _in_memory(data: bytes | Path) -> bytes | Path:
    """Reads a file that is small enough for one S3 request into memory; returns other data unchanged."""
    return data.read_bytes() if isinstance(data, Path) and data.stat().st_size <= s3.PART_BYTES else data


def _local_version(path: Path) -> str | None:
    # Every write makes a new file, so the inode number distinguishes writes within one tick of the clock.
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
    """Turns errors of the whole store into StoreError with advice, and other errors of its clients into OSError."""
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
        message = f"{store.uri(key)} failed in several attempts: {type(error).__name__}: {error}"
        raise OSError(errno.EIO, message) from error


def _denial_of(store: Store) -> str | None:
    """Finds the reason of a denial with a listing, because a denied HEAD request carries none."""
    bucket = store.path.partition("/")[0]
    try:
        patiently(store.fs.call_s3)("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except OSError as error:
        return advice_on(error)
    return None


@functools.lru_cache(maxsize=64)
def open_store(root: str, storage: Storage) -> Store:
    """Opens a store. Callers in one process share it, so that connections and credentials are set up once."""
    return Store(root, storage)
