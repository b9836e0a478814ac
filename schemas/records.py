"""What lies at commits/<night>.json: what belongs to a published night.

Such a document grows by keys that may be missing, which older readers pass over. A change that they would misread
counts schema_version up, and readers refuse versions that they do not know.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

COMMIT_VERSION: Literal[2] = 2

Count = Annotated[int, Field(ge=0)]


class RecordError(ValueError):
    """A document of the lake cannot be read; the message says which, and what is wrong with it."""


class Record(BaseModel):
    """Immutable; unknown keys, which newer versions may have added, are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CommitFile(Record):
    """A class of the night: its file, and what it holds."""

    class_name: str
    scored_as: str | None = Field(
        None, description="fingerprint of what its photos were scored as (JobConfig.class_fingerprint); null: unknown"
    )
    rows: Count
    errors: Mapping[str, Count] = Field(description="images without a score, by error_type")
    anomalies: Count = Field(description="images that count as anomalous")
    key: str = Field(description="the file under a name that is never written again")
    table_key: str = Field(description="the same file in the table")
    bytes: Count
    sha256: str

    @property
    def failed(self) -> int:
        """Images without a score."""
        return sum(self.errors.values())


class Commit(Record):
    """A published night: all that belongs to it, and nothing else."""

    schema_version: Literal[1, 2] = COMMIT_VERSION
    run_date: datetime.date
    run_id: str
    manifest: str = Field(description="digest of the manifest, which names its file")
    shards: str | None = Field(None, description="folder of the run's shards; null in nights of early versions")
    select: Literal["all", "new"] = Field("all", description="dataset.select of the job")
    rows: Count
    committed_at: datetime.datetime
    cleared_at: datetime.datetime | None = Field(
        None, description="when alfa gc removed masks, maps and shards; null: they are there"
    )
    files: tuple[CommitFile, ...] = Field(description="one a class, by name")

    @property
    def errors(self) -> dict[str, int]:
        """Images without a score, by error_type."""
        total: Counter[str] = Counter()
        for file in self.files:
            total.update(file.errors)
        return dict(total)

    @property
    def failed(self) -> int:
        """Images without a score."""
        return sum(file.failed for file in self.files)

    @property
    def anomalies(self) -> dict[str, int]:
        """Images that count as anomalous, by class."""
        return {file.class_name: file.anomalies for file in self.files}


_Document = TypeVar("_Document", bound=Record)


def parse_record(kind: type[_Document], data: bytes, where: str) -> _Document:
    """Reads a document of the lake and checks it. where: its address, for the message. Raises RecordError."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc'])) or 'document'}: {item['msg']}" for item in error.errors()]
        if any(item["loc"] == ("schema_version",) for item in error.errors()):
            faults = ["it is of another version of alfa than this one knows; use a newer one"]
        raise RecordError(f"{where} cannot be read: {'; '.join(faults[:3])}") from None


def dump_record(record: Record) -> bytes:
    """Writes a document of the lake so that people can read it, too."""
    return record.model_dump_json(indent=2).encode()
