"""The forward pass of a composed model: encode the images, merge them with the text, run the LLM, head and losses.

It takes what transformers' own vision-language classes take and gives what they give, in their order; what it does not
know it refuses by name. Beside that it takes what our processor writes of packed rows and of images in several rows.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from zoo.composed.answer_loss import answer_loss
from zoo.composed.image_path import ImagesMixin
from zoo.composed.outputs import LLMSequence, ZooOutput
from zoo.composed.turns import turn_of
from zoo.fusion.llm.attention import ZOO_EAGER, as_backend_mask, block_mask
from zoo.registry import IGNORE_INDEX, Cut, ImageFeatures, ZooError, unknown
from zoo.registry.forward_pass import conditions_in, put_conditions, running
from zoo.registry.versions import cache_argument, cache_of, recomputes

# What transformers' classes take and a composed model does not, and what to do instead.
_ELSEWHERE = {
    "vision_feature_layer": "the encoder's layer belongs to the model: set vision.layer when it is composed",
    "vision_feature_select_strategy": "which tokens of the encoder are used belongs to the model",
    "image_sizes": "the model's own processor says how images were cut, as `cuts`: use zoo.load's processor",
    "mm_encoder_outputs": "pass what `encode_images` gave, as `encoded`",
    "shift_labels": "labels are shifted here: pass them as `labels`, (B, T) like the ids",
    "num_labels": "it is called num_items_in_batch, as in transformers",
}


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
            attention_mask: (B, T), 1 where a token is; padding may stand on either side. With a cache (B, past + T).
            position_ids: (B, T); counted from the first token that is no padding where absent.
            cache: keys and values of what came before; `past_key_values` is the same, by its older name.
            inputs_embeds: (B, T, C) instead of `input_ids`; images go where the embedding of the placeholder stands.
            labels: (B, T), not shifted, IGNORE_INDEX where nothing is learnt. The loss is the mean over labels.
            logits_to_keep: how many of the last positions get logits, 0 all; or which positions, as a tensor.
            num_items_in_batch: what the summed answer loss is divided by (gradient accumulation); default: labels in
                the batch.
            use_cache: give the cache of this pass; None: as the LLM's config says.
            output_hidden_states: give (B, T, C) of the embeddings and of each layer.
            output_attentions: give (B, H, T, T) of each layer, where the LLM's attention can.
            return_dict: False gives a tuple: loss if there are labels, logits, and what else was asked for.
            segment_ids, block_ids: (B, T) of packed rows, see `zoo.text.batch`.
            images_per_row: images of each row; counted from the placeholders where absent.
            cuts: of each image, where images have rows of their own (crops, frames).
            encoded: what `encode_images` gave, instead of `pixel_values`.
            all_logits: give logits beside a loss; without them the head runs where labels are, and nowhere else.
            run_llm: False stops after the projector.
            run_head: False leaves out logits and the answer loss; those of the parts are there.
            targets: ignored here; dense targets for distillers travel in the same batch.
            pair_ids: (B, T) which of a pair's answers a token belongs to; for distillers, see `zoo.text.batch`.
            kwargs: what this LLM takes beside that, such as `output_router_logits` of one with experts.

        Returns:
            `ZooOutput`, or a tuple with `return_dict=False`.

        Raises:
            ZooError: a keyword that neither the model nor its LLM knows, or inputs that do not belong together.
        """
        more = self._known(kwargs)
        cache = _one_cache(cache, past_key_values)

        with turn_of(self), running() as now:
            # Encode the images.
            image, kept, image_tokens = self._encoded(pixel_values, cuts, encoded)
            unused = self._touch_vision() if image is None and self.training and self._vision_trains() else None
            if not run_llm:
                return ZooOutput(losses={}, image=image, image_kept=kept, image_tokens=image_tokens)

            # Merge their tokens with the text, and say what stands where.
            embeds, slots = self._merged(input_ids, inputs_embeds, image_tokens, cache)  # (B, T, C), (B, T)
            if unused is not None:
                embeds = embeds + unused
            if position_ids is None:
                position_ids = _positions(attention_mask, cache, embeds.shape[1])
            sequence = LLMSequence(slots, attention_mask, position_ids, labels, segment_ids, block_ids)
            sequence.pair_ids = pair_ids
            masks = self._masks(sequence, cache)
            now.sequence = sequence
            if kept is not None or not _goes_on(cache):
                self._condition(kept, images_per_row, slots)
            else:
                now.conditions = conditions_in(cache)
            self._tell(sequence)

            # Run the LLM.
            asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            out = self.llm.hidden(
                inputs_embeds=embeds,
                position_ids=position_ids,
                use_cache=self._makes_cache(use_cache),
                **masks,
                **cache_argument(cache),
                **{name: value for name, value in asked.items() if value is not None},
                **more,
            )
            hidden = out.last_hidden_state  # (B, T, C)
            put_conditions(cache_of(out), now.conditions)

            # Project to the vocabulary, and compare with the labels.
            logits = loss = losses = None
            if run_head and (labels is None or all_logits):
                logits = self.llm.head(_kept(hidden, logits_to_keep, embeds.shape[1]))  # (B, T, V)
            if (seen := labels if sequence.labels is None else sequence.labels) is not None:
                losses = self._losses(hidden, seen, num_items_in_batch, run_head)
                loss = _summed(losses, seen, num_items_in_batch)
        result = ZooOutput(
            loss=loss,
            logits=logits,
            cache=cache_of(out),
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
            router_logits=out.router_logits if more.get("output_router_logits") else None,
            losses=losses or None,
            last_hidden_state=hidden,
            labels=sequence.labels,
            image=image,
            image_kept=kept,
            image_tokens=image_tokens,
            sequence=sequence,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def _known(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what this LLM takes.

        Raises:
            ZooError: a keyword that it does not take.
        """
        if not kwargs:
            return {}
        takes = self.llm.keywords() if hasattr(self.llm, "keywords") else frozenset()
        for name, value in kwargs.items():
            if name in _ELSEWHERE and value is not None:
                raise ZooError(f"A composed model takes no {name}: {_ELSEWHERE[name]}.")
            if name not in takes and name not in _ELSEWHERE:
                raise unknown("keyword of the model's forward", name, takes | _KEYWORDS)
        return {name: value for name, value in kwargs.items() if name in takes}

    # ---- images and text ---------------------------------------------------------------------------------------

    def _merged(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, image_tokens: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Put the image tokens in place: embeddings (B, T, C), and where images stand (B, T), None if not known."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ZooError(f"The model needs input_ids or inputs_embeds, one of them; {given} was given.")
        if inputs_embeds is not None:
            if image_tokens is None:
                return inputs_embeds, None
            slots = self._placeholders_among(inputs_embeds)
            return self._placed(inputs_embeds, slots, image_tokens), slots
        assert input_ids is not None, "one of the two is there"
        if image_tokens is None and _goes_on(cache):  # what was generated: a token like all others, whatever it is
            return self.llm.embed(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        return self.merge(input_ids, image_tokens), self._placeholders(input_ids)

    # ---- what the LLM is given ---------------------------------------------------------------------------------

    def _tell(self, sequence: LLMSequence) -> None:
        """Tell the parts that act inside the LLM what comes."""
        for part in [*self.pruner.values(), *self.adapter.values()]:
            if hasattr(part, "begin"):
                part.begin(sequence)

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Whether this pass gives its keys and values: where nobody says, as the LLM's config does."""
        if use_cache is not None:
            return use_cache
        lm = self.llm.lm
        recomputed = self.training and torch.is_grad_enabled() and recomputes(lm)
        return bool(getattr(lm.config.get_text_config(), "use_cache", False)) and not recomputed

    def _masks(self, sequence: LLMSequence, cache: Any) -> dict[str, Any]:
        """Give the mask as the LLM takes it: of packed rows (B, 1, T, T), else as it came."""
        mask, segment_ids = sequence.attention_mask, sequence.segment_ids
        if self.compiled and segment_ids is None and mask is not None and self._mask_ahead(mask, cache):
            segment_ids = sequence.segment_ids = mask - 1  # one sample, and -1 at padding
        if segment_ids is None and sequence.block_ids is None:
            return {"attention_mask": mask}
        packed = self._packed_mask(mask, segment_ids, sequence.block_ids)
        return {"attention_mask": packed, "padding_mask": mask}  # an MoE LLM's balance loss must not count padding

    def _compute_dtype(self) -> torch.dtype:
        """The data type of the LLM's products."""
        weight = next(self.llm.parameters())
        device = weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype

    def _mask_ahead(self, attention_mask: Tensor, cache: Any) -> bool:
        """Whether the mask is better made here: compiled layers else work it out anew for every head, 2 % of a step."""
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
            segment_ids = block_ids.clamp(max=0)  # one sample, and -1 at padding
        window = getattr(self.llm.lm.config.get_text_config(), "sliding_window", None)
        if window and segment_ids.shape[1] > window:
            raise ZooError(
                f"A packed row of {segment_ids.shape[1]} tokens is longer than the LLM's sliding window of {window}: "
                f"set pack=none and pack_length=null in the stage."
            )
        visible = block_mask(attention_mask, segment_ids, block_ids)  # (B, 1, T, T) bool
        return as_backend_mask(visible, self.llm.lm.config._attn_implementation, self._compute_dtype())

    # ---- losses ------------------------------------------------------------------------------------------------

    def _losses(
        self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None, run_head: bool
    ) -> dict[str, Tensor]:
        """The answer loss and those of the parts, by name."""
        losses: dict[str, Tensor] = {}
        own = self.__dict__.get("_loss_function")  # somebody has set `model.loss_function`
        if run_head and own is not None:
            told = {"vocab_size": self.llm.vocab_size, "num_items_in_batch": num_items_in_batch}
            losses["answer"] = own(logits=self.llm.head(hidden), labels=labels, **told)
        elif run_head:
            losses["answer"] = answer_loss(self.llm, hidden, labels, num_items_in_batch, compiled=self.compiled)
        for part in [self.llm, *self.pruner.values(), *self.adapter.values()]:
            losses |= part.aux_losses() if hasattr(part, "aux_losses") else {}
        return losses


def _summed(losses: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor | None:
    """Sum the losses of a pass.

    Where the answer loss is divided by more labels than there are here, as in gradient accumulation, the other losses,
    which are means of this pass, count by the share of labels that they saw.
    """
    if not losses:
        return None
    if num_items_in_batch is None or losses.keys() == {"answer"}:
        return torch.stack(list(losses.values())).sum()
    share = (labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch
    return torch.stack([v if n == "answer" else share * v for n, v in losses.items()]).sum()


def _one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, by whichever of its two names it was given."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ZooError("cache and past_key_values are two names of one argument, and both were given.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ZooError(f"cache must be a cache of transformers, such as DynamicCache(), got {type(cache).__name__}.")
    return cache


def _goes_on(cache: Any) -> bool:
    """Whether a cache holds the beginning of the sequence, and adapters go on with the image that it began with."""
    return cache is not None and cache.get_seq_length() > 0


def _positions(attention_mask: Any, cache: Any, length: int) -> Tensor | None:
    """Count the positions of (B, T) from the first token that is no padding; None: the LLM counts them by itself.

    So a row means the same however much padding stands before it, and what goes on with a cache goes on counting.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    past = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask.shape[1] != past + length:
        return None
    before = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1) padding on the left
    counted = torch.arange(past + length, device=attention_mask.device) - before  # (B, past + T)
    return counted.clamp_(min=0)[:, past:]


def _kept(hidden: Tensor, logits_to_keep: int | Tensor, length: int) -> Tensor:
    """The positions that get logits, as transformers chooses them: the last ones, these of all rows, or of each.

    Args:
        hidden: (B, T, C).
        logits_to_keep: a number, 0 all; positions (P,) or (B, P); or a mask (B, T), whose positions come as one row.
        length: of the rows before the LLM.
    """
    if not isinstance(logits_to_keep, Tensor):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if hidden.shape[1] != length:
        raise ZooError(
            f"logits_to_keep names positions among {length}, and a pruner inside the LLM left {hidden.shape[1]}: "
            "say how many of the last ones."
        )
    if logits_to_keep.dim() < 2:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]  # (P, C)
    return torch.take_along_dim(hidden, logits_to_keep.unsqueeze(-1), dim=1)  # (B, P, C)


_KEYWORDS = frozenset(signature(ForwardMixin.forward).parameters) - {"self", "kwargs"}
