"""A part that rules are tried on: its kind, its options, and how it is built alone."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.contracts.given import same_state
from zoo.contracts.on_device import GPU, devices_of_outputs, placed, tensors_of
from zoo.contracts.rules import NotForThisPart, Rules, expect
from zoo.registry import ZooError, build, get


@dataclass
class Case:
    """One part, by its kind and its node."""

    kind: str
    node: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.node["name"])

    @property
    def cls(self) -> type[Any]:
        return get(self.kind, self.name).cls

    @property
    def options(self) -> set[str]:
        """Names of its options."""
        return {f.name for f in fields(get(self.kind, self.name).config)}

    def build(self, seed: int = 0, **options: Any) -> Any:
        """Build it with random weights that follow from the seed."""
        raise NotImplementedError


def add_structure_rule(rules: Rules) -> None:
    """Add what `zoo check` relies on: under `torch.device("meta")` a part is built with the same structure."""

    @rules.add("meta", "built under torch.device('meta') it has the same weights, without memory")
    def meta(case: Case) -> str:
        with torch.device("meta"):
            empty = case.build()
        there = sorted({p.device.type for p in empty.parameters()} - {"meta"})
        expect(not there, f"built under torch.device('meta') it has weights on {', '.join(there)}", "all on meta")
        real = case.build()
        ours, theirs = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (empty, real))
        unlike = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        expect(not unlike, f"on the meta device {', '.join(unlike[:3])} differ in shape or are missing", "equal shapes")
        if hasattr(real, "num_tokens") and callable(real.num_tokens):
            expect(empty.num_tokens(24) == real.num_tokens(24), "num_tokens(24) differs on meta", "an equal count")
        return f"{len(ours)} weights"


def add_saving_rule(rules: Rules, call: Callable[[Any], Tensor], atol: float = 0.0) -> None:
    """Add that a state dict has all that a part learnt: two parts with the same one give the same."""

    @rules.add("state", "its state_dict makes another one of the same options give the same")
    def state(case: Case) -> str:
        one, other = case.build(seed=0), case.build(seed=1)
        if not one.state_dict():
            raise NotForThisPart("it has no weights")
        expect(not same_state(one.state_dict(), other.state_dict()), "two seeds gave equal weights", "random weights")
        other.load_state_dict(one.state_dict())
        with torch.no_grad():
            off = (call(one).float() - call(other).float()).abs().max().item()
        expect(off <= atol, f"with the same state_dict the outputs differ by {off:.1e}", "equal outputs")
        return f"{len(one.state_dict())} tensors"


def add_device_rule(rules: Rules, call: Callable[[nn.Module, Any], Any], given: Callable[[Case], Any]) -> None:
    """Add that a part makes its tensors on the device of its input."""

    @rules.add("device", "what it makes is on the device of what it is given")
    def device(case: Case) -> str:
        found = devices_of_outputs(case.build(), call, given(case))
        expect(
            found <= {GPU.type}, f"given tensors on {GPU.type}, it gives some on {', '.join(sorted(found))}", GPU.type
        )
        return "cuda" if torch.cuda.is_available() else "cuda, on fake tensors"


def add_no_trace_rule(rules: Rules, call: Callable[[Any, Any], Any], given: Callable[[Case], Any]) -> None:
    """Add that a pass leaves nothing behind it, so that threads share a part, and a run draws what it drew before."""

    @rules.add(
        "no trace", "a pass changes nothing but what it returns: neither its input, nor itself, nor random seeds"
    )
    @torch.no_grad()
    def no_trace(case: Case) -> str:
        part, image = case.build(), given(case)
        call(part, placed(image, lambda tensor: tensor.flip(0)))  # what is made once, positions say, is there now
        streams = _streams_begun()
        before, attributes = [tensor.clone() for tensor in tensors_of(image)], attributes_of(part)
        call(part, image)
        after = tensors_of(image)
        expect(
            alike(after, before),
            "what it is given has other values behind a pass",
            "a change of a copy alone",
        )
        expect_same(attributes, attributes_of(part))
        drawn = all(map(alike, streams, _streams()))
        expect(drawn, "it moves or sets the seed of random numbers that others draw", "a generator of its own, if any")
        return "input, attributes, random numbers"


def _streams_begun() -> list[Any]:
    """The states of the random numbers that all code shares, from an unusual seed."""
    torch.manual_seed(7041776)
    np.random.seed(7041776)
    random.seed(7041776)
    return _streams()


def _streams() -> list[Any]:
    return [torch.get_rng_state(), str(np.random.get_state()), random.getstate()]


_OF_MODULES = frozenset(vars(nn.Module()))


def attributes_of(part: nn.Module) -> dict[str, Any]:
    """What the modules of a part hold beside weights and hooks, by name; tensors and containers are copied."""
    modules = dict(part.named_modules())
    own = {f"{n}.{k}".lstrip("."): v for n, m in modules.items() for k, v in vars(m).items() if k not in _OF_MODULES}
    return {name: _copied(value) for name, value in {**own, **dict(part.named_buffers())}.items()}


def expect_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Break the rule where attributes of modules are others than before."""
    changed = [name for name in {**before, **now} if not alike(before.get(name), now.get(name))]
    expect(not changed, f"a pass leaves {', '.join(changed[:3])} behind", "what a pass knows in local variables")


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def alike(a: Any, b: Any) -> bool:
    """Whether two values are of one type and equal, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a is b or bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)


def add_compile_rule(rules: Rules, call: Callable[[Any, Any], Tensor], given: Callable[[Case], Any]) -> None:
    """Add that compiled code computes the same, without the seconds of a code generator (aot_eager)."""

    @rules.add("compile", "compiled by torch.compile it gives the same")
    def compiled(case: Case) -> str:
        part, image = case.build(), given(case)
        torch._dynamo.reset()
        with torch.no_grad():
            plain = call(part, image)
            fast = torch.compile(part, backend="aot_eager")
            off = (call(fast, image).float() - plain.float()).abs().max().item()
        torch._dynamo.reset()
        expect(off <= 1e-5, f"compiled, the output differs by {off:.1e}", "at most 1e-05")
        return f"differs by {off:.0e}"


def add_options_rule(rules: Rules) -> None:
    """Add that options have a help text, and that the dataclass is the schema."""

    @rules.add("options", "each option has a comment, and one that is misspelt is refused with the nearest name")
    def options(case: Case) -> str:
        found = get(case.kind, case.name).options
        for option in found:
            expect(option.doc, f"option {option.name!r} has no comment", "a comment behind the field: its help text")
            try:
                build(case.kind, {**case.node, option.name + "x": 1})
            except ZooError as error:
                expect("Did you mean" in str(error), str(error), f"Did you mean {option.name!r}?")
            else:
                expect(False, f"{option.name}x is taken for an option", "refused")
        return f"{len(found)} options"
