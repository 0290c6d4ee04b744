"""PEFT's layers inside a language model: put in and taken out again, with the names that checkpoints have.

PEFT replaces modules, each with the old one inside, and freezes the rest of the model. Here the old modules come back
to the bit, what trains is left as it was, and base weights keep their names: `q_proj.weight` stays that although it is
`q_proj.base_layer.weight` while the layers are in.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from zoo.fusion.attach import keep_keys, move_hooks


class Places:
    """Where PEFT's layers are in a language model, and which tensors of it are theirs.

    A plain object: it holds modules of the language model, which a module would take for its own children.

    Attributes:
        made: what `make` returned.
        layers: path in the language model -> PEFT's module.
        raw: names of tensors as `named_parameters` and `named_buffers` give them.
        saved: names of those that are saved, as `state_dict` gives them.
        fixed: parameters that PEFT does not train, or that have no effect while the layers are in.
    """

    def __init__(self, lm: nn.Module, make: Callable[[], Any]) -> None:
        """Put the layers in by `make`, which calls PEFT on `lm`."""
        children = [(path, parent, name) for path, parent in lm.named_modules() for name, _ in parent.named_children()]
        before = [(parent, name, getattr(parent, name)) for _, parent, name in children]
        base = {id(t) for t in _tensors(lm)}
        keys = set(lm.state_dict())
        with _left_alone(lm):
            self.made = make()
        self.lm = lm
        # The old module is looked up where it is needed: one in few bits may have taken its place.
        self._places: list[tuple[nn.Module, str, str, nn.Module]] = []  # parent, name, path of the old one in the new
        self.layers: dict[str, nn.Module] = {}
        shadowed: set[int] = set()
        for (path, _, name), (parent, _, old) in zip(children, before, strict=True):
            new = getattr(parent, name)
            if new is old:
                continue
            inside = next(inner for inner, module in new.named_modules() if module is old)
            keep_keys(new, inside)
            new.train(old.training)
            self._places.append((parent, name, inside, new))
            self.layers[f"{path}.{name}" if path else name] = new
            if _replaces(new):
                shadowed |= {id(t) for t in old.parameters()}
        named = dict(lm.named_parameters(remove_duplicate=False))
        self.raw = {n for n, t in [*named.items(), *lm.named_buffers(remove_duplicate=False)] if id(t) not in base}
        self.saved = set(lm.state_dict()) - keys
        self.fixed = {n for n, p in named.items() if n in self.raw and not p.requires_grad}
        self.fixed |= {n for n, p in named.items() if id(p) in shadowed}
        self.attached = True

    def attach(self) -> None:
        """Put the layers back in."""
        if not self.attached:
            for parent, name, _, new in self._places:
                parent.add_module(name, new)
            self.attached = True

    def detach(self) -> None:
        """Put the modules of the language model back."""
        if self.attached:
            for parent, name, inside, new in self._places:
                parent.add_module(name, new.get_submodule(inside))
            self.attached = False

    def to_meta(self) -> None:
        """Move the tensors of the layers to the meta device, where those of the language model are."""
        for layer in self.layers.values():
            layer.to("meta")

    def merge(self, around: Callable[[str], AbstractContextManager] = nullcontext) -> None:
        """Take the layers out with their terms in the base weights; hooks that others put on them stay.

        Args:
            around: path of a layer -> a context in which it is merged.

        Raises:
            NotImplementedError: PEFT cannot merge the method.
        """
        left = []
        try:
            for path, (_, _, _, new) in zip(self.layers, self._places, strict=True):
                module: Any = new
                with around(path):
                    if hasattr(module, "unload_and_optionally_merge_module"):  # rows of an embedding
                        left.append(module.unload_and_optionally_merge_module(True, False, None))
                    else:
                        module.merge()
                        left.append(module.get_base_layer())
        except Exception:
            for _, _, _, module in self._places[: len(left)]:
                module.unmerge()
            raise
        for (parent, name, _, new), module in zip(self._places, left, strict=True):
            move_hooks(new, module)
            parent.add_module(name, module)
        self.attached = False

    def tied(self) -> tuple[str, str] | None:
        """A layer with a term on a matrix that another layer has too, and that one; None: there is no such layer.

        Rows of tokens are not meant, which PEFT changes in both alike.
        """
        for path, (_, _, inside, new) in zip(self.layers, self._places, strict=True):
            old = new.get_submodule(inside)
            if "trainable_tokens" in type(new).__module__ or hasattr(new, "unload_and_optionally_merge_module"):
                continue
            mine = {id(p) for p in old.parameters()}
            for name, module in self.lm.named_modules():
                if module is not old and mine & {id(p) for p in module._parameters.values()}:
                    return path, name.removesuffix(".base_layer")
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the layers by their names in a saved model, also while the layers are out."""
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            found |= layer.state_dict(prefix=f"{path}.", keep_vars=True)
        return {n: t for n, t in found.items() if n in self.saved}

    def every(self) -> dict[str, Tensor]:
        """All tensors of the layers, those that are not saved too, by path and name."""
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            found |= {f"{path}.{n}": t for n, t in named}
        return {n: t for n, t in found.items() if n in self.raw}


@contextmanager
def _left_alone(lm: nn.Module) -> Iterator[None]:
    """Undo what PEFT changes beside the layers that it makes: what trains (it freezes the base, and here the recipe
    decides), and which layers of another adapter act.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    trains = [(p, p.requires_grad) for p in lm.parameters()]
    # PEFT tells all layers of a kind which set of weights acts: those of another adapter would stop.
    others = [(m, m._active_adapter) for m in lm.modules() if isinstance(m, BaseTunerLayer)]
    # PEFT puts a hook on the embeddings of a model that recomputes activations, which is not needed here.
    recomputed: list[Any] = [m for m in lm.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in recomputed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in recomputed:
            module.gradient_checkpointing = True
        for layer, active in others:
            layer._active_adapter = active
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        lm.__dict__.pop("peft_config", None)  # with it, save_pretrained of transformers writes the adapter only


def _tensors(lm: nn.Module) -> Iterator[Tensor]:
    yield from lm.parameters()
    yield from lm.buffers()


def _replaces(layer: nn.Module) -> bool:
    """Whether a layer runs a module of its own in place of the old one, whose weights then have no effect."""
    return type(layer).__name__ == "LNTuningLayer"
