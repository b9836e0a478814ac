"""What a job is: frozen models, and what identifies a run of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from schemas.job.dates import escape_braces

EMBEDDED_MODEL = "alfa-small"
EMBEDDED_NOTE = (
    "the model that comes with alfa. By language alone its image AUROC is 0.97 on hazelnuts and 0.95 on cookies that "
    "it never saw, but 0.65 on capsules (0.5 is chance): small defects need method.tile or a larger model.image_size, "
    "and missing or swapped parts are not for it. Real CLIP weights (model.pretrained) read language better"
)
"""What is said wherever the embedded model has scored; the figures are those of pipeline/evaluation/README.md."""
FORMER_EMBEDDED_MODELS = ("alfa-tiny",)
"""Models that came with earlier versions. Their nights can still be read, but no image can be scored with them."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


Address = Annotated[str, Field(min_length=1), PlainSerializer(escape_braces)]
"""An address in which a job may name its night, see schemas.job.dates. It holds what was filled in; written down, its
braces are doubled, so that it reads back as itself."""
Night = Annotated[
    datetime.date,
    WithJsonSchema({"anyOf": [{"type": "string", "format": "date"}, {"enum": ["today", "yesterday"]}]}),
]


class Part(BaseModel):
    """Base of every part of a job: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_SIGNATURE = re.compile(r"(?i)[?&](x-amz-(signature|credential|security-token)|sig|signature)=")


def without_credentials(uri: str) -> str:
    """The address itself; it would stand in rows, logs and run folders. Raises ValueError where it tells a secret."""
    parts = urlsplit(uri)
    if parts.password or (parts.username and parts.scheme) or _SIGNATURE.search(uri):
        raise ValueError("must not hold credentials; set them in the environment (AWS_ACCESS_KEY_ID, ...)")
    return uri


class Dataset(Part):
    """Where the images are and how their folders are to be read."""

    images: Address = Field(description="folder, table file or URI of the images; {run_date} in it is the night's date")
    layout: Literal["auto", "folders", "flat", "mvtec", "visa", "table"] = Field(
        "auto", description="how class names are found; auto recognises the layout and says which"
    )
    class_name: str | None = Field(
        None, min_length=1, description="the class of every image (layout flat, tables that name none)"
    )
    suffixes: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="what counts as an image by its name, such as [default, .dat, none]: default stands for all usual "
        "suffixes, none for names without one; tables take all that they name",
    )
    max_pixels: PositiveInt = Field(100_000_000, description="larger images become an error row (decompression bombs)")
    bit_depth: Literal[8, 10, 12, 14, 16] | None = Field(
        None,
        description="of photos in 16-bit files that do not say their depth; default: the smallest one that holds a "
        "sample of their class",
    )
    select: Literal["all", "new"] = Field(
        "all",
        description="new: only images that no other published night of the output holds as ok, scored alike (model, "
        "weights, method, prompts of the class, references)",
    )
    retry_errors: bool = Field(True, description="select new: try images again that were errors in earlier nights")
    retry_nights: PositiveInt = Field(3, description="select new: nights in which such an image is tried again at most")

    _no_credentials = field_validator("images")(without_credentials)

    @field_validator("suffixes")
    @classmethod
    def _suffixes_with_dots(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for suffix in value or ():
            if suffix not in ("default", "none") and not re.fullmatch(r"\.[^/\s]+", suffix):
                raise ValueError(f"{suffix!r} is no suffix: it begins with a dot, such as .jpg, or is default or none")
        return value and tuple(suffix.lower() for suffix in value)

    @property
    def error_nights(self) -> int:
        """The number of nights in which an image has failed, from which on select new leaves it out."""
        return 1 + self.retry_nights if self.retry_errors else 1


class Output(Part):
    """Where the results go."""

    uri: str = Field(min_length=1, description="folder or URI of the data lake")
    maps: bool = Field(False, description="write raw anomaly maps too, as 16-bit PNG")

    _no_credentials = field_validator("uri")(without_credentials)


class Storage(Part):
    """How object storage is reached. Credentials come from the environment, never from a job."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; default: AWS_ENDPOINT_URL, else AWS itself")
    region: str | None = None
    anonymous: bool = Field(False, description="read public buckets without credentials")

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)


