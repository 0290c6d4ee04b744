"""The weights of a published checkpoint under our names, and what its files say of images and text.

A base is found in a folder, read into the parts of a model before adapters see them, and noted in the config of what is
saved later: weights that did not change are not written again.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoo.published import family_named, family_of, is_published
from zoo.published.contradictions import between, refuse_untied
from zoo.published.family import SPARE, parse, plain
from zoo.published.file_names import Held, as_modules
from zoo.published.places import place_of, places_of, require_names, settle, spread
from zoo.registry import ZooError
from zoo.registry.foreign import read_model_config, require_plausible
from zoo.storage.precision import cast_parameters, dtype_of, kept_wide
from zoo.storage.safetensors_file import Filled, fill, listing
from zoo.storage.weights import by_part, fingerprint, local_folder, may_start_fresh, weight_files

PARTS = ("vision", "projector", "layout", "llm")
# Options that do not change a number where shapes are equal, or that people rightly change.
_FREE = {("llm", "max_positions"), ("llm", "router_aux_coef"), ("llm", "zero_init_residual"), ("vision", "fit"),
         ("vision", "resample"), ("llm", "revision"), ("vision", "revision"),
         ("vision", "pooling_head"), ("layout", "kept_lines"),
         ("llm", "tie_embeddings")}  # fmt: skip  # what the files hold decides, see `refuse_untied`


@dataclass
class Base:
    """A checkpoint whose weights are read into the parts of a model.

    Attributes:
        tensors: by our names; once parts were filled, by those of their modules.
        record: what a saved model notes: family, checkpoint, revision, fingerprint; None for a zoo model's own folder.
        strangers: names in the files that no part has.
        contradictions: part -> what the config says of it, and what the files hold instead.
        fresh: parts that may start without weights.
        device, places: where weights go; `places` has prefixes of names and wins.
        dtype: of the parameters; None keeps that of the files.
        bits: 8 or 4 of the language model's layers (see `zoo.published.bits`); 0: all of them.
        lenient: a saved zoo model is loaded, whose own folder holds the rest: what adapters and other parts brought is
            read, and judged, later.
        filled: what was read, once it was.
    """

    folder: Path
    tensors: Held
    record: dict[str, Any] | None = None
    strangers: list[str] = field(default_factory=list)
    contradictions: dict[str, list[str]] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    places: Mapping[str, torch.device] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    bits: int = 0
    lenient: bool = False
    filled: Filled | None = None

    @property
    def empty(self) -> frozenset[str]:
        """Parts that are built without weights: those that may not start fresh."""
        return frozenset(PARTS) - self.fresh

    def place(self, name: str) -> torch.device:
        """The device of a weight."""
        if self.bits and name.partition(".")[0] == "llm":
            return torch.device("cpu")  # made small on its way to the device
        return place_of(name, self.places, self.device)

    @property
    def read_here(self) -> dict[int, Any] | None:
        """What was read from a zoo model's own folder, which need not be read again."""
        return self.filled.tensors if self.record is None and self.filled is not None else None

    def __call__(self, parts: Any) -> None:
        """Read the weights into the parts.

        Raises:
            ZooError: a weight is missing, unknown or of another shape; reported by part.
        """
        modules = {name: part for name in PARTS if (part := getattr(parts, name)) is not None}
        self.tensors = as_modules(self.tensors, modules)
        if self.record is not None and not may_start_fresh("llm", self.fresh):
            refuse_untied(parts.llm.lm, self.tensors, self.folder)
        wide = kept_wide(modules.values(), self.dtype) if self.dtype is not None else set()
        done = fill(modules, self.tensors, place=self.place, dtype=self.dtype, wide=wide)

        def part_of(name: str) -> str:
            return name.partition(".")[0]

        def needed(names: Iterable[str]) -> list[str]:
            return [n for n in names if not may_start_fresh(part_of(n), self.fresh)]

        unknown = [n for n in self.tensors if n not in done.used and not SPARE.search(n)]
        unknown = needed(n for n in unknown if part_of(n) in PARTS)
        self.filled = done
        if self.lenient:
            _zeros(modules, self.place)
            self._shrink(parts)
            return
        missing, other = needed(done.missing), needed(done.other_shape)
        stated = [line for part in needed(self.contradictions) for line in self.contradictions[part]]
        if missing or unknown or other or self.strangers or stated:
            lines = [f"The weights in {self.folder} do not fit the model.", *(f"  {line}" for line in stated)]
            lines += by_part("missing", missing, part_of) + by_part("unknown", unknown, part_of)
            lines += by_part("unknown", self.strangers, lambda n: n.partition(".")[0])
            lines += [f"  other shape: {o}" for o in other[:5]]
            raise ZooError("\n".join(lines))
        still = [n for m in modules.values() for n, t in [*m.named_parameters(), *m.named_buffers()] if t.is_meta]
        assert not still, f"left on the meta device: {still[:3]}"
        if hasattr(parts.llm, "verify") and len({p.device for p in parts.llm.parameters()}) == 1:
            parts.llm.verify()
        self._shrink(parts)

    def _shrink(self, parts: Any) -> None:
        """Hold the language model in few bits, if asked for: what it holds still is what the checkpoint gave."""
        if self.bits and self.filled is not None:
            from zoo.published.bits import in_bits

            self.filled.tensors.update({id(p): p for p in in_bits(parts.llm, self.bits, self.device)})


