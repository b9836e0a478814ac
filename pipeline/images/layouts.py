"""Turns folders and tables into manifest rows. Listings are streamed: no step holds all keys in Python objects."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, groupby, islice, repeat
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv

from pipeline.images import tables
from pipeline.images.suffixes import SUFFIXES, describe_left_out, image_pages, resolve_suffixes
from pipeline.images.tables import GOOD
from pipeline.storage import ObjectInfo, Page, Store, open_store
from schemas.job import Dataset, References, Storage, without_credentials
from schemas.tables import MANIFEST
from schemas.text import one_line

logger = logging.getLogger(__name__)

_VISA_SPLIT = "split_csv/1cls.csv"
_BATCH = 16_384
_KEYS_EXAMINED = 2000
"""Keys that layout `auto` examines before it decides."""


class _Row(NamedTuple):
    """A listed image: a row of the manifest without its id."""

    uri: str
    key: str
    class_name: str
    size: int | None
    etag: str | None
    label: str | None = None
    mask_uri: str | None = None


_Columns = Mapping[str, Sequence[Any]]
"""Rows by column, all of the same length. Millions of rows are handled as lists, without a Python call for each."""


class DatasetError(ValueError):
    """The images cannot be listed; the message says what was found and what is expected."""


@dataclass(frozen=True)
class ImageSource:
    """An opened dataset.

    store: the root of the images, or the folder of the table. layout: never `auto`. class_name: see open_dataset.
    table_key: the table's file; empty for a folder of parts, None for other layouts. may_be_empty: see open_dataset.
    suffixes: suffixes of images; ignored for tables.
    """

    store: Store
    layout: str
    class_name: str | None
    table_key: str | None
    may_be_empty: bool = False
    suffixes: tuple[str, ...] = SUFFIXES


def open_dataset(
    dataset: Dataset, storage: Storage, output: Store | None = None, *, may_be_empty: bool = False
) -> ImageSource:
    """Finds the root and the layout of the images.

    In layout flat, and in a table without class names, dataset.class_name is the class of all images. In other layouts
    it selects the class that is listed. output: the store of the results, if there are any. may_be_empty: having no
    images is no error, here and in list_images.

    Raises DatasetError if no layout is recognised, or if the images and the output overlap: the next night would then
    score this night's masks.
    """
    store = open_store(dataset.images, storage)
    is_table = dataset.images.lower().endswith(tables.SUFFIXES) and dataset.layout in ("auto", "table")
    if is_table and not tables.has_parts(store):
        folder, _, name = dataset.images.rpartition("/")
        store = open_store(folder or ".", storage)
        if not store.exists(name):
            raise DatasetError(f"the table {dataset.images} does not exist")
        return ImageSource(store, "table", dataset.class_name, name, may_be_empty)
    if output is not None and store.overlaps(output):
        raise DatasetError(
            f"output.uri {output.uri('')} and dataset.images {store.uri('')} must not overlap, or the next night would "
            f"score masks as photos. Give the results a folder of their own"
        )
    suffixes = resolve_suffixes(dataset.suffixes)
    layout = str(dataset.layout)
    if layout == "auto":
        layout = _recognise(store, dataset.class_name, suffixes, may_be_empty)
    if layout != "table":
        return ImageSource(store, layout, dataset.class_name, None, may_be_empty, suffixes)
    if not tables.has_parts(store):
        raise DatasetError(f"layout table needs a {_TABLES_HELP}, not {dataset.images}")
    return ImageSource(store, layout, dataset.class_name, "", may_be_empty)


def list_images(source: ImageSource, left_out: Counter[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yields manifest rows in batches, always in the same order, and each image once.

    left_out: counts objects that are no images, by suffix, see describe_left_out. Raises DatasetError for a faulty
    table, and if there are no images unless source.may_be_empty.
    """
    left_out = Counter() if left_out is None else left_out
    listed, classes = _list_columns(source, left_out), set[str]()
    empty = source.layout != "table" and not source.may_be_empty
    for columns in _merge(_unique(listed) if source.layout == "table" else listed):
        try:
            yield _to_batch(columns)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            place = source.store.uri(source.table_key or "")
            raise DatasetError(f"{place}: a column has the wrong type: {one_line(str(error))[:300]}") from None
        empty = False
        classes.update(columns["class_name"])
    if source.layout == "folders" and classes and tables.are_parts(classes):
        logger.warning(
            "the classes would be %s, each compared within itself; if they are of one class, name the folder above, or "
            "take dataset.layout=flat with dataset.class_name",
            ", ".join(sorted(classes)),
        )
    if empty:
        wanted = f" of class {source.class_name!r}" if source.class_name else ""
        place = f"{source.store.uri('')} in layout {source.layout}{_but_for(left_out)}"
        raise DatasetError(f"no images{wanted} at {place}; {_LAYOUTS_HELP}")


