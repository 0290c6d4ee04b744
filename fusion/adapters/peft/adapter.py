"""Any method of PEFT that changes layers: DoRA, PiSSA, EVA, OFT, VeRA, AdaLoRA, LoKr, IA3, LoRA on experts and others.

Source: PEFT (https://github.com/huggingface/peft), whose layers run unchanged. `method` is PEFT's name of a method, or
of a config class (`VeraConfig`), or what papers call LoRA with one option set (`dora`, `rslora`, `pissa`, `olora`,
`corda`, `eva`, `mica`). `options` are the fields of its config class, checked against PEFT's own dataclasses.

Which one. `adapter=lora` is plain LoRA with options of our own, and goes where the model is cast. This one is for all
else that PEFT has: it keeps new weights in float32 as `get_peft_model` does, and writes the adapter in PEFT's format
beside the model (`<folder>/peft`), which `PeftModel.from_pretrained` reads. `mole`, `moextend`, `upcycle` and `vlora`
are what PEFT lacks: they route tokens or read images.

Where we differ from `get_peft_model`, with equal outputs and gradients:

- Base weights are never changed. PiSSA, OLoRA and CorDA begin with a term B0 A0 of the size of the weights, which PEFT
  subtracts from them; here the layer subtracts it from its output, W x + s (B A - B0 A0) x. So the adapter is detached
  to the bit, and a saved model names its base and holds B0 and A0 alone.
- EVA and CorDA read activations of the stage's own batches ahead of its first step (`batches`), the same in every
  process; EVA gives all layers one rank. AdaLoRA's budget follows the steps of the first stage that trains it, and its
  orthogonality loss is `adalora_orthogonal`.
- Names in options are last parts of names or shell patterns, each of which has to mean something, and no regular
  expressions.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.adapters.peft import peft_file, peft_folder
from zoo.fusion.adapters.peft.beginning import Beginning, subtracted
from zoo.fusion.adapters.peft.budget import LOSS, Budget
from zoo.fusion.adapters.peft.calibration import corda_eigens, eva_vectors
from zoo.fusion.adapters.peft.layers import Places
from zoo.fusion.adapters.peft.methods import Method
from zoo.fusion.adapters.peft.targets import resolved
from zoo.fusion.attach import add_to_output, fused_experts, refer
from zoo.registry import Adapter, ImageFeatures, ZooError, one_line, register, require_at_least
from zoo.registry.following import weights_follow
from zoo.registry.quiet import no_warning_of

SPARE = 1 << 28  # numbers that new weights may have beside eight times those of the language model
NAME = "peft"  # PEFT's name for this set of weights: `q_proj.lora_A.peft.weight`


@dataclass
class PeftAdapterConfig:
    # One of adalora, beft, boft, c3a, corda, deft, delora, dora, eva, fourierft, glora, gralora, hira, hra, ia3,
    # lily, ln_tuning, loha, lokr, lora, mica, miss, oft, olora, osf, peanut, pissa, psoft, pvera, randlora, road,
    # rslora, shira, supertuning, tinylora, trainable_tokens, unilora, vblora, vera, waveft; or PEFT's config class.
    method: str = "lora"
    # Fields of PEFT's config class, as PEFT calls them: {r: 8, target_modules: [q_proj, v_proj]}.
    options: dict[str, Any] = field(default_factory=dict)
    batches: int = 8  # forward passes over the stage's batches whose activations eva and corda read
    # folder or hub repository that PEFT wrote (adapter_config.json, adapter_model.safetensors): method, options and
    # weights are its own
    checkpoint: str = ""
    revision: str = ""  # branch, tag or commit of the repository

    def __post_init__(self) -> None:
        require_at_least(1, batches=self.batches)
        if self.revision and not self.checkpoint:
            raise ZooError(f"revision={self.revision} is of a hub repository: name it, checkpoint=org/name.")
        if self.checkpoint:
            method, options, _ = peft_folder.described(self.folder)
            if (self.method, self.options) not in ((method, options), ("lora", {})):
                raise ZooError(f"method and options come from checkpoint={self.checkpoint!r}: leave them out.")
            self.method, self.options = method, options
        try:
            Method(self.method, self.options)
        except ZooError as error:
            whole = any(self.options.get(name, "none") != "none" for name in ("bias", "modules_to_save"))
            if not (self.checkpoint and whole):
                raise
            raise ZooError(
                f"{error} Or merge the adapter in {self.checkpoint!r} into its base with PEFT (merge_and_unload), and "
                "name the result as llm.checkpoint."
            ) from None

    @property
    def folder(self) -> Path:
        """The folder of `checkpoint`, which is fetched where it is a repository of the hub."""
        return peft_folder.folder_of(self.checkpoint, self.revision)


@register("adapter", "peft")
class PeftAdapter(Adapter, nn.Module):
    """Computes the base model at the start, where the method does: all but fourierft, unilora and the like."""

    # What the check proposes where another adapter already owns the linear layers of the feed-forward.
    choices = {"options.target_modules": (["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "o_proj"])}

    lm: Any  # the transformers model, held outside of the module tree: its parameters belong to the LLM
    places: Places | None  # PEFT's layers, once they were made; kept while detached
    beginning: nn.ModuleDict  # layer -> its term at the start, which is subtracted; empty for most methods
    budget: Budget | None  # of AdaLoRA
    calibrated: Tensor  # () bool, where initial values come from data

    def __init__(self, config: PeftAdapterConfig, *, llm: Any) -> None:
        super().__init__()
        self.config = config
        self.method = Method(config.method, config.options)
        self.peft_config, self.exclusive = resolved(self.method, llm.lm)
        refer(self, lm=llm.lm)
        self.places = None
        # PEFT gives copies of norms the type of the norms, which multiply hidden states by them.
        self.keeps_float32 = self.method.name != "ln_tuning"
        # PEFT puts a wrapper around the tensor of the experts for the time of a pass.
        self.concurrent = not self.method.options.get("target_parameters")
        self.losses = frozenset({LOSS}) if self.method.name == "adalora" else frozenset()
        self.notes = self._unreached()
        if config.checkpoint:
            base = peft_folder.described(config.folder)[2]
            self.notes += peft_folder.base_note(base, llm.lm, config.checkpoint)
        self.merged = False  # for good
        self.beginning, self.budget = nn.ModuleDict(), None
        self._hooks: list[Any] = []  # of `beginning`
        if self.method.from_data:
            self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))  # by data, or loaded so

    # ---- in and out --------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Replace the targets by PEFT's layers; attaching again reuses the layers and weights of the first time."""
        if self.merged:
            return
        if self.places is not None:
            self.places.attach()
            return
        self.places = self._make(self._config_here())
        if self.method.residual:
            for path in self.exclusive:
                beginning = Beginning(self.places.layers[path], NAME)
                self.beginning[path.replace(".", "-")] = beginning
            self._subtract()
        if self.method.name == "adalora":
            config = self.places.made.peft_config[NAME]
            self.budget = Budget(self.places.made.base_model, config, self.places.every())
        self._read()

    def _subtract(self) -> None:
        """Let the layers subtract their terms at the start from their outputs."""
        self._hooks = [add_to_output(self.lm, path, beginning.__call__) for path, beginning in self._beginnings()]

    def _read(self) -> None:
        """Read the weights of the folder that the options name, with the layers in."""
        if self.config.checkpoint and self.places is not None and not weights_follow():
            peft_folder.read_into(self.places.made, NAME, self.config.folder)

    def detach(self) -> None:
        """Put the modules back; the language model computes what it did before, bit for bit."""
        if self.places is not None:
            self.places.detach()

    def merge(self) -> None:
        """Add the terms to the base weights and detach for good; a plain language model is left.

        Raises:
            ZooError: it is not attached, or PEFT cannot merge the method; or a matrix is that of another layer too.
        """
        if self.places is None or not self.places.attached:
            raise ZooError("adapter 'peft' is not attached: there is nothing to merge into.")
        if tied := self.places.tied():
            raise ZooError(
                f"adapter 'peft' has a term on {tied[0]!r}, whose matrix is that of {tied[1]!r} too (tied embeddings): "
                f"merged, it would change both. Keep the adapter, or train one without {tied[0]!r} in target_modules."
            )
        for hook in self._hooks:
            hook.remove()
        try:
            self.places.merge(partial(subtracted, dict(self._beginnings()), self.lm))
        except (NotImplementedError, ValueError, AttributeError) as error:
            self._subtract()
            raise ZooError(f"PEFT cannot merge {self.config.method!r}: {one_line(error)}") from error
        self.places = None
        self.beginning, self.budget, self.exclusive = nn.ModuleDict(), None, []
        self.merged = True

    def start(self) -> None:
        """Initialise again, from the language model's weights as they are now."""
        attached = self.places is not None and self.places.attached
        if self.places is None:
            return
        self.detach()
        fresh = self._make(self._config_here())
        fresh.detach()
        self._take(fresh.every())
        self.attach()
        self._read()
        if not attached:
            self.detach()

    def options_now(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method and its options, and no folder: a saved model has the weights."""
        own = {"method": self.config.method, "options": self.config.options} if self.config.checkpoint else {}
        return {k: v for k, v in node.items() if k not in ("checkpoint", "revision")} | own

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        """Copy initial values into the parameters, in place: optimisers and processes hold these."""
        assert self.places is not None, "its layers were made"
        for name, tensor in self.places.every().items():
            tensor.copy_(values[name])
        for path, beginning in self._beginnings():
            beginning.take(self.places.layers[path])

    def _config_here(self) -> Any:
        """PEFT's config, without initial values of LoRA that a file, or data, replaces."""
        config = copy.deepcopy(self.peft_config)
        unknown_yet = self.method.init == "corda" or next(self.lm.parameters()).is_meta
        if self.method.residual and (unknown_yet or weights_follow()):
            config.init_lora_weights = True
        if self.method.name == "shira" and next(self.lm.parameters()).is_meta:
            config.mask_fn = _first_entries
        return config

    def _make(self, config: Any) -> Places:
        """Make PEFT's layers. The base weights stay what they are; new ones are float32 where the base has 16 bits."""
        from peft import PeftModelForCausalLM

        # Of tied embeddings, which stay as they are, and of a renamed property of transformers.
        known = no_warning_of("(?s).*(tie_word_embeddings|is_gradient_checkpointing).*")
        with _base_kept(self.lm, self.exclusive if self.method.residual else ()), known:
            try:
                with _device_of_indices(self.method.name, self.lm):
                    places = Places(self.lm, lambda: PeftModelForCausalLM(self.lm, config, adapter_name=NAME))
            except (ValueError, TypeError, ImportError, NotImplementedError) as error:
                raise ZooError(f"{self.method.owner} does not fit the language model: {one_line(error)}") from error
        if next(self.lm.parameters()).is_meta:
            places.to_meta()
            self._require_plausible(places)
        return places

    def _require_plausible(self, places: Places) -> None:
        """Refuse options that would fill memory, before any is taken: a config may come from elsewhere."""
        new = sum(t.numel() for t in {id(t): t for t in places.every().values()}.values())
        own = sum(p.numel() for n, p in self.lm.named_parameters() if n not in places.raw)
        if new > 8 * own + SPARE:
            raise ZooError(f"{self.config.method} would have {new:,} new numbers on a language model of {own:,}.")

    # ---- data and steps ----------------------------------------------------------------------------------------

    def passes_first(self) -> int:
        """Say how many passes over a stage's batches `calibrate` needs; 0 where its values are there."""
        return self.config.batches if self.method.from_data and not bool(self.calibrated) else 0

    def calibrate(self, passes: Sequence[Callable[[], None]]) -> None:
        """Initialise by activations of these passes: EVA and CorDA.

        Raises:
            ZooError: there are too few tokens, or PEFT refuses the activations.
        """
        if self.places is None or not self.method.from_data:
            return
        attached = self.places.attached
        self.detach()
        config = copy.deepcopy(self.peft_config)
        try:
            if self.method.init == "eva":
                found = eva_vectors(self.lm, config, passes)
                values = self.places.every()
                values |= {f"{path}.lora_A.{NAME}.weight": v for path, v in found.items()}
            else:
                with corda_eigens(self.lm, config, self.exclusive, passes):
                    fresh = self._make(config)
                    fresh.detach()
                values = fresh.every()
        except ValueError as error:
            if isinstance(error, ZooError):
                raise
            raise ZooError(f"{self.method.init} cannot read these batches: {one_line(error)}") from error
        finally:
            if attached:
                self.attach()
        self._take(values)
        self.calibrated.fill_(True)

    def begin_stage(self, steps: int) -> None:
        """Set the schedule of AdaLoRA's budget."""
        if self.budget is not None and self._trains():
            self.budget.begin(steps)

    def end_step(self, step: int) -> None:
        """Meet AdaLoRA's budget after step `step` of the stage, while its gradients are there."""
        if self.budget is not None and self._trains():
            self.budget.end_step(step + 1)

    def _trains(self) -> bool:
        if self.places is None or not self.places.attached:
            return False
        return any(t.requires_grad for t in self.places.every().values())

    def run_state(self) -> dict[str, Tensor]:
        """Return the running means of AdaLoRA's importances."""
        return {} if self.budget is None else self.budget.state()

    def aux_losses(self) -> dict[str, Tensor]:
        """AdaLoRA's orthogonality loss of a pass in training, weighted; empty for other methods."""
        if self.budget is None or not self.lm.training or not torch.is_grad_enabled() or not self._trains():
            return {}
        return {LOSS: self.budget.loss()}

    # ---- what the model asks -------------------------------------------------------------------------------------

    def owns(self, name: str) -> bool:
        """Whether the parameter `name` inside the language model belongs to this adapter."""
        return self.places is not None and (name in self.places.raw or name in self.places.saved)

    def idles(self, name: str) -> bool:
        """Whether a parameter is fixed by the method, or has no effect while the layers are in."""
        return self.places is not None and self.places.attached and name in self.places.fixed

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Check that the adapter is active; it does not depend on images.

        Raises:
            ZooError: `get_peft_model` put another adapter on the model, which deactivates this one.
        """
        if self.places is None or not self.places.attached:
            return
        on = getattr(next(iter(self.places.layers.values())), "active_adapters", [NAME])
        if list(on) != [NAME]:
            raise ZooError(
                f"PEFT runs {', '.join(map(repr, on)) or 'no adapter'} on this model, which switches the model's own "
                "adapter 'peft' off: call model.adapter['peft'].merge() before get_peft_model."
            )

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return this adapter's weights by their names in the language model; they share memory with the parameters."""
        return {} if self.places is None else {n: t.detach() for n, t in self.places.tensors().items()}

    def write_files(self, folder: Path) -> None:
        """Write the adapter in PEFT's format into `<folder>/peft`, for `PeftModel.from_pretrained(lm, folder)`."""
        if self.places is not None and not any(hasattr(t, "full_tensor") for t in self.places.every().values()):
            attached = self.places.attached
            self.places.attach()
            try:
                ranks = None if self.budget is None else self.budget.ranks()
                peft_file.write(self.places.made, NAME, folder / "peft", dict(self._beginnings()), ranks)
            finally:
                if not attached:
                    self.detach()

    def _beginnings(self) -> Iterator[tuple[str, Any]]:
        for path in self.exclusive if self.beginning else ():
            yield path, self.beginning[path.replace(".", "-")]

    def _unreached(self) -> list[str]:
        """Describe the experts of a mixture that the targets do not reach; empty without a mixture."""
        fused = fused_experts(self.lm)
        if not fused or self.method.options.get("target_parameters"):
            return []
        words = ", ".join(sorted({name.rpartition(".")[2] for name in fused}))
        return [f"adapter 'peft' reaches no routed expert: name their tensors, target_parameters=[{words}]."]


def _first_entries(layer: Any, r: int, **_: Any) -> Tensor:
    """A mask (O, I) with as many entries as SHiRA's own has, which needs values."""
    mask = torch.zeros(layer.weight.shape)
    mask.view(-1)[: r * sum(mask.shape)] = 1
    return mask


def _device_of_indices(method: str, lm: Any) -> Any:
    """Make tensors on the CPU while the model is on the meta device, for methods that count with values of indices."""
    meta = next(lm.parameters()).is_meta
    return torch.device("cpu") if meta and method in ("boft", "unilora") else nullcontext()


@contextmanager
def _base_kept(lm: Any, paths: Sequence[str]) -> Iterator[None]:
    """Give the linear layers their weights back, which PEFT replaces or changes in place."""
    held = [(weight, weight.data, weight.data.clone()) for weight in (lm.get_submodule(p).weight for p in paths)]
    try:
        yield
    finally:
        for weight, data, copied in held:
            weight.data = data.copy_(copied)
