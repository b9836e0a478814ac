"""Documents of the lake: commits/<night>.json, what belongs to a published night, and runs/<run_id>/stats.json, how its
run went.

Such a document grows by keys that may be missing, which older readers pass over. A change that they would misread
counts schema_version up, and readers refuse versions that they do not know.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.prompts import Usage

COMMIT_VERSION: Literal[2] = 2
STATS_VERSION: Literal[1] = 1

Count = Annotated[int, Field(ge=0)]
RunState = Literal["running", "done", "failed", "interrupted"]


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
    compared: Count = Field(0, description="images that were compared with peers")
    beyond: Count = Field(0, description="of these, images beyond the fence of the class: their score is above 0.5")
    key: str = Field(description="the file under a name that is never written again")
    table_key: str = Field(description="the same file in the table")
    bytes: Count
    sha256: str

    @property
    def failed(self) -> int:
        """Images without a score."""
        return sum(self.errors.values())

    @property
    def is_beyond_fence(self) -> bool:
        """Whether more than a third of the images lie beyond the fence, which supposes that fewer are anomalous."""
        return 3 * self.beyond > self.compared


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


class SelectionCounts(Record):
    """What dataset.select new left out of a night."""

    listed: Count = Field(description="images that the night lists")
    scored: Count = Field(description="of these, those that have a score from another night")
    given_up: Count = Field(description="of these, those that failed in as many nights as they are tried")


class ActorCounts(Record):
    """What scoring held of the cluster."""

    count: Count = Field(description="scoring actors")
    cpus: Count = Field(description="cores of each")
    gpus: float = Field(ge=0, description="GPUs of each; a shared one is a fraction")


class RunStats(Record):
    """How a run goes, and what it has come to, as its last job says: runs/<run_id>/stats.json."""

    schema_version: Literal[1] = STATS_VERSION
    run_id: str
    run_date: datetime.date | None = Field(None, description="the night")
    source: str | None = Field(None, description="address of the images")
    state: RunState
    error: str | None = Field(None, description="what stopped the run, where it failed")
    started_at: datetime.datetime | None = None
    updated_at: datetime.datetime
    images: Count = Field(description="of the night")
    shards: Count = Field(description="of the night")
    scored_by_this_job: Count = Field(0, description="images; a job that resumes has fewer than the night")
    images_per_second: float = Field(0.0, description="since actors were started")
    scoring_images_per_second: float | None = Field(None, description="while scoring; null in early versions")
    scoring_seconds: float | None = Field(None, description="seconds of scoring; null in early versions")
    total_seconds: float | None = Field(None, description="seconds of the whole job; null in early versions")
    rows: Count | None = Field(None, description="of the published night")
    errors: Mapping[str, Count] = Field(description="images without a score, by error_type")
    anomalies: Mapping[str, Count] = Field(description="images that count as anomalous, by class")
    clipped: Count = Field(0, description="photos of this job with values beyond the depth of their class")
    model: str = ""
    embedded_model: bool = Field(False, description="whether the model is the one that comes with alfa")
    demonstration_model: bool = Field(False, exclude=True, description="what early versions say of their own model")
    prompt_sources: Mapping[str, Count] = Field({}, description="classes by where their prompts come from")
    usage: Usage = Field(Usage(), description="what this job spent on the LLM")
    selection: SelectionCounts | None = Field(None, description="what was left out; null: dataset.select all")
    left_out: Mapping[str, Count] = Field({}, description="objects that are no images by their names, by suffix")
    actors: ActorCounts | None = Field(None, description="null: none were started")
    versions: Mapping[str, str] = Field({}, description="of Python and packages, by name")
    lineage: Mapping[str, Any] | None = Field(None, description="the same as an OpenLineage RunEvent")

    @property
    def rate(self) -> float:
        """Images a second while scoring; early versions have one rate, which counts from the start of Ray."""
        return self.images_per_second if self.scoring_images_per_second is None else self.scoring_images_per_second


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
