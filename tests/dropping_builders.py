"""Small decoders with a dropper inside, prompts with images, and passes through them."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from tests.fusion_builders import VOCAB, tiny_llm
from zoo.fusion.pruners.inside.dropper import Dropper
from zoo.registry import IGNORE_INDEX
from zoo.registry.forward_pass import running

IMAGE = 5  # id that stands for an image token here
KEEP = {0: 0.75, 1: 0.5}  # share of the image tokens that stays, by the layer after which the others go


def llm_of(model_type="llama", attention="sdpa", layers=4, **options):
    """A decoder whose attention is sharp enough for a wrong mask to show."""
    llm = tiny_llm(model_type, attention=attention, num_layers=layers, **options)
    with torch.no_grad():
        for p in llm.parameters():
            p.mul_(6) if p.dim() > 1 else None
    return llm


def dropper(llm, keep=None, hide=False, attach=True):
    """Drop by the size of the keys: a score that no other token of the batch has a part in."""
    keep = KEEP if keep is None else keep
    made = Dropper(
        llm,
        "pruner 'test'",
        sorted(keep),
        lambda layer, total: (total * keep[layer]).long(),
        lambda given: given.key.float().norm(dim=-1).mean(1),
        hide,
    )
    if attach:
        made.attach()
    return made


def row(text="tiiit", images=6, seed=0):
    """Ids of a prompt: t stands for three words, i for an image."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.full((images,), IMAGE) if c == "i" else torch.randint(IMAGE + 1, VOCAB, (3,), generator=g) for c in text]
    )


def padded(rows, side="left"):
    """Stack rows; padding is id 0."""
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(r, (longest - len(r), 0) if side == "left" else (0, longest - len(r))) for r in rows])
    return ids, (ids != 0).long()


def sequence(ids, mask=None, labels=None, **given):
    return SimpleNamespace(
        image_mask=ids == IMAGE, attention_mask=mask, position_ids=None, labels=labels, block_ids=None, **given
    )


def embeds_of(llm, ids):
    """Embeddings in which every image token is another vector, a function of its place in the row's image tokens."""
    embeds = llm.embed(ids)
    place = (ids == IMAGE).long().cumsum(1).float()[..., None] * torch.arange(1, embeds.shape[-1] + 1)
    return torch.where((ids == IMAGE)[..., None], place.sin() * 0.2, embeds)


def forward(llm, drop, ids, mask=None, dense=False, **kwargs):
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with nullcontext() if drop is None else running(sequence(ids, mask, dense=dense)) as now:
        out = llm.hidden(inputs_embeds=embeds_of(llm, ids), attention_mask=mask, position_ids=positions, **kwargs)
    out.passed = now
    return out


def generate(llm, drop, ids, mask=None, dense=False, **kwargs):
    told = sequence(ids, mask, dense=dense)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_scores": True, **kwargs}
    options |= {"return_dict_in_generate": True}
    with torch.no_grad(), nullcontext() if drop is None else running(told) as now:
        out = llm.lm.generate(inputs_embeds=embeds_of(llm, ids), attention_mask=mask, **options)
    out.passed = now
    return out


def kept(out):
    """Columns that each layer saw in what `forward` or `generate` ran: (B, T) bool for each layer."""
    return out.passed.dropped.kept()


def labelled(ids):
    """Labels on the last three words."""
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[-3:] = ids[-3:]
    return labels


def loss_of(llm, ids, mask, labels):
    seq = sequence(ids, mask, labels)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with running(seq) as now:
        out = llm.hidden(inputs_embeds=embeds_of(llm, ids), attention_mask=mask, position_ids=positions)
    hidden = out.last_hidden_state
    logits = llm.head(hidden)[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1), seq.labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
    return total, seq.labels, now
