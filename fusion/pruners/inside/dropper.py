"""Drop image tokens inside an unmodified decoder of transformers, by hooks alone: shorter sequences, shorter caches.

A pruner defines after which layers tokens are dropped, how many are kept and how they are scored. Before the first
shorter layer the hidden states are gathered; later layers get matching rotary tables and masks, and their caches stay
shorter, through every strategy of transformers' `generate`. Tokens keep their positions, so dropping computes exactly
what masking them as keys would. Text and padding are never candidates, nor are tokens that predict: the last one, and
in training those before a label. Labels are gathered with the tokens.

Scores use the layer's queries and keys after rotation, without changing its attention kernel
(`zoo.fusion.pruners.inside.attention_tap`).

State of a prompt is kept in the current pass (`zoo.registry.forward_pass`) and on the cache that continues it, never on
the pruner. A prompt may be followed by drafts of assisted decoding: they attend like the prompt's last token and do not
vote on what is dropped.

Nothing is dropped before layer 0, since transformers counts positions by its cache. Refused, because results would be
wrong: caches of fixed size and quantised ones, several dialogs behind one image, layers that are not attention, flash
kernels with a sliding window in effect, the balance loss of an MoE LLM, a compiled decoder.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.llm.attention import ZOO_EAGER, as_backend_mask
from zoo.fusion.llm.decoder import decoder_of
from zoo.fusion.pruners.inside.attention_tap import AttentionInputs, tap_attention
from zoo.fusion.pruners.inside.droppable import require_cache, require_family
from zoo.fusion.pruners.inside.sequence import TokenSequence
from zoo.registry import InsidePruner, ZooError
from zoo.registry.forward_pass import Pass, current
from zoo.registry.versions import cache_in


@dataclass
class PrunedPrompt:
    """One prompt while it passes through the layers, and later the content of its cache."""

    total: int  # length of the unshortened prompt
    layers: list[TokenSequence]  # tokens of each layer
    budget: Tensor  # (B, samples) image tokens that entered the LLM
    copies: int = 1  # consecutive rows that are copies of one prompt (beams)
    drafts: int = 0  # columns after the prompt in this pass
    cut: int = -1  # first layer that is shorter or masked; -1: none so far
    labelled: Any = None  # the sequence whose labels are gathered with the tokens
    past: int = 0  # tokens in the cache before this pass
    new: Tensor | None = None  # (B, q) mask of non-padding tokens in this decoding step; None if there is no padding
    scoring: int | None = None  # layer whose attention is being scored
    scores: dict[int, Tensor] = field(default_factory=dict)  # (B, L) of each layer whose attention was scored
    masks: dict[Any, Any] = field(default_factory=dict)
    rotary: list[tuple[Any, TokenSequence, Any]] = field(default_factory=list)

    def settle(self) -> None:
        """Remove the drafts after the prompt's pass: accepted ones are counted as decoded tokens."""
        if self.drafts:
            self.layers = [tokens.without_last(self.drafts) for tokens in self.layers]
        self.drafts, self.scoring = 0, None
        self.masks.clear()
        self.rotary.clear()

    def kept(self) -> list[Tensor]:
        """Say which columns each layer saw of the prompt: (B, T) bool for each layer."""
        self.settle()
        shape = len(self.layers[0].seen), self.total
        seen = [x.column.new_zeros(shape).scatter(1, x.column, x.seen.long()) for x in self.layers]
        return [x.bool() for x in seen]

    def scored(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Say for each layer that was scored which columns (B, L) of the prompt it saw, and their scores (B, L)."""
        self.settle()
        columns = {layer: self.layers[layer].column for layer in self.scores}
        return {layer: (seen, self.scores[layer][:, : seen.shape[1]]) for layer, seen in columns.items()}


class Dropper:
    """Hooks on a decoder that drop image tokens between its layers.

    Args:
        llm: the language model part.
        who: the pruner, for messages.
        after: layers, counted from 0, after which tokens are dropped.
        budget: (layer, image tokens that entered (B, samples)) -> number of tokens to keep, (B, samples).
        score: queries and keys of a layer -> scores (B, L), higher is better.
        hide: mask tokens in attention instead of dropping them: the slow reference.
    """

    def __init__(
        self,
        llm: Any,
        who: str,
        after: list[int],
        budget: Callable[[int, Tensor], Tensor],
        score: Callable[[AttentionInputs], Tensor],
        hide: bool = False,
    ) -> None:
        self.llm, self.who, self.after, self.hide = llm, who, frozenset(after), hide
        self.budget, self.score = budget, score
        self.config = llm.lm.config.get_text_config()
        self._undo: list[Callable[[], None]] = []
        require_family(who, llm.lm)
        if outside := sorted(x for x in self.after if not 0 <= x < llm.num_layers - 1):
            raise ZooError(
                f"{who} drops tokens at the output of layer {outside[0]}; the LLM has the layers 0 to "
                f"{llm.num_layers - 1}, and a layer must follow."
            )

    # ---- attach ------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Register the hooks; one pruner inside an LLM at a time."""
        if self._undo:
            return
        lm = self.llm.lm
        # Two droppers would gather hidden states and masks independently of each other.
        if other := lm.__dict__.get("zoo_dropping"):
            raise ZooError(f"{self.who} and {other} both drop tokens inside the LLM: use one of them.")
        lm.__dict__["zoo_dropping"] = self.who
        self._undo.append(lambda: lm.__dict__.pop("zoo_dropping", None))
        for number, layer in enumerate(self.llm.layers):
            # Names of positional arguments, which checkpointing passes and families order differently.
            names = list(inspect.signature(layer.forward).parameters)
            handle = layer.register_forward_pre_hook(partial(self._before, number, names), with_kwargs=True)
            self._undo.append(handle.remove)
            if number in self.after:
                self._undo.append(
                    tap_attention(layer, partial(self._score, number), f"{self.who} in {type(lm).__name__}")
                )

    def detach(self) -> None:
        """Remove the hooks from the LLM."""
        while self._undo:
            self._undo.pop()()

    def check(self, sequence: Any) -> None:
        """Refuse a pass over `sequence` (`zoo.composed.outputs.LLMSequence`) in which tokens cannot be dropped."""
        blocks = getattr(sequence, "block_ids", None)
        # With several dialogs behind one image prefix, a token kept for one question may be dropped for another.
        if blocks is not None and int(blocks.max()) > 1:
            raise ZooError(
                f"{self.who} chooses image tokens by the question, and here several dialogs of a row share an image. "
                "Set pack=none in the stage."
            )
        mask = sequence.attention_mask
        if mask is not None and mask.dim() != 2:
            raise ZooError(f"{self.who} needs attention_mask (B, T), got {list(mask.shape)}.")
        decoder = decoder_of(self.llm.lm)
        compiled = getattr(decoder, "_compiled_call_impl", None) is not None or torch.compiler.is_compiling()
        if self._undo and compiled:
            raise ZooError(f"{self.who} makes lengths of layers depend on data, which does not compile: compile=false.")
        # transformers' balance loss joins router logits of all layers under one mask, assuming equal lengths.
        training = self.llm.training and torch.is_grad_enabled()
        if training and self.llm.router_aux_coef:
            raise ZooError(f"{self.who} shortens layers, and router_aux_coef needs equal lengths: set it to 0.")

    def _score(self, number: int, query: Tensor, key: Tensor, scaling: float | None, softcap: float | None) -> None:
        """Score the attention of layer `number` once per prompt; recomputation in backward does not score again."""
        now = current()
        run = None if now is None else now.dropped
        if run is None or run.scoring != number or number in run.scores:
            return
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        tokens, window = run.layers[number], self._window(number, run)
        # Scores only rank tokens: a gradient through them would reach no parameter, and keep q and k alive.
        with torch.no_grad():
            given = AttentionInputs(number, query.detach(), key.detach(), scaling, softcap, tokens, window)
            run.scores[number] = self.score(given)

    # ---- layers ------------------------------------------------------------------------------------------------

    def _before(
        self, number: int, names: list[str], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adapt a layer's inputs to the tokens left (a forward pre-hook)."""
        cache = cache_in(kwargs)
        if cache is None and len(args) > 1:
            cache = cache_in(dict(zip(names, args, strict=False)))
        if number:
            run = self._run_of(cache)
            if run is None or (run.past and (run.cut < 0 or number < run.cut)):
                return None  # decoding in a layer before the cut: its cache is complete
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given[names[0]]
        if number == 0:
            run = self._start(hidden, cache)
        if run is None:
            return None
        # Cleared in every layer: recomputation of a scored layer in backward must not score again.
        run.scoring = None
        if not run.past:
            hidden = self._enter(run, number, hidden)
            run.scoring = number if number in self.after and bool(run.budget.any()) else None
        if run.cut < 0 or number < run.cut:
            return None
        changed = self._decode(run, number, hidden, cache) if run.past else self._prefill(run, number, hidden, given)
        if run.past and all(given.get(name) is value for name, value in changed.items()):
            return None
        # Arguments go back in the form they came, positional or by keyword: checkpointing passes some positionally.
        given |= changed | {names[0]: hidden}
        first = names[: len(args)]
        return tuple(given[n] for n in first), {k: v for k, v in given.items() if k not in first}

    @staticmethod
    def _run_of(cache: Any) -> PrunedPrompt | None:
        """Find the prompt of this pass, which layer 0 has determined."""
        if cache is not None:
            return getattr(cache, "zoo_dropping", None)
        now = current()
        return None if now is None else now.dropped

    def _start(self, hidden: Tensor, cache: Any) -> PrunedPrompt | None:
        """Determine the prompt of this pass: a new one, the one that the cache continues, or None without images."""
        now = current()
        sequence = None if now is None else now.sequence
        # Keys in the cache mean decoding; the prompt is then found on the cache.
        if past := 0 if cache is None else int(cache.get_seq_length()):
            run = getattr(cache, "zoo_dropping", None)
            if run is not None:
                run.settle()
                mask, q = None if sequence is None else sequence.attention_mask, hidden.shape[1]
                run.past = past
                run.new = mask[:, -q:].bool() if mask is not None and mask.shape[1] == past + q else None
        else:
            run = self._prompt(hidden, sequence)
            if run is not None and cache is not None:
                require_cache(self.who, cache)
        if cache is not None:
            cache.zoo_dropping = run
        if now is not None:
            now.dropped = run
        return run

    def _prompt(self, hidden: Tensor, sequence: Any) -> PrunedPrompt | None:
        """Describe a new prompt; None if it shows no images."""
        if sequence is None or sequence.image_mask is None:
            return None
        image, labels = sequence.image_mask, sequence.labels
        length = image.shape[1]
        if length != hidden.shape[1] or len(hidden) % len(image):
            raise ZooError(
                f"{self.who} expects {list(image.shape)} positions, and the LLM got {list(hidden.shape[:2])}."
            )
        drafts = getattr(sequence, "drafts", 0)
        segments = getattr(sequence, "segment_ids", None)
        tokens = TokenSequence.of(image, sequence.attention_mask, segments, labels, drafts)
        count = tokens.count()
        # `generate` repeats rows for beams and returned sequences after the sequence was described.
        copies = len(hidden) // len(image)
        if copies > 1:
            tokens, count = tokens.repeat(copies), count.repeat_interleave(copies, 0)
        labelled = sequence if labels is not None else None
        return PrunedPrompt(length - drafts, [tokens], count, copies, drafts, labelled=labelled)

    def _enter(self, run: PrunedPrompt, number: int, hidden: Tensor) -> Tensor:
        """Note the tokens of this layer; after a scored layer, choose them and gather the hidden states."""
        if number == 0:
            return hidden
        tokens = run.layers[-1]
        if number - 1 in self.after and bool(run.budget.any()):
            if number - 1 not in run.scores:
                raise ZooError(f"{self.who} cannot read the attention of {type(self.llm.lm).__name__}.")
            keep = tokens.choose(run.scores[number - 1], self.budget(number - 1, run.budget), run.copies)
            if bool((keep != tokens.seen).any()):
                run.cut = number if run.cut < 0 else run.cut
                if self.hide:
                    tokens = tokens.hide(keep)
                else:
                    tokens, index = tokens.gather(keep)
                    hidden = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # (B, K, C)
                    if (now := current()) is not None:  # routers of later layers skip padding by this mask
                        now.valid.append((number, tokens.seen.flatten()))
                run.masks.clear()
                if run.labelled is not None:
                    run.labelled.labels = tokens.labels
                    run.labelled.columns = tokens.column.masked_fill(~tokens.seen, -1)
        run.layers.append(tokens)
        return hidden

    def _prefill(self, run: PrunedPrompt, number: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        tokens, window = run.layers[number], self._window(number, run)
        if window not in run.masks:
            run.masks[window] = self._mask(tokens, window, hidden)
        changed: dict[str, Any] = {"attention_mask": run.masks[window]} if "attention_mask" in given else {}
        changed |= {"mask": run.masks[window]} if "mask" in given else {}
        if self.hide:
            return changed
        # Every other argument as long as the sequence would silently be misaligned with the gathered states.
        for name, value in given.items():
            if name in ("position_embeddings", "position_ids") and value is not None:
                changed[name] = self._moved(run, tokens, value)
            elif name not in changed and name != "hidden_states" and _has_length(value, run.total + run.drafts):
                raise ZooError(
                    f"{self.who} cannot shorten {name!r}, an argument of {type(self.llm.lm).__name__} layers."
                )
        return changed

    def _moved(self, run: PrunedPrompt, tokens: TokenSequence, value: Any) -> Any:
        """Select the rows of rotary tables or position ids of the tokens left; layers share the result."""
        # Keyed by identity: the decoder computes its tables once and passes the same objects to every layer.
        for whole, of, moved in run.rotary:
            if whole is value and of is tokens:
                return moved
        run.rotary = [entry for entry in run.rotary if entry[1] is tokens]
        parts = value if isinstance(value, (tuple, list)) else (value,)
        moved = tuple(_rows(x, tokens.column) for x in parts)
        result = moved if isinstance(value, (tuple, list)) else moved[0]
        run.rotary.append((value, tokens, result))
        return result

    def _mask(self, tokens: TokenSequence, window: int | None, hidden: Tensor) -> Tensor | None:
        name = self.config._attn_implementation
        plain = tokens.whole and not tokens.packed and window is None
        if plain and (name in ("sdpa", ZOO_EAGER) or name.startswith("flash")):
            return None  # plain causal attention: kernels are faster without a mask
        if name.startswith("flash") and not tokens.packed and window is None:
            return tokens.seen.long()
        return as_backend_mask(tokens.prefill_mask(window), name, _dtype(hidden))

    def _decode(self, run: PrunedPrompt, number: int, hidden: Tensor, cache: Any) -> dict[str, Any]:
        """Build the mask of a decoding step over this layer's shorter cache."""
        tokens, name = run.layers[number], self.config._attn_implementation
        held = cache.layers[number]
        # Tokens decoded so far: what this layer's cache holds beyond the prompt's tokens left in this layer.
        cached, past = held.keys.shape[-2], int(held.get_seq_length()) - tokens.column.shape[1]
        new, b = run.new, hidden.shape[0]
        if new is None:
            new = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        if len(tokens.seen) != b:  # rows were repeated after the prompt's pass
            tokens = tokens.repeat(b // len(tokens.seen))
        total = run.total + past + new.shape[1]
        window = self._window(number, run, total)
        if hidden.shape[1] == 1 and tokens.whole and window is None and run.new is None:
            return {"attention_mask": None}  # a single query attends to the whole cache
        if name.startswith("flash") and window is None:
            seen = torch.cat([tokens.seen, new.new_ones(b, past), new], 1)
            return {"attention_mask": seen.long()}
        mask = tokens.decode_mask(new, past, run.total, cached, window)
        return {"attention_mask": as_backend_mask(mask, name, _dtype(hidden))}

    def _window(self, number: int, run: PrunedPrompt, total: int | None = None) -> int | None:
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


class DropsInside(InsidePruner):
    """Mixin of pruners that drop by a `Dropper`, which they make in `attach`."""

    concurrent = True  # state of a prompt is in the pass and in its cache
    dropper: Dropper | None = None

    def drop_by(self, dropper: Dropper) -> None:
        """Attach `dropper`."""
        self.dropper = dropper
        dropper.attach()

    @property
    def inside(self) -> bool:  # type: ignore[override]
        """Whether anything is dropped, with these options."""
        return self.dropper is not None

    @property
    def shortens(self) -> bool:  # type: ignore[override]
        """The same: what it drops, layers no longer have."""
        return self.dropper is not None

    def detach(self) -> None:
        """Remove the hooks from the LLM."""
        if self.dropper is not None:
            self.dropper.detach()

    def begin(self, sequence: Any) -> None:
        """Refuse a pass over `sequence` in which tokens cannot be dropped."""
        if self.dropper is not None:
            self.dropper.check(sequence)

    def kept(self, passed: Pass) -> list[Tensor]:
        """Say which columns each layer saw of the prompt of a pass: (B, T) bool for each layer; empty: it had none."""
        return [] if passed.dropped is None else passed.dropped.kept()


def _rows(table: Tensor, column: Tensor) -> Tensor:
    """Select the rows `column` (B, K) of a table (B or 1, T, ...)."""
    index = column.view(*column.shape, *[1] * (table.dim() - 2)).expand(-1, -1, *table.shape[2:])
    return table.expand(len(column), *table.shape[1:]).gather(1, index)


def _has_length(value: Any, length: int) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(x, Tensor) and length in x.shape[1:] for x in parts)


def _dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
