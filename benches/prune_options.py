"""What `zoo bench prune` is asked to measure: the model, the pruners with their options, the sections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.benches.place import at_least_one, chosen
from zoo.benches.prune_models import accepts
from zoo.registry import POSITIONS, ZooError, names, unknown

NONE = "null"
CONTROLS = ("random", "pool", "downsample")  # on every card
SECTIONS = ("prefill", "decode", "memory", "encoder", "scoring", "sizes", "products", "abilities", "batches")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Options:
    # random_100m (a decoder of 100 M with random weights), tiny, or one as `zoo eval` takes it; several with commas
    # between are one model trained with several seeds
    model: str = "random_100m"
    data: str = ""  # that a trained model is asked about, as `zoo eval` takes it; empty: the model's own
    pruner: str = "all"  # with commas between, controls come along; pruner.aim.start=4 and pruner.aim.preset=... too
    keep_ratio: float = 0.1111  # share of the tokens that pruners with such an option keep: 64 of 576
    keep: str = ""  # shares of the retention curves, with commas between; empty: keep_ratio alone
    positions: str = "auto"  # of kept tokens: auto | kept | dense
    text_tokens: int = 64  # of the prompt, half of them before the image
    batch: int = 1  # prompts at once
    new_tokens: int = 16  # of a decode turn
    rounds: int = 7  # turns of each variant
    threads: str = "1,2"  # of torch on the CPU for the prefill, the first for all else; one: time of the process
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "float32"  # float32 | bfloat16 | float16
    limit: int = 100  # samples of each draw, for a model with trained weights; 0: its answers are not scored
    seeds: int = 3  # draws of samples; `random` and its like draw anew in each
    questions: int = 500  # of section batches
    together: int = 16  # prompts of a batch there
    scored_tokens: int = 2048  # of section scoring
    # sections: prefill, decode, memory, encoder, scoring, sizes, products, abilities, batches; empty: all
    only: str = ""
    against: str = ""  # JSON of an earlier card, to compare with
    set: dict[str, Any] = field(default_factory=dict)  # pruner -> its options; written pruner.NAME.OPTION=value

    def __post_init__(self) -> None:
        at_least_one(
            self, "text_tokens", "batch", "new_tokens", "rounds", "seeds", "questions", "together", "scored_tokens"
        )
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        self.sections = chosen("section", self.only, SECTIONS)
        for name in [*self.pruners, *self.set]:
            if name != NONE and name not in names("pruner"):
                raise unknown("pruner", name, [NONE, "all", *names("pruner")])
        self.thread_counts = _numbers("threads", self.threads, int, 1)
        self.shares = _numbers("keep", self.keep, float, 0) or [self.keep_ratio]

    @property
    def pruners(self) -> list[str]:
        """The pruners in order: none, against which all is measured, the controls, then the others."""
        given = [p.strip("[] ") for p in self.pruner.split(",") if p.strip("[] ")]
        controls = [name for name in CONTROLS if name in names("pruner")]
        listed = [n for name in given for n in (names("pruner") if name == "all" else [name])]
        return list(dict.fromkeys([NONE, *controls, *listed]))

    def node(self, name: str, grid: Sequence[int], share: float | None = None) -> dict[str, Any] | None:
        """The options of a pruner that keeps a share of the tokens on a grid; those set by hand have precedence."""
        if name == NONE:
            return None
        given, option = dict(self.set.get(name, {})), share_option(name)
        share = self.keep_ratio if share is None else share
        if not option or "preset" in given:
            return given
        side = [max(1, round(n * share**0.5)) for n in grid]
        return {option: side if option == "target" else share, **given}


def share_option(name: str) -> str:
    """Return the option of a pruner for what is left of the tokens; empty: it has none, but a schedule.

    It is a share, or `target`, rows and columns of a smaller grid.
    """
    return next((option for option in ("keep_ratio", "merge_ratio", "target") if accepts(name, option)), "")


def _numbers(name: str, words: str, of: Callable[[str], Any], above: float) -> list[Any]:
    try:
        found = [of(word) for word in words.split(",") if word]
    except ValueError:
        raise ZooError(f"{name} is numbers with commas between, got {words!r}.") from None
    if any(number < above or (of is float and not 0 < number <= 1) for number in found):
        raise ZooError(f"{name} must be {'shares in (0, 1]' if of is float else 'at least 1'}, got {words}.")
    return found


def words(given: Sequence[str]) -> list[str]:
    """Write options of a pruner, `pruner.aim.start=4`, as the dataclass has them."""
    return [f"set.{w.removeprefix('pruner.')}" if w.startswith("pruner.") else w for w in given]
