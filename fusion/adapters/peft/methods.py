"""PEFT's methods: their names, what works here, and their options checked against PEFT's own dataclasses.

PEFT takes most values as they come: a misspelt target is ignored beside one that matches, a word in place of a number
fails in the middle of a model. Here names, types and allowed values are compared before a weight is read.
"""

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal

from zoo.registry import ZooError, nearest, one_line, unknown, unknown_option
from zoo.registry.options import MISSING, Option

LAYERS = "methods that change layers work: lora, dora, oft, ia3"
_PROMPT = (
    "it puts virtual tokens in front of each sequence, which the dialogs of a packed row, the positions of image "
    f"tokens and a continued cache do not have; {LAYERS}"
)
REFUSED = {
    "adamss": "its subspaces are clusters of scikit-learn, whose budget needs a schedule of its own; adalora has one",
    "adaption_prompt": f"it has code of its own for the attention of a few families; {LAYERS}",
    "bone": "later versions of PEFT have miss in its place",
    "cartridge": _PROMPT,
    "cpt": _PROMPT,
    "multitask_prompt_tuning": _PROMPT,
    "p_tuning": _PROMPT,
    "frod": f"it decomposes all weights of a kind together, which the check cannot do before they are read; {LAYERS}",
    "poly": "it wants the id of a task with each row of every pass; adapter=mole routes tokens by itself",
    "prefix_tuning": _PROMPT,
    "prompt_tuning": _PROMPT,
    "shadow": f"it runs a second network beside the layers and replaces their outputs by pairs; {LAYERS}",
    "xlora": "it runs the whole model twice in each pass, on one cache, and between the two keeps the weights of its "
    "experts on modules; adapter=mole is a mixture of low-rank experts",
}  # fmt: skip
# Names for LoRA with one option set, as papers and users call them.
VARIANTS: dict[str, dict[str, Any]] = {
    "corda": {"init_lora_weights": "corda"},
    "dora": {"use_dora": True},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True},
}
OWN = {  # fields that follow from the model, or say what was done before
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type", "total_step",
}  # fmt: skip
_NO_CODE = "it names files or code that are not part of the model"
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "its layers act from a token on that the ids of a pass name; here they get embeddings",
    "arrow_config": "it routes over other trained adapters; adapter=mole is a mixture of low-rank experts",
    "bias": "it trains biases of the language model itself, which detach could not put back; name them in the stage: "
    "stages.<stage>.train=[adapter,'llm.*.bias']",
    "cache_file": _NO_CODE,
    "covariance_file": _NO_CODE,
    "kasa_config": "it takes components out of the weights of the language model, which detach could not put back; "
    "pissa begins at components, too",
    "layer_replication": "it makes more layers of those that the language model has; llm.num_layers=<n>",
    "loftq_config": "it replaces the weights of the language model by rounded ones; load it with bits=4",
    "lora_ga_config": "its initial values need gradients; eva and corda read activations",
    "megatron_config": _NO_CODE,
    "modules_to_save": "it trains copies of whole modules; name them in the stage: "
    "stages.<stage>.train=[adapter,'llm.*.norm.weight']",
    "megatron_core": _NO_CODE,
    "monteclora_config": "it draws the weights of each pass, and its loss is not passed on; lora_dropout=<p>",
    "use_bdlora": "it is for servers with several devices; lora",
    "use_qalora": "its layers are those of GPTQ; lora on a model loaded with bits=4",
    "velora_config": "its projections are set by the first batch that a layer happens to run on; lora",
}
_REFUSED_INITS = {
    "loftq": _REFUSED_OPTIONS["loftq_config"],
    "lora_ga": _REFUSED_OPTIONS["lora_ga_config"],
}
# Methods whose initial values PEFT draws anew in each process, and how they are pinned.
_DEFAULTS: dict[str, dict[str, Any]] = {"shira": {"random_seed": 0}}
RESIDUAL = ("pissa", "olora", "corda")  # initial values that PEFT takes out of the base weights


