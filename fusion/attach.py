"""Change a model that we do not own, each with its undo: terms on a linear's output, replaced modules or forwards.

Adapters attach after the base weights are loaded and undo everything in `detach`. State-dict keys of the base model
stay those of its checkpoints, also where a wrapper adds a level. Hooks and undos are methods, or partials of functions:
a copy of the model has its own, and it can be pickled, which a closure in it cannot.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo.registry import ZooError, nearest

_ASIDE = "_zoo_stands_aside"  # marks a module whose forward another module computes (`compute_by`)
_TABLES = (  # of hooks on a module's forward
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def refer(module: nn.Module, **others: Any) -> None:
    """Let a module hold others under these names without being their parent.

    An attribute that is a module becomes a child: saved, moved, trained and counted once more, here.
    """
    module.__dict__.update(others)


def linears(root: nn.Module, head: nn.Module | None = None) -> list[str]:
    """Name the linear layers below `root` in the order of its modules, GPT-2's `Conv1D` too.

    `head` is left out, and so are layers that are bypassed.
    """
    aside = bypassed(root)
    return [n for n, m in root.named_modules() if m is not head and _is_linear(m) and not n.startswith(aside)]


def bypassed(root: nn.Module) -> tuple[str, ...]:
    """Prefixes of what is inside of modules whose forward was replaced (`compute_by`): it does not run."""
    return tuple(f"{n}." for n, m in root.named_modules() if _ASIDE in m.__dict__)


def fused_experts(lm: nn.Module) -> list[str]:
    """Name the parameters that hold all experts of a layer in one tensor (E, ...), without a linear layer for each."""
    return [n for n, p in lm.named_parameters() if p.ndim == 3 and "experts" in n.split(".")[:-1]]


def find_linears(lm: Any, targets: Iterable[str], who: str) -> list[str]:
    """Name the linear layers of a language model that match `targets`.

    Args:
        lm: the transformers model, real or on the meta device.
        targets: last parts of names (`q_proj`, `self_attn.q_proj`), shell patterns over whole names
            (`*.layers.0.*.q_proj`), or `all-linear`: all but the vocabulary projection.
        who: the adapter, for the message.

    Raises:
        ZooError: a target matches nothing, or only modules that are not linear layers.
    """
    head = lm.get_output_embeddings()
    known = linears(lm, head)
    chosen: set[str] = set()
    for target in targets:
        if target == "all-linear":
            chosen |= set(known)
            continue
        hits = [n for n in known if means(target, n)]
        if not hits:
            others = [n for n, m in lm.named_modules() if n and means(target, n)]
            if others:
                kind = "the vocabulary projection" if lm.get_submodule(others[0]) is head else "not a linear layer"
                kind = "bypassed by another adapter" if others[0].startswith(bypassed(lm)) else kind
                raise ZooError(f"{who} cannot target {target!r}: {others[0]!r} is {kind}.")
            short = sorted({n.rpartition(".")[2] for n in known})
            near = nearest(target, [*short, *known], 3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            fused = fused_experts(lm)
            hint += f" Its experts are fused tensors such as {fused[0]!r}, not linear layers." if fused else ""
            raise ZooError(
                f"{who} has no target {target!r} in {type(lm).__name__}.{hint} "
                f"Linear layers: {', '.join(short)}, or 'all-linear'."
            )
        chosen |= set(hits)
    return [n for n in known if n in chosen]


def add_to_output(lm: nn.Module, name: str, delta: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Add `delta(x)` to the output of the linear layer called `name`; None adds nothing.

    The module tree and the state-dict keys of `lm` stay as they were, so base checkpoints still load. Activation
    checkpointing runs the hook again in backward: `delta` must be a pure function of `x` and of its own parameters.
    Pass a method, or a `partial` of one: a deep copy of the model then calls the copied owner, unlike a closure.
    """
    return lm.get_submodule(name).register_forward_hook(partial(_add, delta))


def _add(delta: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    extra = delta(args[0])
    return out if extra is None else out + extra


def replace(root: nn.Module, name: str, new: nn.Module) -> Callable[[], None]:
    """Replace the module called `name` by `new`; returns a function that puts the old one back."""
    parent_name, _, leaf = name.rpartition(".")
    parent = root.get_submodule(parent_name)
    old = parent.get_submodule(leaf)

    parent.add_module(leaf, new)
    return partial(parent.add_module, leaf, old)


def compute_by(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Compute calls of `module` by `forward`; returns a function that undoes it.

    The module tree, its names and its weights stay. Pass a bound method: it is copied along with the model, as the undo
    is, and a closure is not.
    """
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    module.__dict__[_ASIDE] = True
    return partial(_compute_as_before, module, before)


def _compute_as_before(module: nn.Module, before: Callable[..., Any] | None) -> None:
    compute_itself(module)
    if before is not None:
        module.__dict__["forward"] = before


def keep_keys(wrapper: nn.Module, inner: str = "base") -> Callable[[], None]:
    """Leave the level `inner` of a wrapper out of state-dict keys: `q_proj.base.weight` is saved as `q_proj.weight`.

    Base checkpoints then load into the wrapped model, and its checkpoints into a plain one. Returns the undo.
    """
    handles = [
        wrapper.register_state_dict_post_hook(partial(_leave_out, inner)),
        wrapper.register_load_state_dict_pre_hook(partial(_put_in, inner)),
    ]
    return partial(_remove, handles)


def _leave_out(inner: str, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    _rename(state, f"{prefix}{inner}.", prefix)


def _put_in(inner: str, module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    own = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    direct = {f"{prefix}{name}" for name in [*module._parameters, *module._buffers]}
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(own) and k not in direct]:
        state[f"{prefix}{inner}.{key.removeprefix(prefix)}"] = state.pop(key)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Run hooks on the forward of `old` on that of `new`, which takes its place, behind hooks of its own.

    A table moves where `new` has none of its own, so that handles still remove the hooks in it.
    """
    for table in _TABLES:
        theirs, own = getattr(old, table), getattr(new, table)
        if own:
            own.update(theirs)
        else:
            setattr(new, table, theirs)


def compute_itself(module: nn.Module) -> None:
    """Let a module compute its own forward again: the undo of `compute_by` where it was its first."""
    del module.__dict__["forward"], module.__dict__[_ASIDE]


def stands_aside(module: nn.Module) -> bool:
    """Whether the module's forward was replaced (`compute_by`)."""
    return _ASIDE in module.__dict__


def hooks_on(module: nn.Module) -> int:
    """Count the hooks on a module, those on gradients included."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return sum(map(len, tables))


def _rename(state: dict[str, Tensor], old: str, new: str) -> None:
    for key in [k for k in state if k.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)


def _is_linear(module: nn.Module) -> bool:
    router = hasattr(module, "top_k")  # Llama 4 and Phi-MoE derive theirs from a linear layer, and it gives a tuple
    return (isinstance(module, nn.Linear) and not router) or type(module).__name__ == "Conv1D"


def means(target: str, name: str) -> bool:
    """Whether `target`, the last parts of a name or a shell pattern, matches the module called `name`."""
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)