class Model(Part):
    """Which CLIP sees the images."""

    name: str = Field(EMBEDDED_MODEL, description="any open_clip ViT, or alfa-small, the embedded one")
    pretrained: str | None = Field(
        None, description="open_clip pretrained tag or path of a weights file; required unless the model is embedded"
    )
    image_size: PositiveInt | None = Field(
        None, description="pixels a side; other than the model's own interpolates its positions"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on CUDA, fp32 on CPU")
    batch_size: PositiveInt = 32

    @model_validator(mode="after")
    def _weights_named(self) -> Model:
        if self.pretrained is None and self.name not in (EMBEDDED_MODEL, *FORMER_EMBEDDED_MODELS):
            raise ValueError(
                f"pretrained is required for {self.name}: an open_clip tag (such as laion400m_e32) or a weights file"
            )
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether this is the model that comes with the package, with its own weights."""
        return self.pretrained is None and self.name == EMBEDDED_MODEL


class Prompts(Part):
    """Who describes the classes, and how hard it is tried."""

    llm: str | None = Field(None, description="litellm model string; none: bundled prompts, else the base ensemble")
    described: bool = Field(True, description="false: the base ensemble alone, whatever is known of a class")
    api_base: str | None = Field(None, description="address of an OpenAI-compatible server")
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    timeout_s: PositiveFloat = 60.0
    max_attempts: PositiveInt = 5
    on_failure: Literal["fail", "base"] = Field("fail", description="base: go on with the base ensemble, said in rows")

    @property
    def asks_llm(self) -> bool:
        """Whether classes are described by an LLM."""
        return self.llm is not None and self.described

    @field_validator("api_base")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)


class Tile(Part):
    """How large photos are cut, in pixels of the photo."""

    size: Annotated[int, Field(ge=16)] = Field(description="side of a tile; the smaller, the smaller the defects found")
    overlap: Annotated[int, Field(ge=0)] = Field(0, description="that neighbouring tiles share at least")

    @model_validator(mode="after")
    def _overlap_fits(self) -> Tile:
        if self.overlap > self.size // 2:
            raise ValueError(f"overlap must be at most half of size ({self.size // 2})")
        return self


class Method(Part):
    """The options of ALFA (pipeline/alfa/README.md), each by name."""

    adaptation: Literal["none", "mean", "rank", "interval", "soft", "random"] = Field(
        "mean", description="random: the control, as many prompts as mean keeps, drawn anew for each place in a batch"
    )
    floor_count: PositiveInt = Field(3, description="prompts that each side keeps at least")
    floor_share: Share = Field(0.25, description="share of prompts that each side keeps at least")
    soft_temperature: PositiveFloat = Field(0.01, description="T of adaptation soft, in units of cosine distance")
    aligner: Literal["value", "ridge", "raw"] | None = Field(
        None, description="default: value, and raw for the embedded model"
    )
    value_depth: PositiveInt | None = Field(
        None, description="blocks of the value path, from the last; default: all but the first quarter"
    )
    levels: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="blocks whose maps are averaged; -1 is the last; default: that one, and the last two of the "
        "embedded model",
    )
    ridge_lambda: PositiveFloat = 1.0
    local_weight: Share = Field(0.5, description="w: score = (1 - w) global + w local")
    local_top_k: PositiveInt = Field(1, description="local score: mean of the k highest patches")
    tile: Tile | None = Field(None, description="score overlapping tiles of large photos; none: each as a whole")


class References(Part):
    """Few-shot: known-good images of each class, which all others are compared with."""

    images: Address = Field(
        description="`train`: the dataset's own train images (layouts mvtec and visa); else folder, table or URI of "
        "known-good images, one folder a class",
    )
    shots: PositiveInt = Field(4, description="images a class; where there are fewer, all of them")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="chooses which; more shots keep those of fewer")
    levels: tuple[int, ...] | None = Field(
        None, min_length=1, description="blocks whose patches are compared; default: the middle one"
    )

    _no_credentials = field_validator("images")(without_credentials)


class Peers(Part):
    """Mutual scoring: the photos of the night itself that all others of their class are compared with."""

    images: Annotated[int, Field(ge=2)] = Field(32, description="photos a class that serve as peers")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.3, description="share of the peers, the nearest ones, that a patch is compared with: defective peers fall out"
    )
    levels: tuple[int, ...] | None = Field(
        None, min_length=1, description="blocks whose patches are compared; default: at one and two thirds of the depth"
    )
    neighbourhood: Literal[1, 3, 5] = Field(3, description="patches a side that are averaged before they are compared")
    weight: Share = Field(0.7, description="u: score = (1 - u) language + u peers, the map alike")
    min_images: Annotated[int, Field(ge=2)] = Field(
        8, description="readable photos of a class below which it stays with language alone"
    )

    @model_validator(mode="after")
    def _enough(self) -> Peers:
        if self.min_images > self.images:
            raise ValueError(f"min_images ({self.min_images}) must not be more than images ({self.images})")
        return self


class Threshold(Part):
    """When an image, and a pixel, counts as anomalous."""

    policy: Literal["fixed", "quantile", "reference", "labels"] = Field(
        "fixed",
        description="quantile: of this run's own scores; reference: of the references' leave-one-out scores; labels: "
        "as `alfa calibrate` has written them",
    )
    value: float = Field(0.5, description="policy fixed: score from which an image is anomalous")
    mask_value: float | None = Field(None, description="policy fixed: the same for pixels; default: value")
    quantile: Share = Field(0.95, description="policy quantile: share of a class's images of this run that lie below")
    reference_quantile: Share = Field(0.99, description="policy reference: share of the references that lie below")
    table: Address | None = Field(None, description="policy labels: path or URI of the calibrated thresholds")

    @field_validator("table")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)

    @model_validator(mode="after")
    def _table_named(self) -> Threshold:
        if self.policy == "labels" and self.table is None:
            raise ValueError("table is required with policy labels: the JSON file that alfa calibrate has written")
        return self

    @property
    def source(self) -> str:
        """Where thresholds come from, as rows say it: the policy, and with labels the table."""
        return f"labels {self.table}" if self.policy == "labels" else self.policy


class ActorRange(Part):
    """Between how many scoring actors a run has, as far as there is work for them."""

    min: PositiveInt = Field(1, description="as many are asked for, whether or not nodes have room")
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> ActorRange:
        if self.min > self.max:
            raise ValueError("min must not be larger than max")
        return self


class Engine(Part):
    """How Ray is used."""

    address: str | None = Field(None, description="Ray cluster; default: RAY_ADDRESS, else a local one is started")
    actors: Annotated[int, Field(ge=1)] | Literal["auto"] | ActorRange = Field(
        "auto", description="auto: actors_per_gpu to each GPU, else all cores; also of nodes that come later"
    )
    actors_per_gpu: PositiveInt = Field(
        1, description="processes that share a GPU; more where one alone cannot read and decode as fast as it scores"
    )
    cpus_per_actor: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="custom Ray resources that each scoring actor takes, such as {spot: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="labels of the Ray nodes that score, such as {ray.io/market-type: spot}"
    )
    wait_for_nodes_s: PositiveFloat = Field(
        900.0, description="seconds that a cluster without a fitting node has to bring one; a local Ray has none"
    )
    shard_size: PositiveInt = 256
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3,
        description="deaths of workers over one shard, and per actor with no shard finished between, that a run bears",
    )
    lease_s: Annotated[float, Field(ge=1.0)] = Field(
        30.0, description="seconds for which a driver that died keeps others from going on with its run"
    )
    max_error_rate: Share = Field(0.05, description="share of error rows past which the job exits with 1")

    @property
    def actor_range(self) -> tuple[int, int | None]:
        """How many actors at least and at most; None: no limit of the job's own."""
        if self.actors == "auto":
            return 1, None
        return (self.actors.min, self.actors.max) if isinstance(self.actors, ActorRange) else (self.actors, self.actors)


class Lake(Part):
    """How the table is offered to readers besides its Parquet files."""

    format: Literal["parquet", "iceberg"] = Field("parquet", description="iceberg: each night is a snapshot of a table")
    catalog: str | None = Field(
        None,
        min_length=1,
        description="name of a pyiceberg catalog (PYICEBERG_CATALOG__<NAME>__URI, ~/.pyiceberg.yaml); default: a "
        "SQLite file beside a local output",
    )
    table: str = Field("alfa.scores", pattern=r"^\w+(\.\w+)+$", description="namespace.table in the catalog")


class JobConfig(Part):
    """One night: which images, what with, where to."""

    dataset: Dataset
    output: Output
    run_date: Night = Field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date(),
        description="the night: a date, `today` (default) or `yesterday`",
    )
    timezone: str = Field("UTC", description="IANA time zone that says which day it is, such as Europe/Berlin")
    storage: Storage = Storage()
    model: Model = Field(default_factory=lambda: Model())
    prompts: Prompts = Field(default_factory=lambda: Prompts())
    method: Method = Field(default_factory=lambda: Method())
    references: References | None = Field(None, description="few-shot; none: zero-shot")
    peers: Peers | None = Field(
        default_factory=lambda: Peers(), description="compare photos with others of their night; none: do not"
    )
    threshold: Threshold = Field(default_factory=lambda: Threshold())
    engine: Engine = Field(default_factory=lambda: Engine())
    lake: Lake = Field(default_factory=lambda: Lake())

    @field_validator("peers", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _whole(self) -> JobConfig:
        if self.threshold.policy == "reference" and self.references is None:
            raise ValueError("threshold.policy reference needs references: set references.images")
        if self.dataset.layout == "flat" and self.dataset.class_name is None:
            raise ValueError("dataset.class_name is required with dataset.layout flat (flag --class)")
        return self

    @property
    def resolved_method(self) -> Method:
        """The method with the options filled in whose defaults depend on the model.

        Real CLIP: aligner `value`, last block. The embedded model was trained for `raw`; of its levels the last two are
        best on average over three data sets (pipeline/evaluation/README.md). Former embedded models: `raw`, last block.
        """
        is_embedded, is_former = self.model.name == EMBEDDED_MODEL, self.model.name in FORMER_EMBEDDED_MODELS
        aligner = self.method.aligner or ("raw" if is_embedded or is_former else "value")
        levels = self.method.levels or ((-1, -2) if is_embedded and aligner == "raw" else (-1,))
        return self.method.model_copy(update={"aligner": aligner, "levels": levels})

    def scoring_facts(self) -> dict[str, Any]:
        """The options that determine an image's raw scores: thresholds hold for scores of the same ones alone."""
        return {
            "model": self.model.model_dump(mode="json", include={"name", "image_size", "precision"}),
            "method": self.resolved_method.model_dump(mode="json"),
            "references": None if self.references is None else self.references.model_dump(mode="json"),
            **({} if self.dataset.bit_depth is None else {"bit_depth": self.dataset.bit_depth}),
            "peers": None if self.peers is None else self.peers.model_dump(mode="json"),
        }

    def class_fingerprint(
        self, class_name: str, weights_sha256: str, prompts_fingerprint: str, references: Sequence[str] = ()
    ) -> str:
        """Hash (32 hex digits) of all that determines the raw scores of a class's images: photos that were scored under
        the same one need not be scored again. references: ids of the class's reference images."""
        facts = self.scoring_facts()
        options = facts["references"] and {key: facts["references"][key] for key in ("levels",)}
        facts |= {
            "class_name": class_name,
            "weights_sha256": weights_sha256,
            "prompts": prompts_fingerprint,
            "references": options,
            "reference_images": list(references),
        }
        return _digest(facts, 32)

    def result_fingerprint(
        self, weights_sha256: str, prompts_fingerprint: str, references: Sequence[str] = (), thresholds: str = ""
    ) -> str:
        """Hash (12 hex digits) of all that determines the rows of a night: what is read, the model and its weights,
        the method, the prompts, the reference images (their ids), the thresholds (content of their table). How fast or
        where it runs does not count."""
        facts = {
            "weights_sha256": weights_sha256,
            "prompts": prompts_fingerprint,
            "reference_images": list(references),
            "thresholds": thresholds,
        }
        return _digest({**self._facts(), **facts})

    @property
    def config_fingerprint(self) -> str:
        """Hash (12 hex digits) of the part of result_fingerprint that the job itself says."""
        return _digest(self._facts())

    def _facts(self) -> dict[str, Any]:
        # Which images there are is what the manifest says; the depth is among scoring_facts.
        unused = {"suffixes", "bit_depth"}
        if self.dataset.select == "all":
            unused |= {"select", "retry_errors", "retry_nights"}
        return {
            "dataset": self.dataset.model_dump(mode="json", exclude=unused),
            "maps": self.output.maps,
            **self.scoring_facts(),
            "threshold": self.threshold.model_dump(mode="json"),
        }


def _digest(facts: Mapping[str, Any], digits: int = 12) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:digits]
