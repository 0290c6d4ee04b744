"""Rows of `zoo bench distill` for LLaVA-MoD: a preference step against its passes, experts against their FLOPs."""

from typing import Any

import torch

from zoo.benches import llava
from zoo.benches.flops import count_flops
from zoo.benches.llava import Sizes
from zoo.benches.measure import Plain
from zoo.benches.report import Row, short
from zoo.benches.steps import our_step, turns_of
from zoo.composed.outputs import LOSS_ALONE
from zoo.registry import IGNORE_INDEX, build
from zoo.settings.stage import Stage
from zoo.teaching.teacher import Teacher
from zoo.text.batch import EncodedSample, TokenizedDialog, as_preference, collate, share_prefix, to_device
from zoo.training.step import Engine


def preference_rows(place: Any, sizes: Sizes, teacher_sizes: Sizes) -> list[Row]:
    """One preference step, against the student's supervised step on both answers plus the teacher's forward on both.

    That is four plain forwards and two backwards. Once the two answers of a pair share their image in one row, once
    they stand in rows of their own.
    """
    o, device = place.options, place.accelerator.device
    pairs = max(1, o.batch // 2)
    shared, apart = pair_batches(sizes, pairs, o.length, o.labels)
    plain = {k: v for k, v in apart.items() if k != "pair_ids"}
    plain["labels"] = torch.where(apart["pair_ids"] >= 0, apart["input_ids"], IGNORE_INDEX)  # both answers count
    teacher = Teacher(llava.composed(teacher_sizes).to(device), frozenset({"teacher.pairs"}))
    supervised = our_step(place.accelerator, llava.composed(sizes), [plain], precision=place.precision)
    here = to_device(plain, device)

    def forwards_and_backwards() -> None:
        supervised.step()
        with torch.no_grad():
            teacher.model(**here, **LOSS_ALONE)

    variants = {"plain": Plain(forwards_and_backwards)}
    for name, batch in (("shared", shared), ("apart", apart)):
        variants[name] = _preference_step(place, llava.composed(sizes), teacher, batch)
    times = place.time(variants)
    note = f"{pairs} pairs, {o.labels} tokens an answer, {sizes.image_tokens} image tokens"
    return [
        Row(
            f"preference step over four forwards and two backwards, answers {where}",
            times.ratio(name, "plain"),
            bound=1.10,
            at_most=True,
            note=note,
        )
        for name, where in (("shared", "sharing their image"), ("apart", "in rows of their own"))
    ]


def upcycle_row(place: Any, sizes: Sizes, num_experts: int = 4, top_k: int = 2) -> Row:
    """A sparse student's step against the dense one's, same tokens: the ratio of times over the ratio of FLOPs."""
    o = place.options
    plain = llava.ours_of(llava.batch(sizes, o.batch, o.length, o.labels))
    dense, sparse = llava.composed(sizes), llava.composed(sizes)
    adapter = build("adapter", {"name": "upcycle", "num_experts": num_experts, "top_k": top_k}, llm=sparse.llm)
    sparse.adapter["upcycle"] = adapter
    adapter.attach()
    flops = _step_flops(place, dense, plain)
    tokens = plain["input_ids"].numel()
    idle = [p for n, p in sparse.llm.lm.named_parameters() if adapter.idles(n)]
    routers = sum(layer.router.weight.numel() for layer in adapter.layers.values())
    extra = 3 * 2 * tokens * ((top_k - 1) * sum(p.numel() for p in idle) + routers)  # forward and twice that backward
    variants = {
        name: our_step(place.accelerator, model, [plain], precision=place.precision)
        for name, model in (("dense", dense), ("sparse", sparse))
    }
    times = place.time(variants)
    slower, share = times.ratio("sparse", "dense"), 1 + extra / flops
    return Row(
        f"upcycled step, {num_experts} experts, {top_k} run: time over the dense step's, over the ratio of FLOPs",
        slower.over(share),
        bound=1.2,
        at_most=True,
        note=f"{short(slower.median)}x the time for {short(share)}x the FLOPs; {tokens} tokens",
    )


def pair_batches(
    sizes: Sizes, pairs: int, length: int, labels: int, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the same random pairs of answers twice: sharing their image in a row, and in rows of their own."""
    generator = torch.Generator().manual_seed(seed)
    shared, apart = [], []
    for number in range(pairs):
        size = (3, sizes.image_size, sizes.image_size)
        pixels = torch.randn(size, generator=generator)
        question = torch.randint(llava.IMAGE_TOKEN + 1, sizes.vocab, (length - labels,), generator=generator)
        question[1 : 1 + sizes.image_tokens] = llava.IMAGE_TOKEN
        dialogs = []
        for side in (0, 1):
            answer = torch.randint(llava.IMAGE_TOKEN + 1, sizes.vocab, (labels,), generator=generator)
            ids = torch.cat([question, answer])
            wanted = ids.clone()
            wanted[: length - labels] = IGNORE_INDEX
            one = as_preference(TokenizedDialog(ids.numpy(), wanted.numpy(), 1 + sizes.image_tokens, 1), side)
            dialogs.append(one)
            apart.append(EncodedSample(ids.numpy(), one.labels, [pixels], pairs=one.pairs, ids=[str(number)]))
        row: dict[str, Any] = dict(share_prefix(dialogs, str(number)))
        shared.append(EncodedSample(**row, pixel_values=[pixels], ids=[str(number)]))
    return collate(shared, pad_id=0), collate(apart, pad_id=0)


def _preference_step(place: Any, model: Any, teacher: Teacher, batch: dict[str, Any]) -> Plain:
    """The step of `zoo train` with the preference objective, on a batch that is there already."""
    stage = Stage(
        steps=1_000_000, batch_size=len(batch["input_ids"]), lr=1e-4, schedule="constant", loss_weights={"answer": 0.0}
    )
    distiller = build("distiller", {"name": "llava_mod", "objective": "preference"})
    model = model.to(place.accelerator.device)
    engine = Engine(
        place.accelerator,
        model,
        stage,
        stage.steps or 1,
        precision=place.precision,
        distiller=distiller,
        teacher=teacher,
    )
    return turns_of(engine, [batch])


def _step_flops(place: Any, model: Any, batch: dict[str, Any]) -> float:
    own = to_device(batch, place.accelerator.device)
    model.to(place.accelerator.device).train()
    flops = count_flops(lambda: model(**own, **LOSS_ALONE).loss.backward())
    model.zero_grad()
    return flops
