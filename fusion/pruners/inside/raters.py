"""Words of a prompt that are about its images, found at the LLM's input: the raters of SparseVLM."""

import torch
from torch import Tensor

from zoo.fusion.pruners.inside.attention_flow import BLOCK
from zoo.fusion.pruners.inside.pruned_prompt import LayerCut

_ROUNDING = 1e-5  # relative difference up to which shares count as equal


def raters(start: LayerCut) -> Tensor:
    """Choose the text tokens that resemble the image tokens more than the mean text token does.

    An image token shares one vote among the text behind the first image token of its sample and in front of the first
    answer: the softmax over the text of unscaled products of embeddings, in float32. Where all shares are equal, all of
    that text rates; where there is no such text, the last token of the prompt.

    Returns:
        Votes (B, T), the same for all raters of a sample, with a sum of 1.
    """
    tokens, samples = start.tokens, start.total.shape[1]
    first = tokens.column.new_full(start.total.shape, tokens.column.shape[1])
    image = tokens.image & tokens.seen
    column = tokens.column.masked_fill(~image, tokens.column.shape[1])
    first = first.scatter_reduce(1, tokens.segment, column, "amin").gather(1, tokens.segment)
    text = tokens.voter & tokens.seen & ~image & (tokens.column > first)
    columns = text.any(0).nonzero()[:, 0]
    weight = image / start.total.gather(1, tokens.segment).clamp(min=1)  # (B, T)
    share = torch.zeros_like(weight)
    with torch.autocast(start.hidden.device.type, enabled=False):
        words = start.hidden[:, columns].float().transpose(1, 2)  # (B, C, W)
        for rows in image.any(0).nonzero()[:, 0].split(BLOCK):
            alike = start.hidden[:, rows].float() @ words  # (B, R, W)
            same = tokens.segment[:, rows, None] == tokens.segment[:, None, columns]
            alike = alike.masked_fill(~(same & text[:, None, columns]), -torch.inf).softmax(-1).nan_to_num(0.0)
            share[:, columns] += (alike * weight[:, rows, None]).sum(1)
    many = count_in(text, tokens.segment, samples)
    mean = torch.zeros_like(start.total, dtype=share.dtype).scatter_add(1, tokens.segment, share) / many.clamp(min=1)
    rater = text & (share > mean.gather(1, tokens.segment) * (1 + _ROUNDING))
    found = count_in(rater, tokens.segment, samples)
    rater |= text & (found == 0).gather(1, tokens.segment)  # equal shares
    votes = rater / count_in(rater, tokens.segment, samples).clamp(min=1).gather(1, tokens.segment)
    return torch.where((many > 0).gather(1, tokens.segment), votes, tokens.start("last"))


def count_in(mask: Tensor, segment: Tensor, samples: int) -> Tensor:
    """Count the true positions of (B, L) in each sample: (B, S)."""
    return segment.new_zeros(len(mask), samples).scatter_add(1, segment, mask.long())
