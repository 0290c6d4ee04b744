"""The forward pass of a composed model, step by step: encode, merge, place, run, head, losses.

The keywords are one value (`zoo.composed.inputs`), and so is the state of the pass (`zoo.registry.forward_pass`), which
parts inside the LLM read and write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.composed.answer_loss import answer_loss
from zoo.composed.image_path import Encoded, ImagesMixin, numbered
from zoo.composed.inputs import Inputs, further, one_cache
from zoo.composed.left_out import columns_of, leave_out, put_columns, shift_of_columns, text_id
from zoo.composed.outputs import LLMSequence, ZooOutput
from zoo.composed.positions import put_shift, shift_of, whole_row
from zoo.composed.turns import turn_of
from zoo.fusion.llm.attention import ZOO_EAGER, as_backend_mask, block_mask
from zoo.fusion.llm.deep import DeepFeatures
from zoo.registry import IGNORE_INDEX, Adapter, Cut, ImageFeatures, LanguageModel, Pruner, ZooError
from zoo.registry.forward_pass import Pass, conditions_in, put_conditions, running
from zoo.registry.versions import cache_argument, cache_of, recomputes


class ForwardMixin(ImagesMixin):
    """Runs the parts of a composed model, one step after the other."""

    compiled: bool
    training: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | float | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        segment_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        images_per_row: Sequence[int] | None = None,
        cuts: Sequence[Cut] | None = None,
        encoded: tuple[ImageFeatures, ImageFeatures, Tensor | None] | None = None,
        questions: Sequence[Any] | None = None,
        all_logits: bool = True,
        run_llm: bool = True,
        run_head: bool = True,
        targets: Any = None,
        pair_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: (B, T) with `num_image_tokens` placeholders per image.
            pixel_values: (M, 3, S, S), images in the order of their placeholders.
            attention_mask: (B, T), 1 for valid tokens; padding on either side. With a cache (B, past + T).
            position_ids: (B, T) counted over columns, without positions of image tokens that were pruned; where absent,
                counted from the first valid token.
            cache: keys and values of the sequence so far; `past_key_values` is the same, by its older name.
            inputs_embeds: (B, T, C) instead of `input_ids`; images replace the embeddings of placeholders.
            labels: (B, T), not shifted, IGNORE_INDEX where no target is. The loss is the mean over labels.
            logits_to_keep: how many of the last positions get logits, 0 all; or which positions, as a tensor.
            num_items_in_batch: divisor of the summed answer loss (gradient accumulation); default: labels in the batch.
            use_cache: return the cache of this pass; None: as the LLM's config.
            output_hidden_states: return (B, T, C) of the embeddings and of each layer.
            output_attentions: return (B, H, T, T) of each layer, where the LLM's attention supports it.
            return_dict: False returns a tuple: loss if there are labels, logits, and what else was asked for.
            segment_ids, block_ids: (B, T) of packed rows, see `zoo.text.batch`.
            images_per_row: images of each row; counted from the placeholders where absent.
            cuts: of each image, where images have rows of their own (crops, frames).
            encoded: output of `encode_images`, instead of `pixel_values`.
            questions: what is asked about the images, a text for each row (or `Asked` of each sample, as the processor
                writes it), for parts that need it; where absent, read from the ids, see `zoo.composed.question`.
            all_logits: return logits beside a loss; False runs the head only where labels are.
            run_llm: False stops after the projector.
            run_head: False leaves out logits and the answer loss; losses of parts are computed.
            targets: ignored here; dense targets for distillers are part of the same batch.
            pair_ids: (B, T) which of a pair's answers a token belongs to; for distillers, see `zoo.text.batch`.
            kwargs: further arguments of this LLM, such as `output_router_logits` of one with experts.

        Returns:
            `ZooOutput`, or a tuple with `return_dict=False`.

        Raises:
            ZooError: a keyword that neither the model nor its LLM has, or inputs that do not fit together.
        """
        takes = self.llm.keywords() if kwargs else frozenset()
        given = Inputs(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            segment_ids=segment_ids,
            block_ids=block_ids,
            pair_ids=pair_ids,
            images_per_row=images_per_row,
            cuts=cuts,
            encoded=encoded,
            questions=questions,
            all_logits=all_logits,
            run_head=run_head,
            more=further(kwargs, takes, type(self).forward) if kwargs else {},
        )
        with turn_of(self, self.inside_llm), running() as now:
            images = self._encode(given, asked=run_llm)  # tokens (M, K, C)
            if not run_llm:
                return ZooOutput(losses={}, passed=now, **images.named)
            given, images = self._leave_out(given, images)
            embeds, slots = self._merge(given, images)  # (B, T, C), (B, T)
            masks = self._place(given, images, embeds, slots, now)  # (B, T), or (B, 1, T, T) of packed rows
            out = self._run(given, embeds, masks, now)  # last_hidden_state (B, T, C), shorter where tokens were dropped
            length = given.length or embeds.shape[1]
            logits = self._head(given, out.last_hidden_state, length)  # (B, T, V), or of chosen positions
            losses = self._losses(given, out.last_hidden_state, now.sequence.labels)  # by name
        result = ZooOutput(
            loss=_summed(losses, now.sequence.labels, num_items_in_batch),
            logits=logits,
            cache=cache_of(out),
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
            router_logits=out.router_logits if given.more.get("output_router_logits") else None,
            losses=losses or None,
            last_hidden_state=out.last_hidden_state,
            labels=now.sequence.labels,
            passed=now,
            **images.named,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    # ---- the steps; the first, `_encode`, is in `zoo.composed.image_path` --------------------------------------------

    def _leave_out(self, given: Inputs, images: Encoded) -> tuple[Inputs, Encoded]:
        """Take out the columns of placeholders that no image token fills, and the tokens that pruners marked so."""
        mask, past, held = given.attention_mask, given.past, None
        values = given.input_ids if given.input_ids is not None else given.inputs_embeds
        if values is None:
            return given, images
        rows, length = values.shape[:2]
        if given.goes_on and (held := columns_of(given.cache, rows)) is not None and mask is not None:
            more = past - held.index.shape[1]  # columns behind the prompt that the cache holds
            if mask.dim() == 2 and mask.shape[1] == held.whole + more + length:  # of the whole sequence
                mask = held.take(mask)
                given = replace(given, attention_mask=mask)
        if images.valid is None or images.tokens is None:
            return given, images
        if torch.compiler.is_compiling():
            raise ZooError("A pruner chooses the length of the sequence by the image, which does not compile.")
        slots = self._placeholders(values) if values.dim() == 2 else self._placeholders_among(values)
        self._require_filled(slots, images.tokens)
        own = mask[:, -length:] if mask is not None and mask.dim() == 2 else None
        positions = given.position_ids
        if positions is None:
            positions = _positions(mask, given.cache, length)
        if positions is None:
            positions = past + torch.arange(length, device=slots.device)[None]
        if (shift := self._shift(given, images, values, slots)) is not None:
            positions = positions + shift[..., :length]
        alive, kept = images.valid.flatten(), self.config.positions == "kept"
        columns, wanted = leave_out(numbered(slots), alive, own, positions, given.segment_ids, kept)
        own = columns.valid.long()
        if past:
            own = torch.cat([own.new_ones(rows, past) if mask is None else mask[:, :past], own], 1)
        counted = _positions(own, given.cache, columns.index.shape[1])
        assert counted is not None, "the mask has two dimensions"
        fill = {"input_ids": text_id(self.config), "inputs_embeds": 0, "labels": IGNORE_INDEX}
        fill |= {"segment_ids": -1, "block_ids": -1, "pair_ids": -1}
        taken: dict[str, Any] = {}
        taken |= {n: columns.take(x, pad) for n, pad in fill.items() if (x := getattr(given, n)) is not None}
        if len(self.adapter) and given.images_per_row is None:
            taken["images_per_row"] = self._images_per_row(images.kept, slots)
        given = replace(
            given,
            **taken,
            attention_mask=own,
            position_ids=None,
            shift=shift_of_columns(columns, wanted, counted),
            columns=columns if held is None else held.then(past - held.index.shape[1], columns),
            length=length,
        )
        if mask is not None and mask.dim() == 2:  # a column that it hides is gone too, and its token with it
            alive = alive & mask[:, -length:][slots].bool()
        left = images.tokens.reshape(-1, images.tokens.shape[-1])[alive]
        return given, images._replace(tokens=left, valid=None, deep=tuple(x[alive] for x in images.deep))

    def _merge(self, given: Inputs, images: Encoded) -> tuple[Tensor, Tensor | None]:
        """Insert the image tokens: embeddings (B, T, C), and where images are (B, T), None if not known."""
        ids, embeds, tokens = given.input_ids, given.inputs_embeds, images.tokens
        slots: Tensor | None
        if (ids is None) == (embeds is None):
            what = "neither" if ids is None else "both"
            raise ZooError(f"The model needs input_ids or inputs_embeds, one of them; {what} was given.")
        if ids is None:
            assert embeds is not None, "one of the two is there"
            slots = None if tokens is None else self._placeholders_among(embeds)
            embeds = embeds if slots is None else self._placed(embeds, slots, tokens)
        elif tokens is None and given.goes_on:
            # A token that was generated, and is appended to the cache, is text even where its id is the placeholder's.
            embeds, slots = self.llm.embed(ids), torch.zeros_like(ids, dtype=torch.bool)
        else:
            embeds, slots = self.merge(ids, tokens), self._placeholders(ids)
        if images.image is None and self.training and self._vision_trains():
            # DDP waits for a gradient of every parameter from every process, also of those whose batch has no image.
            embeds = embeds + self._touch_vision()
        return embeds, slots

    def _place(
        self, given: Inputs, images: Encoded, embeds: Tensor, slots: Tensor | None, now: Pass
    ) -> dict[str, Tensor | None]:
        """Set the sequence of the pass, pass it to the parts inside the LLM, and return the LLM's masks."""
        positions = given.position_ids
        if positions is None:
            positions = _positions(given.attention_mask, given.cache, embeds.shape[1])
        mask, shift, axes = given.attention_mask, given.shift, None
        if given.columns is None:
            shift = self._shift(given, images, embeds, slots)
        if shift is not None:
            columns = torch.arange(embeds.shape[1], device=embeds.device)[None] + given.past
            placed = shift[..., : embeds.shape[1]] + (columns if positions is None else positions)
            positions, axes = (placed, None) if placed.dim() == 2 else (positions, placed)
            if mask is None and not given.past:  # else transformers takes gaps for borders of packed samples
                mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        now.sequence = LLMSequence(
            slots,
            mask,
            positions,
            given.labels,
            given.segment_ids,
            given.block_ids,
            pair_ids=given.pair_ids,
            shift=shift if images.kept is not None else None,
            dense=self.config.positions == "dense",
            axes=axes,
            deep=DeepFeatures(numbered(slots), images.deep) if images.deep and slots is not None else None,
        )
        masks = self._masks(now.sequence, given.cache)
        if images.kept is not None or not given.goes_on:
            self._condition(images.kept, given.images_per_row, slots)
        else:
            # A continued cache comes without images: adapters keep the condition of its beginning.
            now.conditions = conditions_in(given.cache)
        inside: list[Pruner | Adapter] = [*self.pruner.values(), *self.adapter.values()]
        for part in inside:
            part.begin(now.sequence)
        return masks

    def _run(self, given: Inputs, embeds: Tensor, masks: Mapping[str, Tensor | None], now: Pass) -> Any:
        """Run the LLM without its vocabulary projection; returns the output of transformers' class."""
        asked = {"output_hidden_states": given.output_hidden_states, "output_attentions": given.output_attentions}
        past = given.past  # read before the pass, in which the cache grows
        if now.sequence.shift is not None and past:
            asked |= whole_row(self.llm.lm, embeds.shape[0], embeds.shape[1], past)
        out = self.llm.hidden(
            inputs_embeds=embeds,
            position_ids=now.sequence.position_ids if now.sequence.axes is None else now.sequence.axes,
            use_cache=self._makes_cache(given.use_cache),
            **masks,
            **cache_argument(given.cache),
            **{name: value for name, value in asked.items() if value is not None},
            **given.more,
        )
        put_conditions(cache_of(out), now.conditions)  # for the pass that continues this cache
        if now.sequence.shift is not None:
            put_shift(cache_of(out), now.sequence.shift, past)
        put_columns(cache_of(out), given.columns)
        return out

    def _shift(self, given: Inputs, images: Encoded, embeds: Tensor, slots: Tensor | None) -> Tensor | None:
        """Return what is added to columns for positions of image tokens and behind them; None: nothing.

        (B, T + 1) with what follows, or (B, 1) of text behind a cache; (A, B, ...) with positions of several axes.
        """
        before = shift_of(given.cache, len(embeds)) if given.goes_on else None
        if self.unpruned is None or images.kept is None or slots is None:
            return before
        return self.unpruned.gaps(images.kept).shift(numbered(slots), given.segment_ids, before)

    def _head(self, given: Inputs, hidden: Tensor, length: int) -> Tensor | None:
        """Project to the vocabulary where logits are asked for: (B, T, V); the answer loss makes its own.

        Args:
            given: with the positions that get logits.
            hidden: (B, T, C), of the tokens kept.
            length: T before the LLM.
        """
        if not given.run_head or (given.labels is not None and not given.all_logits):
            return None
        return self.llm.head(_asked_for(hidden, given.logits_to_keep, length))

    def _losses(self, given: Inputs, hidden: Tensor, labels: Tensor | None) -> dict[str, Tensor] | None:
        """Return the answer loss and the losses of parts, by name; None without labels.

        Args:
            given: with the divisor of the answer loss.
            hidden: (B, T, C).
            labels: (B, T) of the tokens kept.
        """
        if labels is None:
            return None
        losses: dict[str, Tensor] = {}
        own = self.__dict__.get("_loss_function")  # set by the user through transformers' `model.loss_function`
        if given.run_head and own is not None:
            sizes = {"vocab_size": self.llm.vocab_size, "num_items_in_batch": given.num_items_in_batch}
            losses["answer"] = own(logits=self.llm.head(hidden), labels=labels, **sizes)
        elif given.run_head:
            losses["answer"] = answer_loss(self.llm, hidden, labels, given.num_items_in_batch, compiled=self.compiled)
        givers: list[LanguageModel | Pruner | Adapter] = [self.llm, *self.pruner.values(), *self.adapter.values()]
        for part in givers:
            losses |= part.aux_losses()
        return losses

    # ---- what the LLM is given ---------------------------------------------------------------------------------------

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Whether this pass returns its keys and values: as given, else as the LLM's config."""
        if use_cache is not None:
            return use_cache
        lm = self.llm.lm
        # Checkpointed layers run twice, and would append their keys to the cache twice.
        recomputed = self.training and torch.is_grad_enabled() and recomputes(lm)
        return bool(getattr(lm.config.get_text_config(), "use_cache", False)) and not recomputed

    def _masks(self, sequence: LLMSequence, cache: Any) -> dict[str, Any]:
        """Return the masks for the LLM: of packed rows (B, 1, T, T), else as given."""
        mask, segment_ids = sequence.attention_mask, sequence.segment_ids
        if self.llm.mixes_rows and (segment_ids is not None or sequence.block_ids is not None):
            raise ZooError(
                f"A row holds several samples or dialogs, and {self.llm.mixes_rows}: set pack=none and "
                "pack_length=null in the stage."
            )
        if self.compiled and segment_ids is None and mask is not None and self._mask_ahead(mask, cache):
            # Segments count from 0 and padding is -1, so a mask of 1 and 0, less one, is a row of one sample. With
            # segments the mask is made here, once: compiled layers would compute it for every head, 2 % of a step.
            segment_ids = sequence.segment_ids = mask - 1
        if segment_ids is None and sequence.block_ids is None:
            return {"attention_mask": mask}
        packed = self._packed_mask(mask, segment_ids, sequence.block_ids)
        # Padding cannot be read from a mask of four dimensions, and the balance loss of an MoE LLM must not count it.
        return {"attention_mask": packed, "padding_mask": mask}

    def _compute_dtype(self) -> torch.dtype:
        """Return the data type of the LLM's matrix products."""
        weight = next(self.llm.parameters())
        device = weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype

    def _mask_ahead(self, attention_mask: Tensor, cache: Any) -> bool:
        """Whether the mask of this pass may be made ahead of compiled layers, which is once for all of them."""
        config = self.llm.lm.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        windows = getattr(config, "sliding_window", None) or kinds - {"full_attention"}
        plain = attention_mask.dim() == 2 and cache is None and not windows
        return plain and config._attn_implementation in ("sdpa", "eager", ZOO_EAGER)

    def _packed_mask(
        self, attention_mask: Tensor | None, segment_ids: Tensor | None, block_ids: Tensor | None
    ) -> Tensor:
        if segment_ids is None:
            assert block_ids is not None, "called for packed rows"
            segment_ids = block_ids.clamp(max=0)  # several dialogs of one sample: 0, and -1 at padding
        window = getattr(self.llm.lm.config.get_text_config(), "sliding_window", None)
        if window and segment_ids.shape[1] > window:
            raise ZooError(
                f"A packed row of {segment_ids.shape[1]} tokens is longer than the LLM's sliding window of {window}: "
                f"set pack=none and pack_length=null in the stage."
            )
        visible = block_mask(attention_mask, segment_ids, block_ids)  # (B, 1, T, T) bool
        return as_backend_mask(visible, self.llm.lm.config._attn_implementation, self._compute_dtype())


def _summed(
    losses: Mapping[str, Tensor] | None, labels: Tensor, num_items_in_batch: Tensor | float | None
) -> Tensor | None:
    """Sum the losses of a pass.

    Where the answer loss is divided by more labels than there are here, as in gradient accumulation, the other losses,
    which are means of this pass, are weighted by its share of those labels.
    """
    if not losses:
        return None
    if num_items_in_batch is None or losses.keys() == {"answer"}:
        return torch.stack(list(losses.values())).sum()
    share = (labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch
    return torch.stack([v if n == "answer" else share * v for n, v in losses.items()]).sum()


def _positions(attention_mask: Any, cache: Any, length: int) -> Tensor | None:
    """Count the positions of (B, T) from the first valid token; None: the LLM counts them by itself.

    So a row's result does not depend on its padding, and the positions behind a cache continue its own.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    past = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask.shape[1] != past + length:
        return None
    before = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1) padding on the left
    counted = torch.arange(past + length, device=attention_mask.device) - before  # (B, past + T)
    return counted.clamp_(min=0)[:, past:]


def _asked_for(hidden: Tensor, logits_to_keep: int | Tensor, length: int) -> Tensor:
    """Select the positions that get logits, as transformers does: the last ones, those named for all rows, or for each.

    Args:
        hidden: (B, T, C).
        logits_to_keep: a number, 0 all; positions (P,) or (B, P); or a mask (B, T), whose positions come as one row.
        length: of the rows before the LLM.
    """
    if not isinstance(logits_to_keep, Tensor):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if hidden.shape[1] != length:
        raise ZooError(
            f"logits_to_keep names positions among {length}, and a pruner left {hidden.shape[1]} of them: "
            "give the number of last positions instead."
        )
    if logits_to_keep.dim() < 2:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]  # (P, C)
    return torch.take_along_dim(hidden, logits_to_keep.unsqueeze(-1), dim=1)  # (B, P, C)
