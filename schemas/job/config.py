"""The models of a job, and the fingerprints that identify its runs."""

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
"""Shown wherever the embedded model has scored. The figures come from pipeline/evaluation/README.md."""
FORMER_EMBEDDED_MODELS = ("alfa-tiny",)
"""Models that came with earlier versions. Their nights can still be read, but no image can be scored with them."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


Address = Annotated[str, Field(min_length=1), PlainSerializer(escape_braces)]
"""An address that may contain the night's date as a placeholder (schemas.job.dates). The model holds the address with
the date filled in. When it is written as YAML, its braces are doubled, so that it parses back to the same address."""
Night = Annotated[
    datetime.date,
    WithJsonSchema({"anyOf": [{"type": "string", "format": "date"}, {"enum": ["today", "yesterday"]}]}),
]


class Part(BaseModel):
    """Base of every part of a job: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_SIGNATURE = re.compile(r"(?i)[?&](x-amz-(signature|credential|security-token)|sig|signature)=")


def without_credentials(uri: str) -> str:
    """Returns the address unchanged. Raises ValueError if it contains credentials, as rows and logs would show them."""
    parts = urlsplit(uri)
    if parts.password or (parts.username and parts.scheme) or _SIGNATURE.search(uri):
        raise ValueError("must not hold credentials; set them in the environment (AWS_ACCESS_KEY_ID, ...)")
    return uri


class Dataset(Part):
    """Where the images are, and how classes are read from their folders."""

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
        description="suffixes of image files, such as [default, .dat, none]: default stands for all usual suffixes, "
        "none for names without one; ignored for tables, which name their images",
    )
    max_pixels: PositiveInt = Field(100_000_000, description="larger images become an error row (decompression bombs)")
    bit_depth: Literal[8, 10, 12, 14, 16] | None = Field(
        None,
        description="bits per channel of photos in 16-bit files that do not say their depth; default: the smallest "
        "depth that holds a sample of their class",
    )
    select: Literal["all", "new"] = Field(
        "all",
        description="new: leave out images that another published night of the output has scored with the same model, "
        "weights, method, prompts and references",
    )
    retry_errors: bool = Field(True, description="select new: try images again that failed in earlier nights")
    retry_nights: PositiveInt = Field(3, description="select new: in how many nights such an image is tried again")

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
        """After how many nights of failure `select: new` gives an image up."""
        return 1 + self.retry_nights if self.retry_errors else 1


class Output(Part):
    """Where the results go."""

    uri: str = Field(min_length=1, description="folder or URI of the data lake")
    maps: bool = Field(False, description="write raw anomaly maps too, as 16-bit PNG")

    _no_credentials = field_validator("uri")(without_credentials)


