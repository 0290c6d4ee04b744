"""A small model that reads pictures, for the claims about pruners: it learns whole, and answers whole and pruned.

An encoder with [CLS] learns from [CLS] alone; its tokens and row are those of the block before the last. Then a
projector and a language model learn to answer questions from all tokens. A question is one token, and so is its answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benches.flops import flop_counter
from zoo.claims.experiment import Run
from zoo.claims.steps import train
from zoo.composed.image_path import checksum_of
from zoo.composed.outputs import LLMSequence
from zoo.registry import ImageFeatures, build
from zoo.registry.forward_pass import running

DENSE = "dense positions"  # of a row
VISION, WIDTH = 48, 64  # widths of the encoder and of the language model


@dataclass(frozen=True)
class Sizes:
    """How long encoder and reader learn, from how many pictures a step, and how many they are asked about."""

    seeing: int
    reading: int
    batch: int
    test: int

    def of(self, run: Run) -> "Sizes":
        """For a share of the steps. A run of next to no steps shows nothing, and is to be quick."""
        steps = run.steps(self.seeing, least=4), run.steps(self.reading, least=4)
        return Sizes(*steps, *((4, 6) if run.share < 0.1 else (self.batch, self.test)))


def encoder(
    side: int, patch: int, outputs: int, loss: Callable[[Callable[[Tensor], Tensor]], Tensor], seed: int, steps: int
) -> Any:
    """Train an encoder by what is told from its [CLS]; give it without its last block.

    Args:
        side: patches a side.
        patch: pixels a side of a patch.
        outputs: numbers told from [CLS].
        loss: of what tells them, (M, 3, S, S) -> (M, outputs), on a batch that it draws.
        seed: of the weights.
        steps: of training.
    """
    torch.manual_seed(seed)
    vit = {"name": "timm", "image_size": side * patch, "patch_size": patch, "width": VISION, "depth": 3, "heads": 4}
    tower = build("vision", {**vit, "layer": -1})
    head = nn.Linear(VISION, outputs)

    def told(pixels: Tensor) -> Tensor:
        logits: Tensor = head(tower(pixels, need=frozenset({"prefix_tokens"})).prefix[:, 0])
        return logits

    train([*tower.parameters(), *head.parameters()], steps, lambda: loss(told), warmup=min(50, steps // 4))
    cut = build("vision", {**vit, "layer": -2})
    cut.load_state_dict(tower.state_dict(), strict=False)
    return cut.requires_grad_(False).eval()


class Reader(nn.Module):
    """Encoder, projector and language model."""

    def __init__(self, vision: Any, questions: int, answers: int, layers: int = 6) -> None:
        super().__init__()
        self.vision, self.questions = vision, questions
        self.projector = build("projector", {"name": "mlp"}, vision_dim=VISION, text_dim=WIDTH, grid=vision.grid)
        llama = {"name": "hf", "model_type": "llama", "hidden_size": WIDTH, "num_layers": layers, "num_heads": 4}
        self.llm = build(
            "llm", {**llama, "intermediate_size": 160, "max_positions": 512}, vocab_size=questions + answers
        )

    def look(self, pixels: Tensor) -> ImageFeatures:
        """Encode pictures (n, 3, S, S), or films (n, F, 3, S, S) frame by frame, with all that pruners ask for."""
        wanted = frozenset({"cls_attention", "key_attention", "keys", "prefix_tokens"})
        pixels = pixels.flatten(0, -4)
        if self.training:
            return self.vision(pixels)
        return replace(self.vision(pixels, need=wanted), checksum=checksum_of(pixels))

    def forward(self, image: ImageFeatures, asked: Tensor, pruners: Sequence[Any] = (), kept: bool = True) -> Tensor:
        """Give logits of the answers (n, answers) to one question (n,) about each picture or film.

        Args:
            image: of all frames.
            asked: the questions.
            pruners: ahead of the projector, or inside the language model.
            kept: whether tokens that are left have the positions that they had.
        """
        for pruner in pruners:
            image = pruner(image)
        n, whole = len(asked), math.prod(self.vision.grid)
        image = image.placed(whole)
        tokens = self.projector(image).reshape(n, -1, WIDTH)  # (n, F * K, W)
        frames = len(image.tokens) // n
        assert image.places is not None, "`placed` has set them"
        first = whole * torch.arange(frames).unsqueeze(-1)  # (F, 1)
        places = (image.places.unflatten(0, (n, frames)) + first).flatten(1)  # (n, F * K)
        places = torch.cat([places, places.new_full((n, 1), whole * frames)], 1)
        if not kept:
            places = torch.arange(places.shape[1]).expand_as(places)
        question = self.llm.embed(asked.unsqueeze(1))  # (n, 1, W)
        k = tokens.shape[1]
        slots = torch.cat([torch.ones(n, k), torch.zeros(n, 1)], dim=1).bool()
        mask = torch.ones(n, k + 1, dtype=torch.long)  # without it, gaps are taken for borders of packed samples
        embeds = torch.cat([tokens, question], dim=1)
        with running(LLMSequence(slots, mask, places, None)):
            hidden = self.llm.hidden(inputs_embeds=embeds, attention_mask=mask, position_ids=places).last_hidden_state
        logits: Tensor = self.llm.head(hidden[:, -1])[:, self.questions :]
        return logits


def learnt_reader(source: Any, vision: Any, words: tuple[int, int], run: Run, sizes: Sizes, g: torch.Generator,
                  layers: int = 6) -> Reader:  # fmt: skip
    """Train a reader on one question about each picture.

    Args:
        source: draws pixels, and questions and answers (n, Q) about them.
        vision: the encoder.
        words: how many questions and answers there are.
        run: whose seed the weights are made with.
        sizes: steps, and pictures a step.
        g: draws pictures and questions.
        layers: of the language model.
    """
    torch.manual_seed(run.seed)
    model = Reader(vision, *words, layers)

    def loss() -> Tensor:
        drawn = source.draw(sizes.batch, g)
        which = torch.randint(drawn["asked"].shape[1], (sizes.batch, 1), generator=g)
        logits = model(model.look(drawn["pixels"]), drawn["asked"].gather(1, which)[:, 0])
        return F.cross_entropy(logits, drawn["answers"].gather(1, which)[:, 0])

    train(model.parameters(), sizes.reading, loss, warmup=min(50, sizes.reading // 4))
    return model.eval()


@torch.no_grad()
def answered(
    model: Reader, image: ImageFeatures, asked: Tensor, wanted: Tensor, chain: Sequence[dict[str, Any]], kept: bool
) -> tuple[Tensor, float]:
    """Ask behind a chain of pruners: which answers are right (n, questions), and MFLOPs of the LLM for one of them.

    Args:
        image: what the encoder gives of all pictures.
        asked: questions about each picture (n, questions).
        wanted: their answers, likewise.
        chain: nodes of pruners.
        kept: positions of the tokens that they leave.
    """
    h, w = model.vision.grid
    pruners = [build("pruner", node, vision_dim=VISION, grid=(h, w), num_tokens=h * w, llm=model.llm) for node in chain]
    for pruner in pruners:
        pruner.attach(model.llm)
    questions = list(zip(asked.T, wanted.T, strict=True))
    try:
        with flop_counter() as counter:
            at: list[int] = []
            handles = [model.llm.layers[0].register_forward_pre_hook(lambda *_: at.append(counter.get_total_flops()))]
            handles += [model.llm.layers[-1].register_forward_hook(lambda *_: at.append(counter.get_total_flops()))]
            right = [model(image, questions[0][0], pruners, kept).argmax(-1) == questions[0][1]]
        for handle in handles:
            handle.remove()
        right += [model(image, question, pruners, kept).argmax(-1) == answer for question, answer in questions[1:]]
    finally:
        for pruner in pruners:
            pruner.detach()
    return torch.stack(right, 1), (at[1] - at[0]) / len(asked) / 1e6


Chains = list[list[dict[str, Any]]]  # of pruners; a score is the mean over chains


def each_ratio(tokens: int, kept: Sequence[int], draws: int) -> dict[str, Chains]:
    """Chains of every pruner that ranks, merges or draws, by its name and how many of `tokens` it keeps.

    Random pruning has a chain for each of `draws`, whose scores are averaged.
    """
    found: dict[str, Chains] = {f"all {tokens}": [[]]}
    for k in kept:
        share = k / tokens
        found[f"fastervlm {k}"] = [[{"name": "fastervlm", "num_keep": k}]]
        found[f"random {k}"] = [[{"name": "random", "keep_ratio": share, "seed": s}] for s in range(draws)]
        for name in ("visionzip", "divprune", "fastv"):
            found[f"{name} {k}"] = [[{"name": name, "keep_ratio": share}]]
        found[f"aim merged to {k}"] = [[{"name": "aim", "merge_ratio": share, "prune": False}]]
    found[f"pool {tokens // 4}"] = [[{"name": "pool", "stride": 2}]]
    return found


def ask(run: Run, model: Reader, image: ImageFeatures, test: dict[str, Tensor], arms: dict[str, Chains]) -> None:
    """Add accuracy and MFLOPs behind every arm, the mean over its chains, with kept and with dense positions."""
    for name, chains in run.arms(arms):
        for kept in (True, False) if any(chains) else (True,):
            answers = [answered(model, image, test["asked"], test["answers"], chain, kept) for chain in chains]
            accuracy = sum(float(right.float().mean()) for right, _ in answers) / len(answers)
            run.add({name: accuracy, f"{name}, MFLOPs": answers[0][1]} if kept else {f"{name}, {DENSE}": accuracy})
