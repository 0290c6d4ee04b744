"""The schema of a run's config. With the dataclasses of the components it is the only one that Hydra gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from zoo.moved import attributes_of
from zoo.registry import MANY, ZooError, unknown
from zoo.registry.conversion import converted
from zoo.registry.table import SLOT_KINDS, group_of
from zoo.settings.parallel import ParallelConfig
from zoo.settings.scale import ScaleConfig
from zoo.settings.stage import Stage

CONFIG_NAME = "zoo"
KEEPS = ("live", "fp32", "bf16", "fp16", "int8")
DEFAULT_RECIPE = "scenes_tiny"
DEFAULT_MODEL = "scenes_tiny"


@dataclass
class ModelSource:
    """The source of the model and its weights; set by `model=`."""

    name: str = ""  # preset, or the folder or repository
    source: str = "preset"  # preset | dir | hub
    repository: str = ""  # on the hub, of the preset's trained weights or of the model itself
    revision: str = ""  # commit or tag of `repository`
    sha256: str = ""  # of the weights, from the card; of several files, ordered by name and separated by spaces
    family: str = ""  # published layout of the repository (llava, llava_next, ...); empty: the zoo's own
    base: str = ""  # new location of the published checkpoint of a saved model; empty: as saved


@dataclass
class TokenizerConfig:
    checkpoint: str | None = None  # hub name, folder, model:NAME; null: the LLM's own, or one trained on the run's text
    vocab_size: int = 4096  # of a tokenizer that is trained
    chat_template: str = ""  # name of a built-in template; empty: the tokenizer's own
    template_options: dict[str, Any] = field(default_factory=dict)  # of the template: {enable_thinking: false}


def tokenizer_options(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Add defaults to the tokenizer options of a config, as plain values.

    Raises:
        OmegaConfBaseException: an option does not exist, or a value has another type.
    """
    return converted(TokenizerConfig, stated)


@dataclass
class TeachConfig:
    """Options of `zoo teach`."""

    stage: str = ""  # stage with the teacher; empty: the only one that has a teacher
    folder: str = ""  # of the store; empty: <run.dir>/teach/<recipe>-<stage>
    k: int = 64  # most likely tokens stored of each position
    dtype: str = "float16"  # of their log-probabilities: float16 | float32
    shard: int = 2000  # samples in a file
    limit: int | None = None  # samples of the stage; null: all

    def __post_init__(self) -> None:
        if self.k < 1 or self.shard < 1:
            raise ZooError(f"teach.k and teach.shard must be at least 1, got {self.k} and {self.shard}.")
        if self.dtype not in ("float16", "float32"):
            raise unknown("dtype of a store", self.dtype, ("float16", "float32"))


@dataclass
class FeaturesConfig:
    """What a run keeps of frozen encoders, so that later epochs and runs do not encode an image again."""

    keep: str = "live"  # live: nothing | fp32 | bf16 | fp16 | int8: in blocks of 32 with a scale, 8.5 bits a value
    folder: str = ""  # of all kept features, which runs share; empty: <run.dir>/features
    max_gb: float = 20.0  # size of that folder, in units of 1e9 bytes; once it is reached, no more is added

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise unknown("dtype of kept features (features.keep)", self.keep, KEEPS)
        if not self.max_gb > 0:
            raise ZooError(f"features.max_gb must be more than 0, got {self.max_gb}.")


@dataclass
class SurveyConfig:
    """Options of `zoo data`."""

    images: str = "exists"  # exists: check that the file exists | open: decode each; models that cut images open them
    examples: int = 3  # broken records shown of each kind
    json: str = ""  # file for all figures, and every broken record

    def __post_init__(self) -> None:
        if self.images not in ("exists", "open"):
            raise unknown("check of images (survey.images)", self.images, ("exists", "open"))
        if self.examples < 0:
            raise ZooError(f"survey.examples must be 0 or more, got {self.examples}.")


@dataclass
class RunConfig:
    """The folder of a run: `dir/<date>/<time>-<name>`."""

    dir: str = "runs"  # parent of run folders
    name: str = ""  # end of the folder's name; empty: recipe or model
    folder: str = ""  # exactly this folder, instead of one made from `dir` and `name`
    recipe: str = ""  # set by `recipe=`


def _defaults() -> list[Any]:
    """Return the defaults list. Later entries have precedence: the recipe overrides the model, the model the slots."""
    slots: list[Any] = [{group_of(kind): [] if kind in MANY else None} for kind in SLOT_KINDS]
    hydra = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    return ["_self_", *slots, {"model": DEFAULT_MODEL}, {"recipe": DEFAULT_RECIPE}, *hydra]


def _hydra() -> dict[str, Any]:
    """Return Hydra's own options: it writes only the config of a sweep, since folders are made by zoo.runs.folder."""
    sweep = {"dir": "${run.dir}/sweeps", "subdir": "${hydra.job.num}"}
    return {"run": {"dir": "."}, "sweep": sweep, "output_subdir": None, "job": {"chdir": False}}


@dataclass
class RunRoot:
    """The config of a run, for `zoo train`, `zoo eval`, `zoo check` and `zoo.load`."""

    defaults: list[Any] = field(default_factory=_defaults)
    hydra: Any = field(default_factory=_hydra)
    # The model: one component per slot; pruner and adapter hold several, by name
    vision: Any = None
    pruner: dict[str, Any] = field(default_factory=dict)
    projector: Any = None
    layout: Any = None
    llm: Any = None
    adapter: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelSource = field(default_factory=ModelSource)
    # Data and tasks, by name
    data: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    skip_broken: bool = False  # leave out broken records, and list them in skipped.jsonl; else stop
    max_broken: float = 0.1  # share of the records that may be left out, from the 100th on; more stops the run
    # Training
    stages: dict[str, Stage] = field(default_factory=dict)
    resume: str | None = None  # folder of a run, or `last`
    lock: str | None = None  # folder of a run that is trained once more from its zoo.lock, or `last`
    teach: TeachConfig = field(default_factory=TeachConfig)
    survey: SurveyConfig = field(default_factory=SurveyConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    # Evaluation
    batch_size: int | None = None  # of evaluation, in dialogs; null: by the size of the model
    limit: int | None = None  # samples of each data set, drawn; null: all, and 400 at the end of `zoo train`
    # Machine
    seed: int = 0  # of weights, data order and dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:<n> | mps
    precision: str = "auto"  # auto | fp32 | bf16
    master_weights: str = "fp32"  # of weights in 16 bits that train: fp32 | none, they train as they are
    positions: str = "auto"  # of image tokens behind pruners: kept: as without a pruner | dense: consecutive | auto
    attention: str = "auto"  # auto | eager | sdpa | flex_attention | flash_attention_<n>
    workers: int = 0  # processes of `zoo data`; for training: stages.<stage>.workers
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    # The run
    plugins: list[str] = field(default_factory=list)  # modules and files to load first
    log: list[str] = field(default_factory=list)  # trackers beside metrics.jsonl: tensorboard, trackio, wandb
    log_pictures: int = 0  # images with their answers that trackers get with each evaluation; 0: none
    run: RunConfig = field(default_factory=RunConfig)


# Groups of options of a run, by the word in front: `tokenizer.vocab_size`.
SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(RunRoot) if is_dataclass(f.type)}


__getattr__ = attributes_of("zoo.settings.config")  # `compose` and others were here before