class Method:
    """A method of PEFT and its options, checked.

    Args:
        name: of the method, of a variant of LoRA, or of PEFT's config class (`lora`, `dora`, `VeraConfig`).
        options: fields of the config class.

    Raises:
        ZooError: the method or a field does not exist, or is refused; or a value does not fit.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        configs = _configs()
        by_class = {config.__name__: key for key, config in configs.items()}
        key = by_class.get(name, name)
        variant = VARIANTS.get(key, {})
        self.name = "lora" if variant else key
        if key in REFUSED:
            raise ZooError(f"PEFT's method {name!r} does not work here: {REFUSED[key]}.")
        if self.name not in configs:
            raise unknown("method of PEFT", name, names())
        self.config_class = configs[self.name]
        self.owner = f"PEFT's {self.config_class.__name__}"
        for field, value in variant.items():
            if options.get(field, value) != value:
                raise ZooError(f"method {name!r} is {field}={value}, got options.{field}={options[field]!r}.")
        own = {f.name for f in fields(self.config_class)}
        pinned = {k: v for k, v in _DEFAULTS.get(self.name, {}).items() if k in own}
        self.options = self._checked({**pinned, **options, **variant})
        made = self.config()  # what PEFT itself refuses
        if self.name == "adalora" and made.init_r <= made.target_r:  # PEFT fails once the budget is to be met
            raise ZooError(
                f"{self.owner}: ranks fall from init_r to target_r in the mean, so init_r must be more; got "
                f"init_r={made.init_r}, target_r={made.target_r}."
            )

    @property
    def init(self) -> str:
        """The initial values of LoRA by name; empty where they are the usual ones."""
        given = self.options.get("init_lora_weights")
        return given.lower() if isinstance(given, str) else ""

    @property
    def residual(self) -> bool:
        """Whether PEFT takes the initial term out of the base weights, so that the model begins as the base."""
        return self.init.startswith(RESIDUAL)

    @property
    def from_data(self) -> bool:
        """Whether initial values come from activations."""
        return self.init in ("eva", "corda")

    def config(self, **changes: Any) -> Any:
        """Make PEFT's config; `changes` replace options.

        Raises:
            ZooError: PEFT refuses a value.
        """
        more = {"total_step": 2**31} if self.name == "adalora" else {}  # known when a stage begins
        try:
            return self.config_class(task_type="CAUSAL_LM", **{**more, **self.options, **changes})
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise ZooError(f"{self.owner} refuses the options: {one_line(error)}") from error

    def has(self, field: str) -> bool:
        """Whether the config class has a field."""
        return field in {f.name for f in fields(self.config_class)}

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        values = checked(self.config_class, given, self.owner)
        for name, value in values.items():
            if name.endswith("_pattern") and isinstance(value, dict):
                _require_names(name, value, self.owner)
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(value := values.get(name), str) and value != "all-linear":
                raise ZooError(
                    f"Option {name!r} of {self.owner} takes a list of names here, got the text {value!r}. Write last "
                    "parts of names ([q_proj,v_proj]) or shell patterns over whole names (['*.layers.[0-3].*.q_proj'])."
                )
            _require_names(name, values.get(name) or [], self.owner)
        _require_names("layers_pattern", values.get("layers_pattern") or [], self.owner)
        init = str(values.get("init_lora_weights", "")).lower()
        if init in _REFUSED_INITS:
            raise ZooError(f"init_lora_weights={init} does not work here: {_REFUSED_INITS[init]}.")
        if values.get("use_dora") and init.startswith(RESIDUAL):
            raise ZooError(
                f"use_dora does not go with init_lora_weights={init} here: DoRA's norms would be those of the base "
                "weights without the initial term. Leave one of them out."
            )
        if init == "eva":
            eva = _config_of_eva(values.get("eva_config"))
            if eva.rho != 1.0:
                raise ZooError(
                    f"eva_config.rho must be 1 here, got {eva.rho}: more would give each layer a rank that depends on "
                    "the data, and a run that is resumed, or a model that is loaded, would have other shapes. "
                    "rank_pattern sets ranks by hand."
                )
            values["eva_config"] = eva
        return values


def names() -> list[str]:
    """Names of all methods that work, those of LoRA's variants included that this version of PEFT has."""
    inits = typing.get_type_hints(_configs()["lora"])["init_lora_weights"]
    known = [
        n for n, option in VARIANTS.items() if option.get("init_lora_weights", "eva") in _shown(inits).split(" | ")
    ]
    return sorted({*(_configs().keys() - REFUSED.keys()), *known})


def options_of(config: type) -> list[Option]:
    """Return the fields of a config class that a user may set, with PEFT's own help texts."""
    hints = typing.get_type_hints(config)
    found = []
    for f in fields(config):
        if f.name in OWN or f.name in _REFUSED_OPTIONS:
            continue
        default = f.default if f.default is not NO_DEFAULT else MISSING
        if default is MISSING and f.default_factory is not NO_DEFAULT:
            default = f.default_factory()
        help_text = f.metadata.get("help", "")  # a tuple of texts for some
        doc = " ".join((help_text if isinstance(help_text, str) else " ".join(help_text)).split())
        found.append(Option(f.name, _shown(hints[f.name]), default, doc))
    return found


