"""LLaVA in vLLM, with a pruner of the zoo between its encoder and its projector.

Set by vLLM's `--hf-overrides`: `architectures` names this class, `zoo_pruner` is the pruner's node with its options and
`positions`. `dense` needs nothing more. `kept` needs positions that are not the columns, which vLLM has for M-RoPE: set
`"text_config": {"rope_parameters": {"mrope_section": [a, b, c]}}` with a + b + c half the size of a head (the rows of
positions are equal, so any division is LLaVA's own rotary embedding), and a `--video-pruning-rate` above 0, by which
vLLM asks for positions again behind the encoder. `auto`, the default, is kept where both are set, else dense.

Written by the sources of vLLM 0.13.0 and 0.33.0 (models/llava.py, models/interfaces.py, multimodal/processing, and
what runs a model in v1/worker), and tested with the configuration, processor and tower of 0.33.0 on a CPU, and with
substitutes of its classes. It was not run in vLLM's engine.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from zoo.composed.pruner_alone import PrunerAlone, prompt_positions, pruner
from zoo.registry import ZooError
from zoo.registry.part import base_of, block_of
from zoo.vision.encoders.attention_scores import column_mean, row

# A question is not: vLLM keeps what it made of an image for all prompts that show it.
GIVEN = frozenset({"grid", "cls_attention", "key_attention", "keys", "prefix_tokens"})


def pruner_of(config: Any, positions: str) -> PrunerAlone:
    """Build the pruner that `zoo_pruner` of a LLaVA config names."""
    node = getattr(config, "zoo_pruner", None)
    if not isinstance(node, dict) or "name" not in node:
        raise ZooError(f'Set "zoo_pruner": {{"name": "fastervlm", ...}} in --hf-overrides, got {node!r}.')
    tower, options = config.vision_config, {k: v for k, v in node.items() if k != "positions"}
    patches = "default" if "clip" in tower.model_type else "full"  # SigLIP has no [CLS] to leave out
    if config.vision_feature_select_strategy != patches or not isinstance(config.vision_feature_layer, int):
        raise ZooError(
            f"A pruner takes the patches of one block: vision_feature_select_strategy={patches} and a number as "
            f"vision_feature_layer, got {config.vision_feature_select_strategy} and {config.vision_feature_layer}."
        )
    sizes = {"vision_dim": tower.hidden_size, "vision_depth": tower.num_hidden_layers}
    side = tower.image_size // tower.patch_size
    found = pruner(**options, **sizes, grid=(side, side), positions=positions)
    if found.part.ragged or found.part.behind:
        raise ZooError(f"pruner {found.name!r} keeps another number of each image, which vLLM has to know beforehand.")
    if missing := {base_of(word) for word in found.needs} - GIVEN:
        raise ZooError(f"pruner {found.name!r} needs {', '.join(sorted(missing))}, which is not given in vLLM.")
    return found


class Info(LlavaProcessingInfo):  # type: ignore[misc]
    """Counts the image tokens that are left."""

    @cached_property
    def _kept(self) -> int:
        return pruner_of(self.get_hf_config(), "dense").kept

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self._kept


class Processor(LlavaMultiModalProcessor):  # type: ignore[misc]
    """Writes the placeholders that `Info` counts: transformers' processor would write one for each patch."""

    def _apply_hf_processor_main(self, *args: Any, **kwargs: Any) -> Any:
        if "enable_hf_prompt_update" in kwargs:  # later versions never let transformers write them
            kwargs["enable_hf_prompt_update"] = False
        return super()._apply_hf_processor_main(*args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class ZooLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA whose image tokens are pruned before the projector; with kept positions they carry them to the LLM."""

    supports_mrope = True
    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rope = getattr(self.config.text_config, "rope_parameters", None) or {}
        pruning = getattr(vllm_config.model_config.multimodal_config, "is_multimodal_pruning_enabled", bool)
        able = bool("mrope_section" in rope and pruning())  # vLLM 0.10 has no such switch
        wanted = (getattr(self.config, "zoo_pruner", None) or {}).get("positions", "auto")
        needs = "positions=kept needs mrope_section and --video-pruning-rate, see zoo.serving.vllm_llava"
        if wanted == "kept" and not able:
            raise ZooError(f"{needs}. Or set positions=dense.")
        if wanted == "auto" and not able:
            logging.getLogger(__name__).warning("zoo: positions are dense; %s.", needs)
        self.prune = pruner_of(self.config, ("kept" if able else "dense") if wanted == "auto" else wanted)
        self.kept = self.prune.positions == "kept"

    def _process_image_input(self, image_input: Any) -> Any:
        """Encode, prune and project images: (M, K, C), or (M, K, C + 2) with the positions in two numbers below 256,
        which 16 bits hold exactly.
        """
        if image_input["type"] != "pixel_values":
            raise ZooError("Images are pruned behind the encoder: pass pictures, not image_embeds.")
        with self._scores() as known:
            features = self._process_image_pixels(image_input)  # (M, N, D)
        pruned = self.prune(features, pixel_values=image_input["pixel_values"], **known)
        tokens = self.multi_modal_projector(pruned.tokens)
        marks = torch.stack([pruned.positions // 256, pruned.positions % 256], dim=-1).to(tokens)  # (M, K, 2)
        return torch.cat([tokens, marks], dim=-1) if self.kept else tokens

    @contextmanager
    def _scores(self) -> Iterator[dict[str, Tensor]]:
        """Collect what the pruner needs from the blocks of the tower, while it runs."""
        layers, known = self.vision_tower.vision_model.encoder.layers, {}
        with ExitStack() as hooks:
            for word in self.prune.needs - {"grid"}:
                layer = layers[(block_of(word) or len(layers)) - 1]

                def take(_: Any, __: Any, out: Any, word: str = word, attention: Any = layer.self_attn) -> None:
                    known[word] = self._score(base_of(word), out[0] if isinstance(out, tuple) else out, attention)

                watched = layer if word == "prefix_tokens" else layer.self_attn.qkv_proj
                hooks.callback(watched.register_forward_hook(take).remove)
            yield known

    def _score(self, word: str, out: Tensor, attention: Any) -> Tensor:
        """Compute a score (M, N, ...) of q, k, v (M, P + N, 3 * H * d) of a block, or take its prefix (M, P, D)."""
        prefix = out.shape[1] - self.prune.num_tokens
        if word == "prefix_tokens":
            return out[:, :prefix]
        heads = (attention.num_heads_per_partition, attention.head_dim)
        query, key, _ = (x.unflatten(-1, heads).transpose(1, 2) for x in out.chunk(3, dim=-1))  # (M, H, P + N, d)
        ranks = getattr(attention, "tp_size", 1)  # each of them has as many heads
        if word == "keys" and ranks == 1:
            return key[:, :, prefix:].transpose(1, 2)  # (M, N, H, d)
        if word not in ("cls_attention", "key_attention") or (word == "cls_attention" and not prefix):
            raise ZooError(f"The encoder does not give {word} in vLLM with {ranks} ranks.")
        rows = query[:, :, :1] if word == "cls_attention" else query
        scores = (row if word == "cls_attention" else column_mean)(rows, key, attention.scale)[:, prefix:]
        return tensor_model_parallel_all_reduce(scores) / ranks if ranks > 1 else scores

    def get_mrope_input_positions(self, input_tokens: Sequence[int], *_: Any, **__: Any) -> tuple[Tensor, int]:
        """Return positions (3, T), and by how much they exceed the columns behind. Those of the text are final."""
        return self._positions(input_tokens, torch.empty(0, dtype=torch.long), 0)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Set the positions of the image tokens of a chunk that begins at `num_computed_tokens`, as they carry them."""
        if not self.kept or not len(multimodal_embeddings):
            return multimodal_embeddings, mrope_positions, self._positions(input_ids, torch.empty(0).long(), 0)[1]
        high, low = torch.cat([x[:, -2:] for x in multimodal_embeddings]).cpu().long().unbind(-1)  # (S,)
        shown = self._shown(input_ids)
        first, number = int(shown[:num_computed_tokens].sum()), shown.cumsum(0) - 1
        found, delta = self._positions(input_ids, high * 256 + low, first)
        fresh = shown & (number >= first) & (number < first + len(high))  # (T,)
        positions = torch.where(fresh.to(mrope_positions.device), found.to(mrope_positions), mrope_positions)
        return [x[:, :-2] for x in multimodal_embeddings], positions, delta

    def _shown(self, ids: Any) -> Tensor:
        return torch.as_tensor(ids, device="cpu") == self.config.image_token_index

    def _positions(self, ids: Any, places: Tensor, first: int) -> tuple[Tensor, int]:
        """Return positions (3, T), with `places` for the image tokens from `first` on, and what follows is ahead by."""
        shown, k = self._shown(ids), self.prune.kept
        images, length = int(shown.sum()) // k, self.prune.num_tokens if self.kept else k
        known = torch.arange(k).repeat(images)
        known[first : first + len(places)] = places
        positions = prompt_positions(known, [k] * images, [length] * images, shown[None])
        return positions.expand(3, -1).clone(), images * (length - k)
