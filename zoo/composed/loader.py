"""Build a composed model with its weights: of a published checkpoint, a saved folder, or the checkpoints of its parts.

Used by `zoo.load`, by training and by `ZooModel.from_pretrained`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.composed.assembly import Parts, assemble
from zoo.composed.keywords import put
from zoo.composed.masters import masters_in, narrow, widen_terms
from zoo.composed.own_checkpoints import have_checkpoints, node_at, own_checkpoints
from zoo.published import is_published
from zoo.published.checkpoint import Checkpoint, checkpoint_from, checkpoint_in
from zoo.published.folder import read_content
from zoo.published.places import Placement, devices_of, placed
from zoo.published.reader import Reader
from zoo.registry import SINGLE_SLOTS, ZooError
from zoo.registry.following import before_weights
from zoo.registry.foreign import require_plausible
from zoo.storage.precision import dtype_of
from zoo.storage.safetensors_file import listing
from zoo.storage.weights import read_weights, weight_files


def load_model(
    make: Any,
    config: Any,
    folder: Path | None,
    *,
    fresh: Iterable[str] = (),
    dtype: Any = None,
    device_map: Any = None,
    bits: int = 0,
    state_dict: Mapping[str, Tensor] | None = None,
    walked: Parts | None = None,
    masters: bool = False,
) -> tuple[Any, set[str]]:
    """Build a model with its weights, on its devices, in eval mode.

    Args:
        make: `ZooModel`, or a class with the same constructor.
        config: of the model; `config.base` names a published checkpoint, and is set to the bases of the result.
        folder: published, or of a saved zoo model; None for a model that starts from its parts.
        fresh: parts that may start without weights.
        dtype: of the parameters; None or `auto` keeps that of the files.
        device_map: a device, `auto`, or a dict from prefixes of names to devices; None leaves the model where it is.
        bits: 8 or 4 for each weight of the language model's layers; 0: not quantised.
        state_dict: weights that replace the folder's.
        walked: the same parts on the meta device, if a check has built them.
        masters: keep weights float32 that were saved as master weights, to train on; else, with dtype None, they are
            rounded to the data type that they had before training.

    Returns:
        The model, and the names of its weights that were found nowhere.

    Raises:
        ZooError: a weight is missing, unknown or of another shape; or base weights are not those of the config.
    """
    saved = config.base
    reader = reader_for(config, folder, fresh=fresh, dtype=dtype, device_map=device_map, bits=bits, walked=walked)
    own = folder is not None and not is_published(read_content(folder))
    with before_weights(own):
        model = make(config, base=reader)
    missing: set[str] = set()
    if folder is not None and own:
        model.bases.require_same(saved)
        stored = {name: tensor.dtype for name, tensor in listing(weight_files(folder)).items()}
        held = masters_in(config.masters, stored, model.part_of) if dtype_of(dtype) is None else {}
        done = reader.already_loaded if reader else None
        missing = set(read_weights(model, folder, fresh=fresh, done=done, dtypes={} if masters else held))
        model.masters = held
        if not masters:
            narrow(model)  # those that are mapped from the file
        if dtype_of(dtype) is None and not masters:
            widen_terms(model)
        model.fresh_parts = sorted({model.part_of(n) for n in missing})
    elif reader is not None and reader.filled is not None:
        missing = set(reader.filled.missing)
        model.fresh_parts = sorted({n.partition(".")[0] for n in missing})
    if folder is not None and model.vision is not None:
        model.vision.read_files(folder)
    if state_dict is not None:
        missing -= put(model, state_dict, "state_dict")
    return placed(model, device_map, None if bits else dtype, reader.placement if reader else None).eval(), missing


def reader_for(
    config: Any,
    folder: Path | None,
    *,
    fresh: Iterable[str] = (),
    dtype: Any = None,
    device_map: Any = None,
    bits: int = 0,
    walked: Parts | None = None,
) -> Reader | None:
    """Return the reader of the checkpoint of a model's base weights; None where parts have checkpoints of their own.

    Args: as `load_model`.

    Raises:
        ZooError: the checkpoint is missing or has changed; or `bits` is not possible with it, or on this machine.
    """
    record = (config.base or {}).get("model")
    found, partial = None, False  # partial: the checkpoint lacks weights, which the folder has
    if folder is not None and is_published(read_content(folder)):
        found = checkpoint_in(folder, *((record or {}).get(k) or "" for k in ("checkpoint", "revision")))
    elif record and not record.get("whole"):  # else all weights are in the folder
        found, partial = checkpoint_from(record), folder is not None
    elif folder is not None and not have_checkpoints(config.slots or {}):
        found, partial = Checkpoint(folder, dict(listing(weight_files(folder)))), True
    if folder is not None:  # a downloaded config must not fill memory: its sizes are compared with its files first
        files = {*weight_files(folder), *(weight_files(found.folder) if found is not None else [])}
        _require_filled(config, files, walked)
    if bits and (found is None or found.record is None):
        raise ZooError(f"bits={bits} is for published checkpoints, and for models that were saved on one.")
    if found is None:
        return None
    device, places = devices_of(device_map, {n: t.bytes for n, t in found.tensors.items()})
    if bits:
        from zoo.published.bits import require_bits

        if places:
            raise ZooError(f"bits={bits} takes one device, not a device_map of parts: device_map='cuda'.")
        require_bits(bits, device)
    placement = Placement(
        fresh=frozenset(SINGLE_SLOTS) if "all" in set(fresh) else frozenset(fresh),
        device=device,
        places=places,
        dtype=dtype_of(dtype) or dtype_of(((found.record and record) or {}).get("dtype")),
        bits=bits,
    )
    return Reader(found, placement, partial)


def _require_filled(config: Any, files: set[Path], walked: Parts | None) -> None:
    """Refuse slots that are far larger than the files beside them, before memory is allocated for missing weights.

    A part with a checkpoint of its own is compared with it when it is built.
    """
    slots, parts = config.slots or {}, walked
    if parts is None:
        with torch.device("meta"):
            parts = assemble(slots, vocab_size=config.text_vocab_size)
    own = [p for k in ("projector", "layout") if (p := getattr(parts, k)) is not None]
    bases = [base for base in own_checkpoints(slots).values() if not base.inside]
    own += [p for b in bases if (p := b.of(parts)) is not None and not node_at(slots, b.path).get(b.option)]
    tensors = {  # by id: tied weights count once
        id(t): t.numel()
        for part in [*own, *parts.pruner.values(), *parts.adapter.values()]
        if isinstance(part, torch.nn.Module)
        for t in [*part.parameters(), *part.buffers()]
    }
    require_plausible(sum(tensors.values()), files, "The config of the model")