def _zeros(modules: Mapping[str, Any], place: Any) -> None:
    """Give a place in memory to what no file filled; tensors that are tied stay one."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: the tensor that holds nothing, and its successor
    for part, module in modules.items():
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                for key, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        empty = torch.zeros_like(tensor, device=place(part))
                        whole = isinstance(tensor, torch.nn.Parameter)
                        made[id(tensor)] = tensor, torch.nn.Parameter(empty) if whole else empty
                    table[key] = made[id(tensor)][1]


def base_of(folder: Path, checkpoint: str = "", revision: str = "") -> Base:
    """Find the weights of a published model in its folder."""
    content = read_content(folder)
    known = family_of(content, f"{folder}/config.json")
    tensors: Held = {}
    strangers: list[str] = []
    twice: dict[str, str] = {}
    for name, stored in listing(weight_files(folder)).items():
        ours = known.ours(name)
        if ours is not None:
            if ours in tensors:
                raise ZooError(f"{folder} holds {ours!r} twice, as {twice[ours]!r} and as {name!r}.")
            tensors[ours], twice[ours] = stored, name
        elif not SPARE.search(name):
            strangers.append(name)
    record = {
        "family": content["model_type"],
        "checkpoint": str(folder.absolute()) if not checkpoint or Path(checkpoint).is_dir() else checkpoint,
        "revision": (folder.name if folder.parent.name == "snapshots" else revision)
        or None,  # in the hub's cache, a commit
        "fingerprint": fingerprint(folder),
    }
    stated = between(parse(content, f"{folder}/config.json"), tensors)
    return Base(folder, tensors, record, strangers, stated)


def base_from(record: Mapping[str, Any]) -> Base:
    """Find again the base weights that a saved model was made from.

    Raises:
        ZooError: they are not there, or not those that the model was saved on.
    """
    family_named(str(record.get("family")))
    checkpoint = str(record.get("checkpoint"))
    try:
        folder = local_folder(checkpoint, record.get("revision"))
    except ZooError as error:
        raise ZooError(f"{error} The model was made from it; if it lies elsewhere now: model.base=<folder>.") from error
    base = base_of(folder, checkpoint, str(record.get("revision") or ""))
    now = (base.record or {})["fingerprint"]
    if record.get("fingerprint") and now != record["fingerprint"]:
        raise ZooError(
            f"The base weights in {checkpoint!r} differ from those the model was saved on (fingerprint {now[:12]}, was "
            f"{record['fingerprint'][:12]})."
        )
    return base


def base_at(saved: Mapping[str, Any] | None, place: str) -> dict[str, Any] | None:
    """What a saved config says of its bases, with the published checkpoint at another place, if one is given.

    Raises:
        ZooError: the model was made from no published checkpoint.
    """
    if not place:
        return dict(saved) if saved else None
    if not (saved or {}).get("model"):
        raise ZooError(
            f"model.base={place}: the model was made from no published checkpoint. Those of parts have options of "
            f"their own: vision.checkpoint=<folder>, llm.checkpoint=<folder>."
        )
    return {**saved, "model": {**saved["model"], "checkpoint": place, "revision": None}}  # type: ignore[dict-item, index]


def base_for(
    config: Any,
    folder: Path | None,
    *,
    fresh: Iterable[str] = (),
    dtype: Any = None,
    device_map: Any = None,
    bits: int = 0,
) -> Base | None:
    """Find where the base weights of a model come from; None where its parts bring their own.

    Args:
        config: of the model, as it was saved or composed.
        folder: published, or of a saved zoo model; None for a model that starts from its parts.
        fresh: parts that may start without weights.
        dtype: of the parameters; None or `auto` keeps that of the files.
        device_map: a device, or a dict from prefixes of names to devices.
        bits: 8 or 4 of the language model's layers; 0: all.

    Raises:
        ZooError: there is nothing that can be held in few bits, or not on this device.
    """
    record = (config.base or {}).get("model")
    base: Base | None
    if folder is not None and is_published(read_content(folder)):
        base = base_of(folder, *((record or {}).get(k) or "" for k in ("checkpoint", "revision")))
    elif record and not record.get("whole"):  # else all weights are in the folder
        base = base_from(record)
        base.lenient = folder is not None
    elif folder is not None and not any((config.slots or {}).get(k, {}).get("checkpoint") for k in ("vision", "llm")):
        base = Base(folder, dict(listing(weight_files(folder))), lenient=True)
    else:
        base = None
    if folder is not None:
        _require_filled(config, [*weight_files(folder), *(weight_files(base.folder) if base is not None else [])])
    if bits and (base is None or base.record is None):
        raise ZooError(f"bits={bits} is for published checkpoints, and for models that were saved on one.")
    if base is None:
        return None
    base.fresh = frozenset(PARTS) if "all" in set(fresh) else frozenset(fresh)
    base.dtype = dtype_of(dtype) or dtype_of(((base.record and record) or {}).get("dtype"))
    base.device, base.places = devices_of(device_map, {n: t.bytes for n, t in base.tensors.items()})
    if bits:
        from zoo.published.bits import require_bits

        if base.places:
            raise ZooError(f"bits={bits} takes one device, not a device_map of parts: device_map='cuda'.")
        require_bits(bits, base.device)
        base.bits = bits
    return base


def _require_filled(config: Any, files: Iterable[Path]) -> None:
    """Refuse slots that are far larger than the files beside them, before memory is taken for what is missing.

    A part with a checkpoint of its own is compared with that when it is built.
    """
    from zoo.composed.assembly import assemble

    slots = config.slots or {}
    with torch.device("meta"):
        parts = assemble(slots, vocab_size=config.text_vocab_size)
    own = [p for k in ("vision", "projector", "layout", "llm") if (p := getattr(parts, k)) is not None
           and not slots[k].get("checkpoint")]  # fmt: skip
    tensors = {
        id(t): t.numel()
        for part in [*own, *parts.pruner.values(), *parts.adapter.values()]
        if isinstance(part, torch.nn.Module)
        for t in [*part.parameters(), *part.buffers()]
    }
    require_plausible(sum(tensors.values()), set(files), "The config of the model")


def devices_of(device_map: Any, sizes: Mapping[str, int] | None = None) -> tuple[torch.device, dict[str, torch.device]]:
    """The device of a model, or of what a map does not name, and the map; `auto` is the accelerators that are there.

    Args:
        device_map: a device, `auto`, or a dict from prefixes of names to devices; None: the CPU.
        sizes: bytes of each weight, which `auto` shares out where there are several accelerators.
    """
    if isinstance(device_map, Mapping):
        places = places_of(device_map)
        rest = [d for d in places.values() if d.type != "cpu"] or list(places.values())
        return places.get("", rest[0]), places
    if device_map == "auto":
        count = torch.cuda.device_count()
        if count > 1 and sizes:
            places = spread(sizes, [torch.device("cuda", i) for i in range(count)])
            return torch.device("cuda", 0), places
        return torch.device("cuda" if count else "cpu"), {}
    try:
        return torch.device("cpu" if device_map is None else device_map), {}
    except (RuntimeError, TypeError) as error:
        raise ZooError(f"device_map must be auto, a device or a dict, got {device_map!r}.") from error


def placed(model: Any, device_map: Any, dtype: Any, base: Base | None = None) -> Any:
    """Bring what the base did not fill to its device and data type; what enters a module follows to several devices."""
    wanted = dtype_of(dtype)
    if wanted is not None:
        cast_parameters(model, wanted)
    if device_map is None:
        return model
    device, places = (base.device, base.places) if base is not None else devices_of(device_map)
    require_names(device_map if isinstance(device_map, Mapping) else {}, model)
    if len({device, *places.values()}) > 1:
        settle(model, places, device)
    else:
        torch.nn.Module.to(model, device=device)
    return model


def read_content(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of a model's folder; empty where there is none."""
    file = folder / name
    if not file.is_file():
        return {}
    return read_model_config(file)