class Storage(Part):
    """How object storage is reached. Credentials come from the environment and never from a job."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; default: AWS_ENDPOINT_URL, else AWS itself")
    region: str | None = None
    anonymous: bool = Field(False, description="read public buckets without credentials")

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)


class Model(Part):
    """The CLIP model, and how it runs."""

    name: str = Field(EMBEDDED_MODEL, description="any open_clip ViT, or alfa-small, the embedded one")
    pretrained: str | None = Field(
        None, description="open_clip pretrained tag or path of a weights file; required unless the model is embedded"
    )
    image_size: PositiveInt | None = Field(
        None,
        description="side of the model's input in pixels; default: the model's own; others interpolate its positions",
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
        """Whether this is the model that comes with alfa, with its own weights."""
        return self.pretrained is None and self.name == EMBEDDED_MODEL


class Prompts(Part):
    """Which LLM describes the classes, if any, and how it is asked."""

    llm: str | None = Field(None, description="litellm model string; none: bundled prompts, else the base ensemble")
    described: bool = Field(True, description="false: use the base ensemble alone for every class")
    api_base: str | None = Field(None, description="address of an OpenAI-compatible server")
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    timeout_s: PositiveFloat = 60.0
    max_attempts: PositiveInt = 5
    on_failure: Literal["fail", "base"] = Field(
        "fail", description="base: go on with the base ensemble; rows say so in prompt_source"
    )

    @property
    def asks_llm(self) -> bool:
        """Whether classes are described by an LLM."""
        return self.llm is not None and self.described

    @field_validator("api_base")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)


class Tile(Part):
    """How large photos are cut into tiles, in pixels of the photo."""

    size: Annotated[int, Field(ge=16)] = Field(description="side of a tile; smaller tiles find smaller defects")
    overlap: Annotated[int, Field(ge=0)] = Field(0, description="pixels that neighbouring tiles share at least")

    @model_validator(mode="after")
    def _overlap_fits(self) -> Tile:
        if self.overlap > self.size // 2:
            raise ValueError(f"overlap must be at most half of size ({self.size // 2})")
        return self


class Method(Part):
    """The options of the method ALFA; pipeline/alfa/README.md has their formulas."""

    adaptation: Literal["none", "mean", "rank", "interval", "soft", "random"] = Field(
        "mean",
        description="how prompts are chosen for an image; random is a control for experiments: it keeps as many "
        "prompts as mean, drawn at random for each place in a batch",
    )
    floor_count: PositiveInt = Field(3, description="number of prompts that each side keeps at least")
    floor_share: Share = Field(0.25, description="share of prompts that each side keeps at least")
    soft_temperature: PositiveFloat = Field(0.01, description="T of adaptation soft, as a cosine distance")
    aligner: Literal["value", "ridge", "raw"] | None = Field(
        None, description="default: value, and raw for the embedded model"
    )
    value_depth: PositiveInt | None = Field(
        None, description="blocks of the value path, from the last; default: all but the first quarter"
    )
    levels: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="blocks whose maps are averaged; -1 is the last; default: the last, and the last two of the "
        "embedded model",
    )
    ridge_lambda: PositiveFloat = 1.0
    local_weight: Share = Field(0.5, description="w: score = (1 - w) global + w local")
    local_top_k: PositiveInt = Field(1, description="local score: mean of the k highest patches")
    tile: Tile | None = Field(
        None, description="score large photos in overlapping tiles; none: score all but strips as a whole"
    )


class References(Part):
    """Few-shot: known-good images of each class; all other images of the class are compared with them."""

    images: Address = Field(
        description="`train`: the dataset's own train images (layouts mvtec and visa); else a folder, table or URI of "
        "known-good images with one folder per class",
    )
    shots: PositiveInt = Field(4, description="images per class; a class that has fewer uses all of them")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="seed of the choice of images; with the same seed, more shots include those of fewer"
    )
    levels: tuple[int, ...] | None = Field(
        None, min_length=1, description="blocks whose patches are compared; default: the middle one"
    )

    _no_credentials = field_validator("images")(without_credentials)


class Peers(Part):
    """Mutual scoring: each photo is compared with other photos of its class and night, the peers."""

    images: Annotated[int, Field(ge=2)] = Field(32, description="number of peers per class")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.3,
        description="share of the peers that a patch is compared with, nearest first; this leaves defective ones out",
    )
    levels: tuple[int, ...] | None = Field(
        None, min_length=1, description="blocks whose patches are compared; default: at one and two thirds of the depth"
    )
    neighbourhood: Literal[1, 3, 5] = Field(
        3, description="side, in patches, of the square that is averaged before patches are compared"
    )
    weight: Share = Field(0.7, description="u: score = (1 - u) language + u peers, and the same for the map")
    min_images: Annotated[int, Field(ge=2)] = Field(
        8, description="a class with fewer readable photos is scored by language alone"
    )

    @model_validator(mode="after")
    def _enough(self) -> Peers:
        if self.min_images > self.images:
            raise ValueError(f"min_images ({self.min_images}) must not be more than images ({self.images})")
        return self


class Threshold(Part):
    """From which score an image counts as anomalous, and from which map value a pixel does."""

    policy: Literal["fixed", "quantile", "reference", "labels"] = Field(
        "fixed",
        description="quantile: from this run's own scores; reference: from the references' leave-one-out scores; "
        "labels: from the table that `alfa calibrate` has written",
    )
    value: float = Field(0.5, description="policy fixed: score from which an image is anomalous")
    mask_value: float | None = Field(
        None, description="policy fixed: map value from which a pixel is anomalous; default: value"
    )
    quantile: Share = Field(
        0.95, description="policy quantile: share of a class's images in this run below the threshold"
    )
    reference_quantile: Share = Field(0.99, description="policy reference: share of the references below the threshold")
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
        """The value of `threshold_source` in rows: the policy, and for `labels` also the table."""
        return f"labels {self.table}" if self.policy == "labels" else self.policy


class ActorRange(Part):
    """The smallest and largest number of scoring actors of a run; it never has more than there is work for."""

    min: PositiveInt = Field(1, description="actors that are requested even if no node has room yet")
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
        "auto",
        description="auto: actors_per_gpu for each GPU, without GPUs all cores; nodes that join later are used too",
    )
    actors_per_gpu: PositiveInt = Field(
        1, description="processes that share a GPU; more than one helps where reading and decoding are the bottleneck"
    )
    cpus_per_actor: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    decode: Literal["actor", "cluster"] = Field(
        "actor",
        description="where photos are decoded; cluster: also on nodes without a GPU, as long as models wait for pixels",
    )
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="custom Ray resources that each scoring actor takes, such as {spot: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="labels of the Ray nodes that score, such as {ray.io/market-type: spot}"
    )
    wait_for_nodes_s: PositiveFloat = Field(
        900.0, description="seconds to wait for a node that can run an actor; a local Ray does not wait"
    )
    shard_size: PositiveInt = 256
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3,
        description="worker deaths that a run tolerates on one shard, and per actor without a finished shard between",
    )
    lease_s: Annotated[float, Field(ge=1.0)] = Field(
        30.0, description="seconds until another driver may take over the run of a driver that died"
    )
    max_error_rate: Share = Field(0.05, description="share of error rows above which the job exits with 1")

    @property
    def actor_range(self) -> tuple[int, int | None]:
        """The smallest and largest number of actors; None: the job sets no upper limit."""
        if self.actors == "auto":
            return 1, None
        return (self.actors.min, self.actors.max) if isinstance(self.actors, ActorRange) else (self.actors, self.actors)


class Lake(Part):
    """Whether the table is also published in a catalog, besides its Parquet files."""

    format: Literal["parquet", "iceberg"] = Field("parquet", description="iceberg: each night is a snapshot of a table")
    catalog: str | None = Field(
        None,
        min_length=1,
        description="name of a pyiceberg catalog (PYICEBERG_CATALOG__<NAME>__URI, ~/.pyiceberg.yaml); default: a "
        "SQLite file beside a local output",
    )
    table: str = Field("alfa.scores", pattern=r"^\w+(\.\w+)+$", description="namespace.table in the catalog")


class JobConfig(Part):
    """One night: which images are scored, with what, and where the results go."""

    dataset: Dataset
    output: Output
    run_date: Night = Field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date(),
        description="the night: a date, `today` (default) or `yesterday`",
    )
    timezone: str = Field("UTC", description="IANA time zone of `today` and `yesterday`, such as Europe/Berlin")
    storage: Storage = Storage()
    model: Model = Field(default_factory=lambda: Model())
    prompts: Prompts = Field(default_factory=lambda: Prompts())
    method: Method = Field(default_factory=lambda: Method())
    references: References | None = Field(None, description="few-shot; none: zero-shot")
    peers: Peers | None = Field(
        default_factory=lambda: Peers(), description="compare photos with others of their night; none: off"
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
        """Returns the options that determine raw scores. A threshold is only valid for scores with equal options."""
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
        """Hashes everything that determines the raw scores of a class's images, into 32 hex digits.

        Photos that were scored under the same fingerprint need not be scored again. references: ids of the class's
        reference images.
        """
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
        """Hashes everything that determines the rows of a night, into 12 hex digits.

        That is: the images, the model and its weights, the method, the prompts, the ids of the reference images and
        the content of the table of thresholds. Options that only change where or how fast it runs do not count.
        """
        facts = {
            "weights_sha256": weights_sha256,
            "prompts": prompts_fingerprint,
            "reference_images": list(references),
            "thresholds": thresholds,
        }
        return _digest({**self._facts(), **facts})

    @property
    def config_fingerprint(self) -> str:
        """Hash (12 hex digits) of those parts of result_fingerprint that stand in the job itself."""
        return _digest(self._facts())

    def _facts(self) -> dict[str, Any]:
        # suffixes only select images, and the manifest already identifies those; bit_depth is part of scoring_facts.
        unused = {"suffixes", "bit_depth"}
        if self.dataset.select == "all":
            unused |= {"select", "retry_errors", "retry_nights"}
        return {
            "dataset": self.dataset.model_dump(mode="json", exclude=unused),
            "maps": self.output.maps,
            **self.scoring_facts(),
            "threshold": self.threshold.model_dump(mode="json"),
        }


def add_span(fingerprint: str, span: tuple[float, float] | None) -> str:
    """Joins a class_fingerprint and what became black and white in the class's deep photos, where a night has decided
    that: photos of another depth were not scored alike."""
    return (
        fingerprint if span is None else _digest({"scored_as": fingerprint, "span": [float(end) for end in span]}, 32)
    )


def _digest(facts: Mapping[str, Any], digits: int = 12) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:digits]
