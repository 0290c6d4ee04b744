"""Training steps of `zoo bench device`: FLOPs of the model over time, as a share of what the device multiplies."""

from typing import Any

import torch

from zoo.benches.costs import DecoderSizes, encoder_flops, matmul_flops
from zoo.benches.device import DevicePlace, peak_of
from zoo.benches.device_models import SIZES, made
from zoo.benches.llava import Sizes, batch, ours_of
from zoo.benches.measure import Value
from zoo.benches.measure import matmul as products
from zoo.composed.outputs import LOSS_ALONE
from zoo.runs.processes import start_accelerator
from zoo.settings.stage import Stage
from zoo.text.batch import to_device
from zoo.training.step import Engine

TEXT = 447  # tokens of a row beside its image: 1024 with 576 of it and one before
LABELS = 256
ROWS = {"05b": (32, 16, 8, 4), "7b": (16, 8, 4, 2, 1)}  # of a pass: the first that fits into memory


def matmul(place: DevicePlace) -> None:
    """Multiply square matrices in bf16: what the device reaches."""
    size = 64 if place.tiny else 8192
    plain, flops = products(place.device, size, repeat=10)
    times = place.seconds(plain.step, share=0.2)
    value = Value(*(flops / t / 1e12 for t in (times.median, times.high, times.low)))
    peak, name = peak_of(place.device)
    stated = f"{name}: {100 * value.median / peak:.0f} % of the {peak:.0f} that are stated" if peak else name
    place.row(f"products of {size} x {size}, bf16", value, " TFLOP/s", stated)


def whole(place: DevicePlace) -> None:
    """0.5B: the step of `zoo train`, all weights but the encoder's, AdamW, float32 masters."""
    sizes = SIZES[place.options.sizes]["05b"]

    def step(rows: int) -> Any:
        model = made(sizes, place.device, torch.float32)
        model.vision.requires_grad_(False)
        return _engine_step(place, model, sizes, rows)

    _train(place, sizes, "0.5B, all weights but the encoder's, AdamW", step, "05b", backward=2)


def large(place: DevicePlace) -> None:
    """7B: LoRA on frozen bf16 weights, and forward and backward of all weights without an optimiser."""
    sizes = SIZES[place.options.sizes]["7b"]

    def lora(rows: int) -> Any:
        node = {"lora": {"name": "lora", "rank": 64, "alpha": 128.0}}
        model = made(sizes, place.device, torch.bfloat16, adapter=node)
        model.requires_grad_(False)
        model.adapter.requires_grad_(True)
        for name, parameter in model.llm.lm.named_parameters():
            parameter.requires_grad_(any(adapter.owns(name) for adapter in model.adapter.values()))
        return _engine_step(place, model, sizes, rows)

    def backward(rows: int) -> Any:
        model = made(sizes, place.device, torch.bfloat16).train()
        model.vision.requires_grad_(False)
        given = _rows(sizes, rows, place)

        def step() -> None:
            model(**given, **LOSS_ALONE).loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

        return model, step

    _train(place, sizes, "7B, LoRA of rank 64, AdamW", lora, "7b", backward=1, share=0.5)
    _train(place, sizes, "7B, forward and backward of all weights", backward, "7b", backward=2, share=0.5)


def _rows(sizes: Sizes, rows: int, place: DevicePlace) -> dict[str, Any]:
    text, labels = (20, 8) if place.tiny else (TEXT, LABELS)
    return to_device(ours_of(batch(sizes, rows, 1 + sizes.image_tokens + text, labels)), place.device)


def _engine_step(place: DevicePlace, model: Any, sizes: Sizes, rows: int) -> Any:
    given = _rows(sizes, rows, place)
    stage = Stage(steps=1_000_000, batch_size=rows, lr=1e-5, schedule="constant")
    engine = Engine(start_accelerator(str(place.device.type)), model, stage, 1_000_000, precision="bf16")
    count = 0

    def step() -> None:
        nonlocal count
        engine.run(count, count, [given], False)
        count += 1

    return model, step


def _train(
    place: DevicePlace, sizes: Sizes, what: str, make: Any, kind: str, *, backward: int, share: float = 1.0
) -> None:
    """Time a step with as many rows as fit, and write down its MFU.

    Args:
        make: rows -> the model and its step.
        kind: of `ROWS`.
        backward: products of the backward pass for one of the forward pass: 2, or 1 where weights are frozen.
        share: of the section's time.
    """
    for rows in (2,) if place.tiny else ROWS[kind]:
        failed = len(place.left_out)
        with place.trying(f"{what}, {rows} rows"):
            model, step = make(rows)
            if place.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            place.begin()
            times = place.seconds(step, share)
            _write(place, sizes, what, model, rows, times, backward)
        model = step = None
        place.clean()
        if len(place.left_out) == failed:
            return


def _write(place: DevicePlace, sizes: Sizes, what: str, model: Any, rows: int, times: Value, backward: int) -> None:
    text, labels = (20, 8) if place.tiny else (TEXT, LABELS)
    length = 1 + sizes.image_tokens + text
    decoder = DecoderSizes.of(model.llm.lm.config.get_text_config())
    # FLOPs of the model: attention in full, the vocabulary at positions with labels, the frozen encoder forward alone.
    forward = matmul_flops(decoder, [length] * decoder.num_layers, head_rows=labels)
    encoder = encoder_flops(model.vision.runner, sizes.image_tokens) or 0
    flops = rows * ((1 + backward) * forward + encoder)
    rate = Value(*(flops / t / 1e12 for t in (times.median, times.high, times.low)))
    peak, name = peak_of(place.device)
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if place.device.type == "cuda" else ""
    kernel = model.llm.lm.config.get_text_config()._attn_implementation
    note = (
        f"{rows} x {length} positions, {labels} labels, {kernel}, {1e3 * times.median:.1f} ms a step {memory}".strip()
    )
    place.row(f"{what}: FLOPs of the model", rate, " TFLOP/s", note)
    if peak:
        share = Value(*(100 * r / peak for r in (rate.median, rate.low, rate.high)))
        place.row(f"{what}: MFU", share, " %", f"of {peak:.0f} TFLOP/s, as stated for {name}")
    place.row(
        f"{what}: tokens", Value(*(rows * length / t for t in (times.median, times.high, times.low))), " a second"
    )
