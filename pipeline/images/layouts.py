"""How folders and tables become manifest rows. Listings stream: no step holds all keys in Python objects."""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import logging
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice, repeat
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.storage import ObjectInfo, Page, Store, open_store
from schemas.job import Dataset, References, Storage, without_credentials
from schemas.tables import MANIFEST
from schemas.text import one_line

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
GOOD = "good"

_VISA_SPLIT = "split_csv/1cls.csv"
_TABLES = (".parquet", ".csv")
_BATCH = 16_384
_LOOKED_AT = 2000
"""Keys that `auto` looks at before it decides."""


class _Row(NamedTuple):
    """An image as the listings name it: a row of the manifest, less its id."""

    uri: str
    key: str
    class_name: str
    size: int | None
    etag: str | None
    label: str | None = None
    mask_uri: str | None = None


class DatasetError(ValueError):
    """The images cannot be listed; the message says what was found and what is expected."""


@dataclass(frozen=True)
class ImageSource:
    """Opened images. store: their root (layout table: the table's folder); layout: never `auto`."""

    store: Store
    layout: str
    class_name: str | None
    table_key: str | None


def open_dataset(dataset: Dataset, storage: Storage) -> ImageSource:
    """Finds the root and the layout of the images. Raises DatasetError where none can be told.

    With dataset.class_name and another layout than flat, only that class is listed.
    """
    if dataset.images.lower().endswith(_TABLES) and dataset.layout in ("auto", "table"):
        folder, _, name = dataset.images.rpartition("/")
        store = open_store(folder or ".", storage)
        if not store.exists(name):
            raise DatasetError(f"the table {dataset.images} is not there")
        return ImageSource(store, "table", dataset.class_name, name)
    store = open_store(dataset.images, storage)
    layout = dataset.layout if dataset.layout != "auto" else _recognise(store, dataset.class_name)
    if layout == "table":
        raise DatasetError(f"layout table wants a .parquet or .csv file, not {dataset.images}")
    return ImageSource(store, layout, dataset.class_name, None)


def list_images(source: ImageSource) -> Iterator[pa.RecordBatch]:
    """Manifest rows in batches, in a steady order; each image once.

    Raises DatasetError for a faulty table, and where folders hold nothing to score.
    """
    rows = _unique(_list_rows(source)) if source.layout == "table" else _list_rows(source)
    empty = source.layout != "table"
    while True:
        try:
            batch = _to_batch(islice(rows, _BATCH))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            place = source.store.uri(source.table_key or "")
            raise DatasetError(f"{place}: a column has the wrong type: {one_line(str(error))[:300]}") from None
        if not batch.num_rows:
            break
        yield batch
        empty = False
    if empty:
        wanted = f" of class {source.class_name!r}" if source.class_name else ""
        raise DatasetError(f"no images{wanted} at {source.store.uri('')} in layout {source.layout}; {_LAYOUTS_HELP}")


def list_references(
    references: References, dataset: Dataset, source: ImageSource, storage: Storage
) -> list[dict[str, Any]]:
    """Manifest rows of the known-good images that a job names, of every class, in a steady order.

    source: the opened dataset. Raises DatasetError where there are none, or the layout has no train images.
    """
    if references.images == "train":
        if source.layout not in _TRAIN_LISTERS:
            raise DatasetError(
                f"references.images is train, but layout {source.layout} has no train images (mvtec and visa have); "
                f"name the folder of the references"
            )
        found = source
    else:
        found = open_dataset(Dataset(images=references.images, class_name=dataset.class_name), storage)
    rows = [row for row in _list_rows(found, train=True) if row.label in (None, GOOD)]
    if not rows:
        raise DatasetError(f"no known-good images at {found.store.uri('')} in layout {found.layout}")
    images: list[dict[str, Any]] = _to_batch(rows).to_pylist()
    return images


_LAYOUTS_HELP = (
    "layouts: folders (root/class/...), flat (one class, named by dataset.class_name), mvtec (class/test/kind/...), "
    "visa (split_csv/1cls.csv), table (a .parquet or .csv file with uri and class_name)"
)