def list_references(
    references: References, dataset: Dataset, source: ImageSource, storage: Storage
) -> list[dict[str, Any]]:
    """Lists the known-good images that a job names, as manifest rows of all classes, always in the same order.

    source: the opened dataset. Raises DatasetError if there are none, or the layout has no train images.
    """
    if references.images == "train":
        if source.layout not in _TRAIN_LISTERS:
            raise DatasetError(
                f"references.images is train, but layout {source.layout} has no train images (mvtec and visa have); "
                f"name the folder of the references"
            )
        found = source
    else:
        known = Dataset(images=references.images, class_name=dataset.class_name, suffixes=dataset.suffixes)
        found = open_dataset(known, storage)
    images = [
        image for columns in _list_columns(found, Counter(), train=True) for image in _to_batch(columns).to_pylist()
    ]
    known_good = [image for image in images if image["label"] in (None, GOOD)]
    if not known_good:
        raise DatasetError(f"no known-good images at {found.store.uri('')} in layout {found.layout}")
    return known_good


_TABLES_HELP = f"{', '.join(tables.SUFFIXES)} file or a folder of Parquet files"
_LAYOUTS_HELP = (
    "layouts: folders (root/class/...), flat (one class, named by dataset.class_name), mvtec (class/test/kind/...), "
    f"visa (split_csv/1cls.csv), table (a {_TABLES_HELP}, with columns uri and class_name)"
)


def _but_for(left_out: Mapping[str, int]) -> str:
    return f" (there are {describe_left_out(left_out)}; see dataset.suffixes)" if left_out else ""


def _recognise(store: Store, class_name: str | None, suffixes: tuple[str, ...], may_be_empty: bool) -> str:
    if store.exists(_VISA_SPLIT):
        return "visa"
    left_out: Counter[str] = Counter()
    listed = chain.from_iterable(page.keys for page in image_pages(store, suffixes, left_out))
    try:
        keys = list(islice(listed, _KEYS_EXAMINED))
    except NotADirectoryError:
        raise DatasetError(f"{store.uri('')} is a file, but not a table that alfa reads; {_LAYOUTS_HELP}") from None
    if not keys and tables.has_parts(store):
        return "table"
    if not keys and may_be_empty:
        return "folders"
    if not keys:
        raise DatasetError(f"no images at {store.uri('')}{_but_for(left_out)}; {_LAYOUTS_HELP}")
    parts = [key.split("/") for key in keys]
    if any(len(part) == 4 and part[1] in ("test", "ground_truth") for part in parts):
        return "mvtec"
    if class_name is not None and all(len(part) == 1 for part in parts):
        return "flat"
    if any(len(part) > 1 for part in parts):
        return "folders"
    raise DatasetError(
        f"{store.uri('')} has images, but no folders that name their classes; name the class (--class), or use another "
        f"layout; {_LAYOUTS_HELP}"
    )


def _list_keys(source: ImageSource, left_out: Counter[str]) -> Iterator[ObjectInfo]:
    return chain.from_iterable(page.objects() for page in image_pages(source.store, source.suffixes, left_out))


def _list_columns(source: ImageSource, left_out: Counter[str], *, train: bool = False) -> Iterator[_Columns]:
    """Lists the images, some at a time. left_out: counts other objects. train: list the train images instead, if the
    layout has any.

    Raises DatasetError where a table or split file is faulty.
    """
    lister = _TRAIN_LISTERS.get(source.layout) if train else None
    try:
        for columns in (lister or _LISTERS[source.layout])(source, left_out):
            if source.class_name is None or source.layout == "flat":
                yield columns
            else:
                yield _where(columns, [name == source.class_name for name in columns["class_name"]])
    except DatasetError:
        raise
    except ValueError as error:
        message = f"{source.store.uri(source.table_key or '')}, layout {source.layout}: {one_line(str(error))[:300]}"
        raise DatasetError(message) from None


