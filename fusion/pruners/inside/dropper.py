"""Drop image tokens inside an unmodified decoder of transformers, by hooks alone: shorter sequences, shorter caches.

A pruner defines after which layers tokens are dropped and which are kept: by scores and a budget, or by a choice of its
own. Before the first shorter layer the hidden states are gathered; later layers get matching rotary tables and masks
(`layer_arguments`), and their caches stay shorter, through every strategy of transformers' `generate`. Text and padding
are never candidates, nor are tokens that predict: the last one, and in training those before a label. Labels are
gathered with the tokens.

Tokens keep their positions, so dropping computes exactly what masking them as keys would; in a model with
`positions=dense` those of the tokens left are counted anew from each cut on.

Scores use queries and keys after rotation, without changing the attention kernel: those of the layer before the cut
while it runs (`attention_tap`), or those that the layer behind it would have if nothing were dropped (`layer_reading`).

State of a prompt (`pruned_prompt`) is kept in the current pass (`zoo.registry.forward_pass`) and on the cache that
continues it, never on the pruner. A prompt may be followed by drafts of assisted decoding: they attend like the last
token of the prompt and do not vote on what is dropped.

Nothing is dropped before layer 0, since transformers counts positions by its cache. Refused, because results would be
wrong: caches of fixed size and quantised ones, several dialogs behind one image, layers that are not attention, flash
kernels with a sliding window in effect, the balance loss of an MoE LLM, a compiled decoder.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.fusion.llm.decoder import decoder_of
from zoo.fusion.pruners.inside.attention_tap import AttentionInputs, tap_attention, votes_of
from zoo.fusion.pruners.inside.droppable import require_cache, require_family
from zoo.fusion.pruners.inside.layer_arguments import LayerArguments
from zoo.fusion.pruners.inside.layer_reading import Reached, read_layer, reading_flops
from zoo.fusion.pruners.inside.pruned_prompt import Choice, LayerCut, PrunedPrompt
from zoo.fusion.pruners.inside.sequence import TokenSequence, of_first
from zoo.registry import ImageFeatures, InsidePruner, ZooError
from zoo.registry.forward_pass import Pass, current
from zoo.registry.versions import cache_in

__all__ = ["AttentionInputs", "Choice", "Dropper", "DropsInside", "LayerCut", "PrunedPrompt"]


def _forget(lm: nn.Module) -> None:
    lm.__dict__.pop("zoo_dropping", None)


class Dropper:
    """Hooks on a decoder that drop image tokens between its layers.

    Args:
        llm: the language model part.
        who: the pruner, for messages.
        after: layers, counted from 0, after which tokens are dropped.
        budget: (layer before the cut, image tokens that entered (B, samples)) -> how many to keep, (B, samples).
        score: queries and keys of a layer -> scores (B, L), higher is better; or a pair of scores and the budget
            (B, samples), where that depends on them. Without gradient, once per prompt.
        hide: mask tokens in attention instead of dropping them: the slow reference.
        choose: the cut -> the image tokens to keep (B, L) bool, or a `Choice` with new hidden states for some of them;
            with gradients. None: the best scores, as many as the budget.
        reads: the layer whose queries and keys are scored: the one before the cut, or behind it.
        renumbers: follow `positions=dense` of the model; False: tokens keep their positions with either word.
        votes: of the scores: a word of `VOTES`, or the LLM's input -> votes (B, T), once per prompt, without gradient.
    """

    def __init__(
        self,
        llm: Any,
        who: str,
        after: list[int],
        budget: Callable[[int, Tensor], Tensor] | None = None,
        score: Callable[[AttentionInputs], Tensor | tuple[Tensor, Tensor]] | None = None,
        hide: bool = False,
        *,
        choose: Callable[[LayerCut], Tensor | Choice] | None = None,
        reads: Literal["before", "behind"] = "before",
        renumbers: bool = True,
        votes: str | Callable[[LayerCut], Tensor] = "last",
    ) -> None:
        self.llm, self.who, self.after, self.hide = llm, who, frozenset(after), hide
        self.budget, self.score, self.choose, self.reads, self.votes = budget, score, choose, reads, votes
        self.renumbers = renumbers
        self.arguments = LayerArguments(llm, who)
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
        self._undo.append(partial(_forget, lm))
        for number, layer in enumerate(self.llm.layers):
            # Names of positional arguments, which checkpointing passes and families order differently.
            names = list(inspect.signature(layer.forward).parameters)
            handle = layer.register_forward_pre_hook(partial(self._before, number, names), with_kwargs=True)
            self._undo.append(handle.remove)
            if self.score is not None and number - (self.reads == "behind") in self.after:
                self._undo.append(
                    tap_attention(layer, partial(self._score, number), f"{self.who} in {type(lm).__name__}")
                )

    def reading_flops(self, tokens: Sequence[int]) -> int:
        """Count the FLOPs of reading the layers behind the cuts, for one prompt with `tokens` in each layer."""
        return sum(reading_flops(self.llm.layers[i + 1], tokens[i]) for i in self.after)

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
                "Set pack=none in the stage, and no pack_length."
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
        if run is not None and run.reading:
            raise Reached(query, key, scaling, softcap)
        if run is not None and run.scoring == number and number not in run.scores:
            self._note(run, number, number, Reached(query, key, scaling, softcap))

    def _note(self, run: PrunedPrompt, cut: int, number: int, read: Reached) -> None:
        """Score the cut behind layer `cut` by queries and keys of layer `number`."""
        query, key, scaling = read.query.detach(), read.key.detach(), read.scaling
        tokens, window = run.layers[cut], self.arguments.window(number, run)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Scores only rank tokens: a gradient through them would reach no parameter, and keep q and k alive.
        with torch.no_grad():
            given = AttentionInputs(number, query, key, scaling, read.softcap, tokens, window, run.votes)
            assert self.score is not None, "only layers that are scored are tapped"
            made = self.score(given)
        if isinstance(made, tuple):
            made, run.counts[cut] = made
        run.scores[cut] = made

    def _read(self, run: PrunedPrompt, number: int, layer: nn.Module, given: dict[str, Any], name: str) -> None:
        """Score the layer behind a cut at its input, before anything is dropped."""
        tokens = run.layers[number - 1]
        moved: dict[str, Any] = {"attention_mask": None, "mask": None}
        if run.cut >= 0 and (tokens.dense or not self.hide):
            moved = self.arguments.positions(run, tokens, given, moved)
        voters = votes_of(run.votes, tokens).ne(0).any(0).nonzero()[:, 0]
        run.reading = True
        try:
            read = read_layer(layer, name, given | {k: v for k, v in moved.items() if k in given}, voters)
        finally:
            run.reading = False
        self._note(run, number - 1, number, read)

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
            hidden = self._enter(run, number, layer, given, names[0])
            scored = self.reads == "before" and number in self.after and bool(run.budget.any())
            run.scoring = number if scored else None
        if run.cut < 0 or number < run.cut:
            if hidden is given[names[0]]:
                return None
            changed: dict[str, Any] = {}  # new rows, and nothing was dropped
        elif run.past:
            changed = self.arguments.decode(run, number, hidden, cache, given)
        else:
            changed = self.arguments.prefill(run, number, hidden, given, self.hide)
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
        dense = self.renumbers and getattr(sequence, "dense", False)
        tokens = TokenSequence.of(image, sequence.attention_mask, segments, labels, drafts, dense)
        count = tokens.count()
        # `generate` repeats rows for beams and returned sequences after the sequence was described.
        copies = len(hidden) // len(image)
        if copies > 1:
            tokens, count = tokens.repeat(copies), count.repeat_interleave(copies, 0)
        labelled = sequence if labels is not None else None
        return PrunedPrompt(length - drafts, [tokens], count, copies, drafts, labelled=labelled)

    def _enter(self, run: PrunedPrompt, number: int, layer: nn.Module, given: dict[str, Any], name: str) -> Tensor:
        """Note the tokens of this layer; behind a cut, choose them and gather the hidden states."""
        hidden: Tensor = given[name]
        tokens = run.layers[-1]
        if number == 0:
            run.votes = self._ballot(LayerCut(0, hidden.detach(), tokens, run.budget, copies=run.copies))
            return hidden
        if number - 1 in self.after and bool(run.budget.any()):
            if self.score is not None and self.reads == "behind":
                self._read(run, number, layer, given, name)
            keep, hidden = self._cut(run, number, hidden).chosen(self.choose, self.who)
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

    @torch.no_grad()
    def _ballot(self, start: LayerCut) -> str | Tensor:
        """Return the votes of the scores: a word, or (B, T) as the pruner chooses them at the LLM's input."""
        if isinstance(self.votes, str):
            return self.votes
        votes = self.votes(start)
        if votes.shape != start.tokens.seen.shape:
            raise ZooError(f"{self.who} gives votes {list(votes.shape)} for {list(start.tokens.seen.shape)} tokens.")
        return of_first(votes.float(), start.copies)

    def _cut(self, run: PrunedPrompt, number: int, hidden: Tensor) -> LayerCut:
        """Describe the cut before layer `number`."""
        before, tokens = number - 1, run.layers[-1]
        if self.score is not None and before not in run.scores:
            raise ZooError(f"{self.who} cannot read the attention of {type(self.llm.lm).__name__}.")
        budget = run.counts.get(before)
        if budget is None and self.budget is not None:
            budget = self.budget(before, run.budget)
        return LayerCut(number, hidden, tokens, run.budget, run.scores.get(before), budget, run.copies)


class DropsInside(InsidePruner):
    """Mixin of pruners that drop by a `Dropper`, which they make in `attach`. Before the LLM nothing changes."""

    needs: frozenset[str] = frozenset({"image_tokens"})
    concurrent = True  # state of a prompt is in the pass and in its cache
    dropper: Dropper | None = None

    def num_tokens(self, n: int) -> int:
        """Count the tokens that enter the LLM: all."""
        return n

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Return the image unchanged: tokens are dropped inside the LLM."""
        return image

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