def _recognise(store: Store, class_name: str | None) -> str:
    if store.exists(_VISA_SPLIT):
        return "visa"
    keys = [info.key for info in islice(_list_keys(store), _LOOKED_AT)]
    if not keys:
        raise DatasetError(f"no images at {store.uri('')}; {_LAYOUTS_HELP}")
    parts = [key.split("/") for key in keys]
    if any(len(part) == 4 and part[1] in ("test", "ground_truth") for part in parts):
        return "mvtec"
    if class_name is not None and all(len(part) == 1 for part in parts):
        return "flat"
    if any(len(part) > 1 for part in parts):
        return "folders"
    raise DatasetError(
        f"{store.uri('')} holds images, but no folders that would name their class; name it (--class), or use another "
        f"layout; {_LAYOUTS_HELP}"
    )


def _list_keys(store: Store) -> Iterator[ObjectInfo]:
    return chain.from_iterable(page.objects() for page in _list_pages(store))


def _list_pages(store: Store) -> Iterator[Page]:
    """Images by their suffix; hidden files and folders are left out."""
    for page in store.pages():
        images = page.where([_is_image(key) for key in page.keys])
        yield images._replace(keys=[key if key.isascii() else _in_unicode(key) for key in images.keys])


def _is_image(key: str) -> bool:
    return key.lower().endswith(SUFFIXES) and not key.startswith(".") and "/." not in key


def _in_unicode(key: str) -> str:
    """A local file whose name is no UTF-8 fits in no table: under a readable name it gets its row, as an error."""
    readable = os.fsencode(key).decode("utf-8", "backslashreplace")
    if readable != key:
        logger.warning("%s: the name of this file is not UTF-8, so it cannot be scored; rename it", readable)
    return readable


def _list_rows(source: ImageSource, *, train: bool = False) -> Iterator[_Row]:
    """train: the train images instead, where the layout tells them from the others."""
    lister = _TRAIN_LISTERS.get(source.layout) if train else None
    rows = _say_faults((lister or _LISTERS[source.layout])(source), source)
    if source.class_name is None or source.layout == "flat":
        return rows
    return (row for row in rows if row.class_name == source.class_name)


def _say_faults(rows: Iterator[_Row], source: ImageSource) -> Iterator[_Row]:
    """What a table or split file names may be no address, or lie outside the data set."""
    try:
        yield from rows
    except DatasetError:
        raise
    except ValueError as error:
        message = f"{source.store.uri(source.table_key or '')}, layout {source.layout}: {one_line(str(error))[:300]}"
        raise DatasetError(message) from None


def _list_flat(source: ImageSource) -> Iterator[_Row]:
    return _list_classes(source.store, lambda key: str(source.class_name))


def _list_folders(source: ImageSource) -> Iterator[_Row]:
    """root/class/**; an image that lies in the root itself gets class `unsorted`, so that it is not lost."""
    return _list_classes(source.store, lambda key: key.partition("/")[0] if "/" in key else "unsorted")


def _list_classes(store: Store, name_class: Callable[[str], str]) -> Iterator[_Row]:
    """Rows of all images, by the page: these layouts have no other rows, and may have many millions of them."""
    for keys, sizes, etags, _ in _list_pages(store):
        uris, classes = (store.prefix + key for key in keys), map(name_class, keys)
        yield from map(_Row._make, zip(uris, keys, classes, sizes, etags, repeat(None), repeat(None)))


def _list_mvtec(source: ImageSource) -> Iterator[_Row]:
    """class/test/kind/image, with the ground truth at class/ground_truth/kind/image_mask.png; train is not scored."""
    for class_name, infos in groupby(_list_keys(source.store), key=lambda info: info.key.partition("/")[0]):
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


def _list_mvtec_train(source: ImageSource) -> Iterator[_Row]:
    """class/train/good/image."""
    for info in _list_keys(source.store):
        parts = info.key.split("/")
        if len(parts) == 4 and parts[1:3] == ["train", GOOD]:
            yield _row(source.store, info, parts[0], GOOD)


def _list_visa(source: ImageSource, split: str = "test") -> Iterator[_Row]:
    """A split of split_csv/1cls.csv; an image that the file names and that is not there gets its row too."""
    table = pa.csv.read_csv(io.BytesIO(source.store.read(_VISA_SPLIT)), convert_options=_STRINGS)
    _require_columns(table.column_names, ("object", "split", "label", "image", "mask"), source.store.uri(_VISA_SPLIT))
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