def _by_column(list_rows: Callable[..., Iterator[_Row]]) -> Callable[..., Iterator[_Columns]]:
    """Decorates a lister that yields single rows, so that it yields them by column."""

    @functools.wraps(list_rows)
    def list_columns(*arguments: Any) -> Iterator[_Columns]:
        rows = list_rows(*arguments)
        while some := list(islice(rows, _BATCH)):
            yield dict(zip(_Row._fields, zip(*some, strict=True), strict=True))

    return list_columns


def _list_flat(source: ImageSource, left_out: Counter[str]) -> Iterator[_Columns]:
    for page in image_pages(source.store, source.suffixes, left_out):
        yield _describe_page(source.store, page, [str(source.class_name)] * len(page.keys))


def _list_folders(source: ImageSource, left_out: Counter[str]) -> Iterator[_Columns]:
    """Lists root/class/**. Images directly in the root get class `unsorted`, so that they are not lost."""
    for page in image_pages(source.store, source.suffixes, left_out):
        classes = [key.partition("/")[0] if "/" in key else "unsorted" for key in page.keys]
        yield _describe_page(source.store, page, classes)


def _describe_page(store: Store, page: Page, classes: Sequence[str]) -> _Columns:
    uris = [store.prefix + key for key in page.keys]
    return {"uri": uris, "key": page.keys, "class_name": classes, "size": page.sizes, "etag": page.etags}


@_by_column
def _list_mvtec(source: ImageSource, left_out: Counter[str]) -> Iterator[_Row]:
    """Lists class/test/kind/image with the masks at class/ground_truth/kind/image_mask.png, without train images."""
    for class_name, infos in groupby(_list_keys(source, left_out), key=lambda info: info.key.partition("/")[0]):
        tests: list[ObjectInfo] = []
        masks: dict[str, str] = {}
        for info in infos:
            parts = info.key.split("/")
            if len(parts) == 4 and parts[1] == "test":
                tests.append(info)
            elif len(parts) == 4 and parts[1] == "ground_truth":
                stem = posixpath.splitext(parts[3])[0].removesuffix("_mask")
                masks[f"{parts[2]}/{stem}"] = source.store.uri(info.key)
        for info in tests:
            kind, name = info.key.split("/")[2:]
            mask = None if kind == GOOD else masks.get(f"{kind}/{posixpath.splitext(name)[0]}")
            yield _row(source.store, info, class_name, kind, mask)


@_by_column
def _list_mvtec_train(source: ImageSource, left_out: Counter[str]) -> Iterator[_Row]:
    """Lists class/train/good/image."""
    for info in _list_keys(source, left_out):
        parts = info.key.split("/")
        if len(parts) == 4 and parts[1:3] == ["train", GOOD]:
            yield _row(source.store, info, parts[0], GOOD)


@_by_column
def _list_visa(source: ImageSource, _: Counter[str], split: str = "test") -> Iterator[_Row]:
    """Lists a split of split_csv/1cls.csv. An image that the file names gets a row even if it is missing."""
    table = pa.csv.read_csv(io.BytesIO(source.store.read(_VISA_SPLIT)), convert_options=_STRINGS)
    tables.require_columns(
        table.column_names, ("object", "split", "label", "image", "mask"), source.store.uri(_VISA_SPLIT)
    )
    rows = [row for row in table.to_pylist() if row["split"] == split]
    if not all(row["object"] and row["image"] for row in rows):
        raise DatasetError(f"{source.store.uri(_VISA_SPLIT)}: a row of split {split} has no object or no image")
    for class_name, group in groupby(rows, key=lambda row: row["object"]):
        found = {info.key: info for info in source.store.list(class_name)} if "/" not in class_name else {}
        for row in group:
            key = row["image"]
            info = found.get(key, ObjectInfo(key, None, None))
            label = GOOD if row["label"] == "normal" else "anomaly"
            mask = source.store.uri(row["mask"]) if row["mask"] else None
            yield _Row(source.store.uri(key), key, class_name, info.size, info.etag, label, mask)


