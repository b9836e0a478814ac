"""The JSON documents of the lake.

commits/<night>.json says what belongs to a published night, runs/<run_id>/stats.json how its run went. New keys are
optional, and older readers ignore them. A change that older readers would misread raises schema_version; readers refuse
versions that they do not know.
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
    """Base of the documents: immutable. Unknown keys are ignored, because newer versions may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CommitFile(Record):
    """The file of one class of a night, and the counts of its rows."""

    class_name: str
    scored_as: str | None = Field(
        None, description="JobConfig.class_fingerprint, joined with span, of its photos; null: unknown"
    )
    span: tuple[float, float] | None = Field(
        None, description="what became black and white in deep photos that do not say it themselves; null: none was met"
    )
    rows: Count
    errors: Mapping[str, Count] = Field(description="images without a score, by error_type")
    anomalies: Count = Field(description="images that count as anomalous")
    compared: Count = Field(0, description="images that were compared with peers")
    beyond: Count = Field(0, description="images among them beyond the fence of the class: their score is above 0.5")
    key: str = Field(description="key of the file's immutable copy, which is never overwritten")
    table_key: str = Field(description="key of the file in the table, which a later run of the night replaces")
    bytes: Count
    sha256: str

    @property
    def failed(self) -> int:
        """The number of images without a score."""
        return sum(self.errors.values())

    @property
    def is_beyond_fence(self) -> bool:
        """Whether more than a third of the images lie beyond the fence. It is only valid if fewer are anomalous."""
        return 3 * self.beyond > self.compared


class Commit(Record):
    """A published night: exactly what belongs to it."""

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
    files: tuple[CommitFile, ...] = Field(description="one per class, sorted by class name")

    @property
    def errors(self) -> dict[str, int]:
        """Counts images without a score, by error_type."""
        total: Counter[str] = Counter()
        for file in self.files:
            total.update(file.errors)
        return dict(total)

    @property
    def failed(self) -> int:
        """The number of images without a score."""
        return sum(file.failed for file in self.files)

    @property
    def anomalies(self) -> dict[str, int]:
        """Counts images that are anomalous, by class."""
        return {file.class_name: file.anomalies for file in self.files}


class SelectionCounts(Record):
    """How many images `dataset.select: new` left out of a night."""

    listed: Count = Field(description="images that the night lists")
    scored: Count = Field(description="listed images left out because another night has scored them")
    given_up: Count = Field(description="listed images left out because they failed in too many nights")


class ActorCounts(Record):
    """The scoring actors, and what each held of the cluster."""

    count: Count = Field(description="scoring actors")
    cpus: Count = Field(description="cores of each")
    gpus: float = Field(ge=0, description="GPUs of each; a shared one is a fraction")


class RunStats(Record):
    """Progress and results of a run, as its last job has written them: runs/<run_id>/stats.json."""

    schema_version: Literal[1] = STATS_VERSION
    run_id: str
    run_date: datetime.date | None = Field(None, description="the night")
    source: str | None = Field(None, description="address of the images")
    state: RunState
    error: str | None = Field(None, description="what stopped the run, where it failed")
    started_at: datetime.datetime | None = None
    updated_at: datetime.datetime
    images: Count = Field(description="images of the night")
    shards: Count = Field(description="shards of the night")
    scored_by_this_job: Count = Field(0, description="images; fewer than the night has if the job resumed a run")
    images_per_second: float = Field(0.0, description="average since actors were started")
    scoring_images_per_second: float | None = Field(None, description="average while scoring; null in early versions")
    scoring_seconds: float | None = Field(None, description="seconds of scoring; null in early versions")
    total_seconds: float | None = Field(None, description="seconds of the whole job; null in early versions")
    rows: Count | None = Field(None, description="rows of the published night")
    errors: Mapping[str, Count] = Field(description="images without a score, by error_type")
    anomalies: Mapping[str, Count] = Field(description="images that count as anomalous, by class")
    clipped: Count = Field(0, description="photos of this job with values beyond the depth of their class")
    model: str = ""
    embedded_model: bool = Field(False, description="whether the model is the one that comes with alfa")
    demonstration_model: bool = Field(False, exclude=True, description="early versions: embedded_model")
    prompt_sources: Mapping[str, Count] = Field({}, description="classes by where their prompts come from")
    usage: Usage = Field(Usage(), description="what this job spent on the LLM")
    selection: SelectionCounts | None = Field(None, description="images left out; null: dataset.select all")
    left_out: Mapping[str, Count] = Field({}, description="objects whose suffix is not that of an image, by suffix")
    actors: ActorCounts | None = Field(None, description="the scoring actors; null: none were started")
    versions: Mapping[str, str] = Field({}, description="versions of Python and packages, by name")
    lineage: Mapping[str, Any] | None = Field(None, description="the run as an OpenLineage RunEvent")

    @property
    def rate(self) -> float:
        """Images per second while scoring; in early versions, images per second since the start of Ray."""
        return self.images_per_second if self.scoring_images_per_second is None else self.scoring_images_per_second


_Document = TypeVar("_Document", bound=Record)


def parse_record(kind: type[_Document], data: bytes, where: str) -> _Document:
    """Parses and checks a document of the lake. where: its address, for the message. Raises RecordError."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc'])) or 'document'}: {item['msg']}" for item in error.errors()]
        if any(item["loc"] == ("schema_version",) for item in error.errors()):
            faults = ["it was written by a newer version of alfa; read it with that version"]
        raise RecordError(f"{where} cannot be read: {'; '.join(faults[:3])}") from None


def dump_record(record: Record) -> bytes:
    """Encodes a document of the lake as indented JSON."""
    return record.model_dump_json(indent=2).encode()