def _list_table(source: ImageSource) -> Iterator[_Row]:
    """Rows of a Parquet or CSV file; an uri is absolute, or relative to the table's folder."""
    name = str(source.table_key)
    place, number = source.store.uri(name), 0
    for batch in _read_table(source.store, name):
        _require_columns(batch.schema.names, ("uri", "class_name"), place)
        names = ("uri", "class_name", "size", "etag", "label", "mask_uri")
        columns = (batch.column(name).to_pylist() if name in batch.schema.names else repeat(None) for name in names)
        for uri, class_name, size, etag, label, mask in zip(*columns, strict=False):
            number += 1
            if not uri or not class_name:
                raise DatasetError(f"{place}: row {number} has no {'class_name' if uri else 'uri'}")
            uri, key = _locate(source.store, _resolve(source.store, str(uri)))
            mask = _resolve(source.store, str(mask)) if mask else None
            yield _Row(uri, key, str(class_name), size, etag, label, mask)


_LISTERS: dict[str, Callable[[ImageSource], Iterator[_Row]]] = {
    "flat": _list_flat,
    "folders": _list_folders,
    "mvtec": _list_mvtec,
    "visa": _list_visa,
    "table": _list_table,
}

_TRAIN_LISTERS: dict[str, Callable[[ImageSource], Iterator[_Row]]] = {
    "mvtec": _list_mvtec_train,
    "visa": functools.partial(_list_visa, split="train"),
}

_STRINGS = pa.csv.ConvertOptions(
    column_types={name: pa.string() for name in ("object", "split", "label", "image", "mask")}, strings_can_be_null=True
)


def _read_table(store: Store, name: str) -> Iterator[pa.RecordBatch]:
    data = io.BytesIO(store.read(name))
    try:
        if name.lower().endswith(".parquet"):
            yield from pq.ParquetFile(data).iter_batches()
        else:
            texts = {column: pa.string() for column in ("uri", "class_name", "label", "mask_uri", "etag")}
            yield from pa.csv.open_csv(
                data,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=texts, strings_can_be_null=True),
            )
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{store.uri(name)} cannot be read as a table: {str(error)[:300]}") from None


def _require_columns(found: Iterable[str], wanted: Iterable[str], place: str) -> None:
    found = list(found)
    if len(set(found)) < len(found):
        raise DatasetError(f"{place} has two columns of one name; its columns: {', '.join(found)}")
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f" (is {near[0]!r} meant?)" if near else ""
            raise DatasetError(f"{place} has no column {name!r}{hint}; its columns: {', '.join(found)}")


def _resolve(store: Store, uri: str) -> str:
    """The absolute address of one that may be relative to the store's root."""
    if "@" in uri or "?" in uri:
        without_credentials(uri)
    if "://" in uri or uri.startswith("/"):
        return uri
    scheme, separator, root = store.uri("").rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(f'{root}/{uri}')}"


def _locate(store: Store, uri: str) -> tuple[str, str]:
    """An address in the store's spelling, and its key: the path below the root; from elsewhere `/` and the whole path.

    Different addresses never have the same key, so two images never share a mask.
    """
    key = store.key_of(uri)
    if key is None or key.startswith("/"):
        return uri, "/" + store.path_of(uri).lstrip("/")
    return store.prefix + key, key


def _unique(rows: Iterator[_Row]) -> Iterator[_Row]:
    """The first row of each uri: an image has exactly one row. Holds a digest of 16 bytes an image."""
    seen: set[bytes] = set()
    repeated = 0
    for row in rows:
        digest = hashlib.blake2b(row.uri.encode(), digest_size=16).digest()
        if digest in seen:
            repeated += 1
            continue
        seen.add(digest)
        yield row
    if repeated:
        logger.warning("the table names %d images more than once; the first row of each is used", repeated)


def _row(
    store: Store, info: ObjectInfo, class_name: str, label: str | None = None, mask_uri: str | None = None
) -> _Row:
    key, size, etag, _ = info
    return _Row._make((store.prefix + key, key, class_name, size, etag, label, mask_uri))


def _to_batch(rows: Iterable[_Row]) -> pa.RecordBatch:
    # One list of values: of thousands of tuples that live on, Python's garbage collector would visit each, repeatedly.
    values = list(chain.from_iterable(rows))
    columns: dict[str, list[Any]] = {name: values[i :: len(_Row._fields)] for i, name in enumerate(_Row._fields)}
    columns["image_id"] = list(map(_identify, columns["uri"], columns["etag"]))
    return pa.RecordBatch.from_arrays([pa.array(columns[item.name], item.type) for item in MANIFEST], schema=MANIFEST)


def _identify(uri: str, etag: str | None) -> str:
    return hashlib.blake2b(f"{uri}\0{etag or ''}".encode(), digest_size=16).hexdigest()