@_by_column
def _list_table(source: ImageSource, _: Counter[str]) -> Iterator[_Row]:
    """Lists the rows of a table. A uri is absolute, or relative to the table's folder. The job may name the class."""
    labels, number = tables.Labels(), 0
    wanted = ("uri",) if source.class_name else ("uri", "class_name")
    for rows in tables.read_table(source.store, str(source.table_key), wanted):
        columns = {"class_name": repeat(source.class_name), **rows}
        values = (columns.get(name, repeat(None)) for name in tables.COLUMNS)
        for address, given, size, etag, label, mask in zip(*values, strict=False):
            number += 1
            uri, class_name, etag, mask = map(tables.to_text, (address, given, etag, mask))
            if not uri or not class_name:
                raise ValueError(f"row {number} has no {'class_name' if uri else 'uri'}")
            uri, key = _locate(source.store, _resolve(source.store, uri))
            mask = _resolve(source.store, mask) if mask else None
            yield _Row(uri, key, class_name, size, etag, labels.read(label), mask)


_Lister = Callable[[ImageSource, Counter[str]], Iterator[_Columns]]

_LISTERS: dict[str, _Lister] = {
    "flat": _list_flat,
    "folders": _list_folders,
    "mvtec": _list_mvtec,
    "visa": _list_visa,
    "table": _list_table,
}

_TRAIN_LISTERS: dict[str, _Lister] = {
    "mvtec": _list_mvtec_train,
    "visa": lambda source, left_out: _list_visa(source, left_out, "train"),
}

_STRINGS = pa.csv.ConvertOptions(
    column_types={name: pa.string() for name in ("object", "split", "label", "image", "mask")}, strings_can_be_null=True
)


def _resolve(store: Store, uri: str) -> str:
    """Makes an address absolute that may be relative to the store's root. Raises ValueError if it has credentials."""
    if "@" in uri or "?" in uri:
        without_credentials(uri)
    if "://" in uri or uri.startswith("/"):
        return uri
    scheme, separator, root = store.uri("").rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(f'{root}/{uri}')}"


def _locate(store: Store, uri: str) -> tuple[str, str]:
    """Returns an address in the store's spelling, and its key: the path below the root, or for an address elsewhere `/`
    and the whole path.

    Different addresses never have the same key, so two images never share a mask.
    """
    key = store.key_of(uri)
    if key is None or key.startswith("/"):
        return uri, "/" + store.path_of(uri).lstrip("/")
    return store.prefix + key, key


def _unique(listed: Iterator[_Columns]) -> Iterator[_Columns]:
    """Keeps the first row of each uri, so that an image has exactly one row. Memory: a digest of 16 bytes per image."""
    seen: set[bytes] = set()
    repeated = 0
    for columns in listed:
        new = []
        for uri in columns["uri"]:
            digest = hashlib.blake2b(uri.encode(), digest_size=16).digest()
            new.append(digest not in seen)
            seen.add(digest)
        repeated += new.count(False)
        yield _where(columns, new)
    if repeated:
        logger.warning("the table names %d images more than once; the first row of each is used", repeated)


def _where(columns: _Columns, wanted: Sequence[bool]) -> _Columns:
    """Keeps the rows for which `wanted` is true."""
    return columns if all(wanted) else {name: list(compress(values, wanted)) for name, values in columns.items()}


def _merge(listed: Iterator[_Columns]) -> Iterator[_Columns]:
    """Joins small batches of rows into larger ones, and drops empty ones."""
    merged: defaultdict[str, list[Any]] = defaultdict(list)
    for columns in listed:
        for name, values in columns.items():
            merged[name].extend(values)
        if len(merged["uri"]) >= _BATCH:
            yield merged
            merged = defaultdict(list)
    if merged["uri"]:
        yield merged


def _row(
    store: Store, info: ObjectInfo, class_name: str, label: str | None = None, mask_uri: str | None = None
) -> _Row:
    key, size, etag, _ = info
    return _Row._make((store.prefix + key, key, class_name, size, etag, label, mask_uri))


def _to_batch(columns: _Columns) -> pa.RecordBatch:
    known = {**columns, "image_id": list(map(_identify, columns["uri"], columns["etag"]))}
    missing = [None] * len(columns["uri"])
    arrays = [pa.array(known.get(item.name, missing), item.type) for item in MANIFEST]
    return pa.RecordBatch.from_arrays(arrays, schema=MANIFEST)


def _identify(uri: str, etag: str | None) -> str:
    return hashlib.blake2b(f"{uri}\0{etag or ''}".encode(), digest_size=16).hexdigest()
