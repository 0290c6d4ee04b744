"""What a decoder layer behind a cut is given in place of its arguments: masks, rotary tables and positions.

Tables and positions are rows of those that the decoder made for the unshortened prompt: a token takes those of its
place (`TokenSequence.place`). Where positions are dense, a token that is decoded is as much nearer as tokens of its row
are gone, so its tables are computed again by the decoder's own module.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.llm.attention import ZOO_EAGER, as_backend_mask
from zoo.fusion.llm.decoder import decoder_of
from zoo.fusion.pruners.inside.pruned_prompt import PrunedPrompt
from zoo.fusion.pruners.inside.sequence import TokenSequence
from zoo.registry import ZooError

_POSITIONS = ("position_embeddings", "position_ids")


class LayerArguments:
    """Arguments of the layers of one LLM.

    Args:
        llm: the language model part.
        who: the pruner, for messages.
    """

    def __init__(self, llm: Any, who: str) -> None:
        self.llm, self.who = llm, who
        self.config = llm.lm.config.get_text_config()

    def prefill(
        self, run: PrunedPrompt, number: int, hidden: Tensor, given: dict[str, Any], hide: bool
    ) -> dict[str, Any]:
        """Return what changes among the arguments `given` of a layer in the prompt's pass."""
        tokens, window = run.layers[number], self.window(number, run)
        if window not in run.masks:
            run.masks[window] = self._mask(tokens, window, hidden)
        changed: dict[str, Any] = {"attention_mask": run.masks[window]} if "attention_mask" in given else {}
        changed |= {"mask": run.masks[window]} if "mask" in given else {}
        if hide and not tokens.dense:
            return changed
        return self.positions(run, tokens, given, changed)

    def positions(
        self, run: PrunedPrompt, tokens: TokenSequence, given: dict[str, Any], changed: dict[str, Any]
    ) -> dict[str, Any]:
        """Add to `changed` the positions of the tokens left.

        Raises:
            ZooError: another argument is as long as the sequence, or dense positions are not possible.
        """
        # Every other argument as long as the sequence would silently be misaligned with the gathered states.
        for name, value in given.items():
            if name in _POSITIONS and value is not None:
                changed[name] = self._moved(run, tokens, value)
            elif name not in changed and name != "hidden_states" and _has_length(value, run.total + run.drafts):
                raise ZooError(
                    f"{self.who} cannot shorten {name!r}, an argument of {type(self.llm.lm).__name__} layers."
                )
        if tokens.dense and self.llm.axes > 1:
            raise ZooError(
                f"{self.who} cannot count positions anew inside {self.config.model_type!r}, whose positions have "
                f"{self.llm.axes} axes, a row and a column of the image among them. Set positions=kept."
            )
        if tokens.dense and not self._can_compute(given):
            raise ZooError(
                f"{self.who} cannot count positions anew inside {self.config.model_type!r}: its decoder has no "
                "module that makes rotary tables, or several. Set positions=kept."
            )
        return changed

    def decode(
        self, run: PrunedPrompt, number: int, hidden: Tensor, cache: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what changes in a decoding step over this layer's shorter cache."""
        tokens, name = run.layers[number], self.config._attn_implementation
        held = cache.layers[number]
        # Tokens decoded so far: what this layer's cache holds beyond the prompt's tokens left in this layer.
        cached, past = held.keys.shape[-2], int(held.get_seq_length()) - tokens.column.shape[1]
        new, b = run.new, hidden.shape[0]
        if new is None:
            new = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        gone = run.gone(tokens) if tokens.dense else None
        if gone is not None and len(gone) != b:
            gone = gone.repeat_interleave(b // len(gone))
        changed = {} if gone is None else self._nearer(run, number, hidden, given, gone)
        if len(tokens.seen) != b:  # rows were repeated after the prompt's pass
            tokens = tokens.repeat(b // len(tokens.seen))
        total = run.total + past + new.shape[1]
        window = self.window(number, run, total)
        if hidden.shape[1] == 1 and tokens.whole and window is None and run.new is None:
            return changed | {"attention_mask": None}  # a single query attends to the whole cache
        if name.startswith("flash") and window is None:
            seen = torch.cat([tokens.seen, new.new_ones(b, past), new], 1)
            return changed | {"attention_mask": seen.long()}
        mask = tokens.decode_mask(new, past, run.total, cached, window, gone)
        return changed | {"attention_mask": as_backend_mask(mask, name, _dtype(hidden))}

    def window(self, number: int, run: PrunedPrompt, total: int | None = None) -> int | None:
        """Return the sliding window of a layer, or None if the sequence fits into it."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds and kinds[number] != "sliding_attention":
            window = None
        if not window or (total or run.total) <= window:
            return None
        if self.config._attn_implementation.startswith("flash"):
            raise ZooError(
                f"{self.who} cannot shorten layers whose sliding window of {window} is exceeded by the sequence of "
                f"{total or run.total}: flash kernels would count the window in the tokens left. Set attention=sdpa."
            )
        return int(window)

    def _moved(self, run: PrunedPrompt, tokens: TokenSequence, value: Any) -> Any:
        """Select the rows of rotary tables or position ids of the tokens left; layers share the result."""
        # Keyed by identity: the decoder computes its tables once and passes the same objects to every layer.
        for whole, of, moved in run.rotary:
            if whole is value and of is tokens:
                return moved
        run.rotary = [entry for entry in run.rotary if entry[1] is tokens]
        parts = value if isinstance(value, (tuple, list)) else (value,)
        moved = tuple(rows_of(x, tokens.place) if x.is_floating_point() else ids_of(x, tokens.place) for x in parts)
        result = moved if isinstance(value, (tuple, list)) else moved[0]
        run.rotary.append((value, tokens, result))
        return result

    def _mask(self, tokens: TokenSequence, window: int | None, hidden: Tensor) -> Tensor | None:
        name = self.config._attn_implementation
        plain = tokens.whole and not tokens.packed and window is None
        # A flash kernel takes gaps in the positions of a single row for borders of packed samples, but for a mask.
        alone = name.startswith("flash") and len(tokens.seen) == 1 and not tokens.dense
        if plain and (name in ("sdpa", ZOO_EAGER) or name.startswith("flash")) and not alone:
            return None  # plain causal attention: kernels are faster without a mask
        if name.startswith("flash") and not tokens.packed and window is None:
            return tokens.seen.long()
        return as_backend_mask(tokens.prefill_mask(window), name, _dtype(hidden))

    # ---- dense positions of decoded tokens ---------------------------------------------------------------------

    def _nearer(
        self, run: PrunedPrompt, number: int, hidden: Tensor, given: dict[str, Any], gone: Tensor
    ) -> dict[str, Any]:
        """Return the positions of decoded tokens, lower by `gone` (B,)."""
        ids = given.get("position_ids")
        if ids is None:
            first = run.layers[0].seen.cumsum(1).eq(0).sum(1)  # padding on the left
            first = first.repeat_interleave(len(gone) // len(first))
            ids = torch.arange(run.past, run.past + hidden.shape[1], device=hidden.device) - first[:, None]
        ids = ids - gone[:, None]
        if given.get("position_embeddings") is None:  # layers make tables of ids, or positions are in the embeddings
            return {"position_ids": ids} if given.get("position_ids") is not None else {}
        tables, tokens = given["position_embeddings"], run.layers[number]
        for whole, of, moved in run.rotary:  # layers of one stage share them
            if whole is tables and of is tokens:
                return moved  # type: ignore[no-any-return]
        module, kinds = self.rotary(), getattr(self.config, "layer_types", None)
        kind = {"layer_type": kinds[number]} if kinds and _takes(module, "layer_type") else {}
        moved = {"position_ids": ids} if given.get("position_ids") is not None else {}
        moved |= {"position_embeddings": module(hidden, position_ids=ids, **kind)}
        run.rotary.append((tables, tokens, moved))
        return moved

    def frequencies(self, number: int) -> Tensor | None:
        """Return the angles per position by which the rotary tables of a layer turn pairs: (d / 2,); None: unknown."""
        kinds = getattr(self.config, "layer_types", None)
        names = ("inv_freq", f"{kinds[number]}_inv_freq" if kinds else "inv_freq")
        return next((x for n in names if isinstance(x := getattr(self.rotary(), n, None), Tensor)), None)

    def rotary(self) -> Any:
        """The decoder's module that makes rotary tables; None: there is none, or several."""
        found = [m for m in decoder_of(self.llm.lm).children() if "Rotary" in type(m).__name__]
        return found[0] if len(found) == 1 else None

    def _can_compute(self, given: dict[str, Any]) -> bool:
        module = self.rotary()
        return given.get("position_embeddings") is None or (module is not None and _takes(module, "position_ids"))


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Select the rows `index` (B, K) of a table (B or 1, T, ...)."""
    wide = index.view(*index.shape, *[1] * (table.dim() - 2)).expand(-1, -1, *table.shape[2:])
    return table.expand(len(index), *table.shape[1:]).gather(1, wide)


def ids_of(ids: Tensor, index: Tensor) -> Tensor:
    """Select the columns `index` (B, K) of position ids (B or 1, T), or of each of their axes (A, B or 1, T)."""
    return rows_of(ids, index) if ids.dim() == 2 else torch.stack([rows_of(axis, index) for axis in ids])


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _has_length(value: Any, length: int) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(x, Tensor) and length in x.shape[1:] for x in parts)


def _dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