def pixels_of(folder: Path) -> dict[str, Any]:
    """The values of the image processor that a published folder states, as transformers completes them."""
    stated = read_content(folder, "preprocessor_config.json")
    if not stated:
        stated = read_content(folder, "processor_config.json").get("image_processor", {})
    if not stated:
        return {}
    from zoo.vision.images.processors import processor_of

    if not stated.get("image_processor_type"):
        stated["image_processor_type"] = "CLIPImageProcessor"
    return json.loads(json.dumps(processor_of(stated).to_dict(), default=list))


def slots_in(folder: Path) -> dict[str, Any]:
    """Translate a published folder's config to slots."""
    content = read_content(folder)
    known = family_of(content, f"{folder}/config.json")
    return known.slots(parse(content, f"{folder}/config.json"), pixels_of(folder))


def require_same(slots: Mapping[str, Any], folder: Path, fresh: Iterable[str] = ()) -> None:
    """Refuse options that give other numbers than the checkpoint was trained for, although every weight would fit.

    Raises:
        ZooError: with each option, what it is and what the checkpoint states.
    """
    content = read_content(folder)
    hf = parse(content, f"{folder}/config.json")
    stated = family_of(content, str(folder)).slots(hf, pixels_of(folder))
    wrong = []
    allowed = set(fresh)
    for part in ("vision", "projector", "layout", "llm"):
        ours, theirs = slots.get(part) or {}, stated.get(part) or {}
        if may_start_fresh(part, allowed) or (part == "vision" and "projector" in allowed):
            continue
        if ours.get("name") != theirs.get("name"):
            wrong.append(f"{part}={ours.get('name')}, the checkpoint has {theirs.get('name')}")
        if not ours or ours.get("name") != theirs.get("name"):
            continue
        flat_ours, flat_theirs = _flat(ours, part), _flat(theirs, part)
        config = getattr(hf, {"vision": "vision_config", "llm": "text_config"}.get(part, ""), None)
        for key in flat_ours.keys() - flat_theirs.keys():  # the checkpoint has the default of its family
            flat_theirs[key] = plain(getattr(config, key.removeprefix("extra."), None))
        for key in sorted(flat_theirs):
            if (part, key.partition(".")[0]) not in _FREE and not _same(flat_ours.get(key), flat_theirs[key]):
                wrong.append(f"{part}.{key} is {flat_ours.get(key)!r}, the checkpoint states {flat_theirs[key]!r}")
    if wrong:
        raise ZooError(
            f"The parts are not those of the checkpoint in {folder}, and would give other numbers without a word:\n"
            + "\n".join(f"  {line}" for line in wrong[:12])
            + "\nName the part in `fresh` where that is meant."
        )


def _flat(node: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Options of a slot with their defaults, nested ones as `extra.hidden_act`."""
    from dataclasses import asdict

    from zoo.registry import config_of

    _, typed = config_of(part, node)
    flat: dict[str, Any] = {}
    for key, value in asdict(typed).items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        try:
            return abs(float(a) - float(b)) <= 1e-6 * max(1.0, abs(float(b)))
        except (TypeError, ValueError):
            return False
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
