"""The features of a frozen encoder over a stage: found in a folder, or computed once and kept there.

`Recall` prepares the images of a sample, in loader workers too: one whose features are kept is neither decoded nor
resized. `KeptFeatures` puts the features of a batch together ahead of the forward pass, and encodes what is missing.
The features of a step are those that the store gives, also of images that it has no room for: a run that is resumed
has the numbers of one that was not.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.composed.image_path import checksum_of
from zoo.registry import ImageFeatures, Sample, UnlikeRows, ZooError, naming
from zoo.runs.kept_rows import apart, lengths_of, together
from zoo.settings.schema import FeaturesConfig
from zoo.storage.feature_store import FeatureStore
from zoo.storage.packed_features import pack, unpack, unpackable
from zoo.storage.shards import key_of
from zoo.storage.weights import library_versions
from zoo.vision.images.identity import identify
from zoo.vision.images.processors import FEATURES, Shown, cut_of, flat, has_several
from zoo.vision.images.video import Video

SHARDED = (
    "features.keep does not work with FSDP: all processes run a sharded encoder together, and here one may have images "
    "to encode while others have none. Set features.keep=live, or train with DDP."
)


def keep_features(
    config: FeaturesConfig,
    model: Any,
    processor: Any,
    *,
    stage: str,
    precision: str,
    sharded: bool,
    folder: Path,
    note: Callable[[str], None],
) -> "KeptFeatures | None":
    """Open the store of a stage's encoder; None where its features are computed in each pass.

    Args:
        config: of the run.
        model: with the parts trainable that the stage trains.
        processor: that prepares its images.
        stage: its name, for notes.
        precision: of the stage's products, bf16 or fp32.
        sharded: whether the model is divided over processes.
        folder: of all stores, where `config` names none.
        note: called with sentences for the user.

    Raises:
        ZooError: the run keeps features, and the model has no encoder, or one that is sharded.
    """
    vision = model.vision
    if config.keep == "live":
        return None
    if vision is None:
        raise ZooError(f"features.keep={config.keep} keeps an encoder's features, and the model has no encoder.")
    if any(weight.requires_grad for weight in vision.parameters()):
        note(f"stage {stage}: the encoder trains, and its features are not kept")
        return None
    if sharded:
        raise ZooError(SHARDED)
    about = {
        "encoder": dict(model.config.slots)["vision"],
        "weights": weights_hash(vision),
        "grid": vision.grid,
        "need": sorted(model.requested),
        "transform": asdict(processor.transform),
        "pictures": processor.pictures and processor.pictures.config,
        "videos": processor.videos and processor.videos.config,
        "keep": config.keep,
        "precision": precision,
        "attention": model.config.attention,
        "libraries": library_versions() | {name: version(name) for name in ("pillow", "torchvision")},
    }
    store = FeatureStore(Path(config.folder or folder), about, 1e9 * config.max_gb, note)
    there = f"{len(store):,} images are there" if len(store) else "none are there yet"
    note(f"stage {stage}: features are kept as {config.keep} in {store.folder}; {there}")
    return KeptFeatures(model, store, config.keep)


def weights_hash(module: torch.nn.Module) -> str:
    """Hash parameters and buffers of a module, with their names, dtypes and shapes."""
    whole = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            whole.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


class Recall:
    """Prepares the images of samples, without pixels where their features are kept.

    Args:
        store: of the encoder.
        processor: of the model.
        pixels: prepare pixels of all images, for a teacher with another encoder.
    """

    def __init__(self, store: FeatureStore, processor: Any, pixels: bool = False) -> None:
        self.store, self.processor, self.pixels = store, processor, pixels

    def __call__(self, sample: Sample) -> list[Shown]:
        """Prepare the images of a sample.

        Raises:
            RecordError: one cannot be decoded.
        """
        with naming(sample.data, sample.where, sample.id, "image"):
            images = flat(sample.images)
            return [self._shown(image, has_several(images)) for image in images]

    def _shown(self, image: Any, several: bool) -> Shown:
        content, image, where = identify(image)
        made = self.processor.pictures is not None  # such a processor may cut an image that is alone, and not others
        key = key_of(*content, bytes([several and made])) if content else b""
        found = self.store.find(key) if key else None
        if found is not None and not self.pixels:
            apart = made or isinstance(image, Video) or self.processor.transform.also  # of which a layout gets a cut
            plain = self.processor.layout is None or not apart
            return Shown(torch.empty(0), found.cut, key, found.tensors, plain)
        picture = self.processor.pixels_of(image, several, where=where)
        plain = isinstance(picture, Tensor)
        pixels = picture[None] if plain else picture.pixels
        return Shown(pixels, cut_of(picture), key, None if found is None else found.tensors, plain)


class KeptFeatures:
    """Puts together the features of batches, and encodes what is not kept.

    Args:
        model: with a frozen encoder.
        store: of it.
        keep: dtype of the store.
    """

    def __init__(self, model: Any, store: FeatureStore, keep: str) -> None:
        self.model, self.store, self.keep = model, store, keep
        self.native = bool(model.vision.native)
        self.grid = None if self.native else model.vision.token_grid
        self.dtypes: dict[str, str] = {}  # of the encoder's tensors; empty until it ran
        self.found = self.encoded = 0  # images so far

    def __str__(self) -> str:
        return f"{self.found:,} found, {self.encoded:,} encoded; {self.store.size / 1e9:.3g} GB in {self.store.root}"

    @torch.no_grad()
    def fill(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with the features of its images, as `encoded` of the model's forward, in place of pixels.

        Args:
            batch: of `Recall`'s images, on the model's device.

        Raises:
            ZooError: the encoder's features cannot be kept.
        """
        shown = batch.get(FEATURES)
        if shown is None:
            return dict(batch)
        own = {name: value for name, value in batch.items() if name not in (FEATURES, "pixel_values")}
        whole: Mapping[str, Tensor] = shown["kept"]
        if not all(shown["there"]):
            parts = self._parts(batch, shown)
            device = batch["pixel_values"].device
            with torch.autocast(device.type, enabled=False):  # on a CPU, in bf16, it refuses to join scales in float16
                whole = {name: torch.cat([part[name].to(device) for part in parts]) for name in parts[0]}
        else:
            self.found += len(shown["there"])
        image: Any = unpack(whole, self.dtypes or self.store.dtypes, self.grid)
        image = together(image, shown["cuts"]) if self.native else image
        return own | {"encoded": (image, None, None, None)}

    def _parts(self, batch: Mapping[str, Any], shown: Mapping[str, Any]) -> list[Mapping[str, Tensor]]:
        """Return the packed rows of each image, of a batch in which some are not kept yet."""
        lengths = lengths_of(shown["cuts"], self.native)
        rows = [n for n, there in zip(lengths, shown["there"], strict=True) if there]
        kept = {name: iter(value.split(rows)) for name, value in shown["kept"].items()}
        parts: list[Mapping[str, Tensor] | None] = [
            {name: next(each) for name, each in kept.items()} if there else None for there in shown["there"]
        ]
        for i, key in enumerate(shown["keys"]):  # kept since the batch was made, which is some steps ahead
            if parts[i] is None and key and (late := self.store.find(key)) is not None:
                parts[i] = late.tensors
        missing = [i for i, part in enumerate(parts) if part is None]
        self.found, self.encoded = self.found + len(parts) - len(missing), self.encoded + len(missing)
        pixels = batch["pixel_values"].split(shown["pixels"])
        # Each by itself on the CPU, where the last bit of a product may depend on the size of the batch: the features
        # are a function of the image alone then. Elsewhere one by one would take many times as long.
        alone = batch["pixel_values"].device.type == "cpu"
        for group in [[i] for i in missing] if alone else [missing] if missing else []:
            cuts = [shown["cuts"][i] for i in group] if "cuts" in batch else None
            packed, self.dtypes = self._packed(*self.model.features_of(torch.cat([pixels[i] for i in group]), cuts))
            each = {name: iter(value.split([lengths[i] for i in group])) for name, value in packed.items()}
            for i in group:
                own = parts[i] = {name: next(values) for name, values in each.items()}
                if shown["keys"][i]:
                    self.store.add(shown["keys"][i], shown["cuts"][i], own, self.dtypes)
        return [part for part in parts if part is not None]

    def _packed(self, image: ImageFeatures | UnlikeRows, pixels: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        if isinstance(image, UnlikeRows):
            return pack(apart(image, pixels), self.keep)
        if (what := unpackable(image, self.grid)) is not None:
            raise ZooError(
                f"The features of {type(self.model.vision).__name__} cannot be kept, since they have {what}: set "
                "features.keep=live."
            )
        image.checksum = checksum_of(pixels)
        return pack(image, self.keep)