def checked(config: type, given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the values of a dataclass's fields, converted to their types.

    Raises:
        ZooError: a field does not exist, is not for users, or has a value of another type.
    """
    hints = typing.get_type_hints(config)
    hints |= {
        name: hints[name] | float for name in ("lora_alpha",) if name in hints
    }  # annotated as int, used as a float
    by_name = {f.name: f for f in fields(config)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in OWN and name in by_name:
            raise ZooError(f"Option {name!r} of {owner} is not set by hand: it follows from the model and the stage.")
        if name not in by_name:
            raise unknown_option(owner, str(name), options_of(config))
        default = by_name[name].default
        if value == default and type(value) is type(default):
            continue
        if name in _REFUSED_OPTIONS:
            raise ZooError(f"Option {name!r} of {owner} does not work here: {_REFUSED_OPTIONS[name]}.")
        if value is None and default is None:
            continue
        try:
            values[name] = _converted(value, hints[name], f"{owner}.{name}")
        except _WrongTypeError as error:
            takes = f"{_shown(hints[name])} (default {default!r})"
            raise ZooError(f"Option {name!r} of {owner} takes {takes}, got {value!r}.{error}") from None
    return values


class _WrongTypeError(Exception):
    """A value does not have the type; the text is a hint, with a blank in front, or nothing."""


def _converted(value: Any, hint: Any, owner: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return _first_fit(value, inner, owner)
    if origin is Literal:
        return _word(value, inner)
    if origin in (list, set, Sequence) and isinstance(value, (list, tuple)):
        return [_converted(item, inner[0], owner) for item in value] if inner else list(value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return tuple(_converted(v, h, owner) for v, h in zip(value, inner, strict=True))
    if (hint is dict or origin is dict) and isinstance(value, Mapping):
        return {k: _converted(v, inner[1], owner) if inner else v for k, v in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return hint(**checked(hint, value, owner))
    if hint is Any or (hint in (list, str, bool) and isinstance(value, hint)):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is int and number and (isinstance(value, int) or value.is_integer()):  # not inf or nan
        return int(value)
    if hint is type(None) and value is None:
        return None
    raise _WrongTypeError


def _first_fit(value: Any, hints: Sequence[Any], owner: str) -> Any:
    hint = ""
    # A dataclass before a dict: PEFT takes both for some options, and only the class has names for its keys.
    for one in sorted(hints, key=lambda h: not is_dataclass(h)):
        try:
            return _converted(value, one, owner)
        except _WrongTypeError as error:
            hint = hint or str(error)
    raise _WrongTypeError(hint)


def _word(value: Any, allowed: Sequence[Any]) -> Any:
    """One of the allowed words; `pissa_niter_[number of iters]` means those with a number at the end."""
    for word in allowed:
        pattern = re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(str(word)))
        if value == word or (isinstance(value, str) and "[" in str(word) and re.fullmatch(pattern, value)):
            return value
    near = nearest(value, [str(word) for word in allowed]) if isinstance(value, str) else []
    raise _WrongTypeError(f" Did you mean {near[0]!r}?" if near else "")


def _require_names(option: str, given: Any, owner: str) -> None:
    """Refuse what PEFT would read as a regular expression: the config may come from elsewhere, and one may never end.

    Raises:
        ZooError: a name has other characters than those of names and shell patterns.
    """
    for name in [given] if isinstance(given, str) else given:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.*?\[\]!-]+", name):
            raise ZooError(
                f"Option {option!r} of {owner} takes last parts of names or shell patterns over whole names, "
                f"got {name!r}."
            )


def _config_of_eva(given: Any) -> Any:
    from peft import EvaConfig

    return EvaConfig(rho=1.0) if given is None else given


def _configs() -> dict[str, Any]:
    """PEFT's config classes by the names of their methods."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def tuner_of(config: Any) -> Any:
    """PEFT's class that changes the model by a config."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def _shown(hint: Any) -> str:
    """Format a type as in messages: int, list[str] | str, gaussian | eva."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " | ".join(_shown(one) for one in inner)
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, inner))
    if inner:
        return f"{typing.get_origin(hint).__name__}[{', '.join(map(_shown, inner))}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
