"""Tiny checkpoints of every source; a short training on each; and what its saved folder gives back.

Training and saving run in this process or in a group of two; what the trained model answered is noted beside the saved
one, and compared afterwards.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.benches.groups import in_group
from zoo.registry import ZooError

_PARTS = ("vision={vision}", "vision.checkpoint={root}/{folder}", "llm=hf", "llm.checkpoint={root}/{llm}")
_SMALL = ("vision.width=32", "vision.heads=2", "vision.depth=2", "llm.hidden_size=32", "llm.num_heads=2",
          "llm.num_layers=2", "llm.intermediate_size=64", "tokenizer.vocab_size=320")  # fmt: skip
_COLOURS = {"red": (220, 0, 0), "green": (0, 200, 0), "blue": (20, 20, 230), "grey": (120, 120, 120)}


def _parts(vision: str, folder: str, llm: str, projector: str) -> tuple[str, ...]:
    words = (word.replace("{vision}", vision).replace("{folder}", folder).replace("{llm}", llm) for word in _PARTS)
    return (*words, f"projector={projector}")


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        words: that compose the model; `{root}` is the folder of the checkpoints.
        own: beginnings of the names of weights that no checkpoint gives.
        family: published layout to export in; empty: that of the checkpoint, or none.
        train: what trains; the first block of encoder and decoder stays frozen.
    """

    words: tuple[str, ...]
    own: tuple[str, ...] = ("projector.",)
    family: str = "llava"
    train: str = "vision, projector, llm"


SOURCES = {
    "hf": Source(_parts("hf", "clip", "llama", "mlp")),
    "hf tied": Source(_parts("hf", "siglip", "qwen2", "mlp")),
    "timm": Source(_parts("timm", "timm", "llama", "linear")),
    "open_clip": Source(_parts("open_clip", "open_clip", "llama", "linear")),
    "experts": Source(_parts("hf", "clip", "mixtral", "mlp")),
    "published": Source(("model=dir:{root}/llava",), own=()),
    "published lora": Source(("model=dir:{root}/llava", "adapter=[lora]"), own=("lora",), train="adapter, projector"),
    "saved": Source(("model=dir:{root}/saved",), own=()),
    "preset": Source((*_SMALL, "model=scenes_tiny"), own=("",)),
    "published pissa": Source(
        ("model=dir:{root}/llava", "adapter=[peft]", "adapter.peft.method=pissa", "adapter.peft.options.r=2"),
        own=("lora", "adapter.peft."),
        train="adapter, projector",
    ),
}
OPTIMIZERS = ("adamw", "muon_adamw")
HOW = ("one", "two", "sharded")  # processes; `sharded`: two that share the parameters out


@dataclass
class Found:
    """What a saved folder gives back.

    Attributes:
        saved: number of weights in the folder.
        weights: number of weights of the model.
        loss: largest difference to the trained model's over both ways of loading.
        logits: the same.
        lost: names that changed and are not in the folder.
        spare: names that are in the folder and did not change.
        exported: largest difference of the logits of transformers' class on the exported folder; None: refused.
        refusal: why it was not exported.
    """

    saved: int
    weights: int
    loss: float
    logits: float
    lost: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    exported: float | None = None
    refusal: str = ""


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def write_checkpoints(root: Path) -> None:
    """Write the checkpoints of all sources, and four records with a picture each."""
    from PIL import Image

    from zoo.benches.llava import Sizes
    from zoo.benches.published import write
    from zoo.text.tokenizer import train_tokenizer

    torch.manual_seed(0)
    lines = []
    for colour, rgb in _COLOURS.items():
        Image.new("RGB", (32, 32), rgb).save(root / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"a {colour} square"}]
        lines.append(json.dumps({"id": colour, "image": f"{colour}.png", "conversations": said}))
    (root / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer([f"what is it? a {c} square" for c in _COLOURS] * 4, 320, "plain")
    _write_encoders(root)
    _write_language_models(root, tokenizer)
    sizes = Sizes(image_size=32, patch_size=8, vision_width=32, vision_depth=3, vision_heads=2, text_width=32,
                  text_depth=2, text_heads=2, intermediate=64, vocab=352)  # fmt: skip
    write(sizes, root / "llava", torch.float32)
    _write_saved(root)


def _write_encoders(root: Path) -> None:
    import open_clip
    import timm
    import transformers as t
    from safetensors.torch import save_file
    from timm.models import save_for_hf

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    sizes |= {"image_size": 32, "patch_size": 8}
    t.CLIPVisionModel(t.CLIPVisionConfig(**sizes)).save_pretrained(root / "clip")
    t.SiglipVisionModel(t.SiglipVisionConfig(**sizes)).save_pretrained(root / "siglip")
    arguments: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 0,
    }
    (root / "timm").mkdir()
    vit: Any = timm.create_model("vit_tiny_patch16_224", **arguments)
    save_for_hf(vit, str(root / "timm"), safe_serialization=True, model_args=arguments)
    for pickled in (root / "timm").glob("*.bin"):
        pickled.unlink()
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (root / "open_clip").mkdir()
    state = {key: value.contiguous().clone() for key, value in open_clip.CLIP(**architecture).state_dict().items()}
    save_file(state, root / "open_clip" / "open_clip_model.safetensors")
    content = json.dumps({"model_cfg": architecture, "preprocess_cfg": {}})
    (root / "open_clip" / "open_clip_config.json").write_text(content, encoding="utf-8")


def _write_language_models(root: Path, tokenizer: Any) -> None:
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8, "bos_token_id": None}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for folder, kind, more in (
        ("llama", "Llama", {}),
        ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
        ("mixtral", "Mixtral", {"num_local_experts": 4}),
    ):
        config = getattr(t, f"{kind}Config")(**sizes, **more)
        getattr(t, f"{kind}ForCausalLM")(config).save_pretrained(root / folder)
        tokenizer.save_pretrained(root / folder)


def _write_saved(root: Path) -> None:
    """A zoo model that was saved on the published one, with a weight of its own."""
    from zoo.loading.build import load

    model, processor = load(f"dir:{root / 'llava'}", device="cpu")
    assert model.projector is not None
    with torch.no_grad():
        next(model.projector.parameters()).add_(0.01)
    model.save_pretrained(root / "saved")
    processor.save_pretrained(root / "saved")


# ---- training and saving, in every process -------------------------------------------------------------------------


def train(root: Path, source: str, optimizer: str, how: str = "one") -> None:
    """Train on a source, save, and note what changed and what the trained model says.

    Args:
        root: with the checkpoints.
        source: one of `SOURCES`.
        optimizer: one of `OPTIMIZERS`.
        how: one of `HOW`: `sharded` keeps a share of each parameter on each process.
    """
    from safetensors.torch import save_file

    from zoo.runs.progress import Display
    from zoo.storage.weights import state_of
    from zoo.training.finish import save_model
    from zoo.training.loop import Run

    place = place_of(root, source, optimizer, how)
    run = Run(_config(root, place, SOURCES[source], optimizer), display=Display(silent=True))
    start = {name: tensor.clone() for name, tensor in state_of(run.model).items()}
    if how == "sharded":
        _shard(run.model)
    run.train()
    save_model(run)
    answer = answer_of(run.model, run.processor, root)
    after = state_of(run.model)
    if run.main:
        changed = [n for n, t in after.items() if not torch.equal(t, start[n]) or _is_own(n, SOURCES[source])]
        (place / "changed.json").write_text(json.dumps([changed, len(after)]), encoding="utf-8")
        save_file(answer, place / "answer.safetensors")
    run.accelerator.wait_for_everyone()
    run.close()


def place_of(root: Path, source: str, optimizer: str, how: str) -> Path:
    """The folder of a run."""
    return root / "runs" / "-".join([*source.split(), optimizer, how])


@torch.no_grad()
def answer_of(model: Any, processor: Any, root: Path) -> dict[str, Tensor]:
    """The loss and the logits of a model on a record."""
    model.eval()
    batch = batch_of(processor, root)
    out = model(**batch, all_logits=True)
    return {"loss": out.losses["answer"].reshape(1).clone(), "logits": out.logits.clone()}


def batch_of(processor: Any, root: Path) -> dict[str, Any]:
    """One record, as the model takes it."""
    from zoo.registry import build

    dataset = build("dataset", {"name": "chat_json", "file": str(root / "data.jsonl")})
    return processor.collate([processor.encode(dataset.get(0))])


def _is_own(name: str, source: Source) -> bool:
    return any(f"{own}_" in name if own == "lora" else name.startswith(own) for own in source.own)


def _config(root: Path, place: Path, source: Source, optimizer: str) -> Any:
    from zoo.settings.config import compose

    recipes = root / "conf" / place.name / "recipe"
    recipes.mkdir(parents=True, exist_ok=True)
    common = f"batch_size: 4, lr: 0.01, schedule: constant, checkpoint_every: 0, optimizer: {optimizer}"
    (recipes / "roundtrip.yaml").write_text(
        f"""# @package _global_
defaults:
  - override /data: [chat_json]
data: {{chat_json: {{file: {root}/data.jsonl}}}}
device: cpu
precision: fp32
stages:
  tune: {{steps: 2, train: [{source.train}], freeze: ["*s.0.*"], {common}}}
""",
        encoding="utf-8",
    )
    words = [word.replace("{root}", str(root)) for word in source.words]
    return compose("train", ["recipe=roundtrip", *words, f"run.folder={place}"], str(recipes.parent))


def _shard(model: Any) -> None:
    """Keep a share of each parameter on each process, as accelerate does on CUDA; on a CPU it gives DDP instead."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.llm.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


# ---- comparing, afterwards -----------------------------------------------------------------------------------------


def compare(root: Path, source: str, optimizer: str, how: str = "one") -> Found:
    """Load what was saved, in both ways, and export it."""
    from safetensors.torch import load_file

    from zoo.composed.model import ZooModel
    from zoo.loading.build import load
    from zoo.storage.safetensors_file import listing
    from zoo.storage.weights import weight_files

    place = place_of(root, source, optimizer, how)
    wanted = load_file(place / "answer.safetensors")
    changed, weights = json.loads((place / "changed.json").read_text(encoding="utf-8"))
    names = set(listing(weight_files(place / "model")))
    model, processor = load(f"dir:{place}", device="cpu")
    roads = [answer_of(m, processor, root) for m in (model, ZooModel.from_pretrained(place / "model"))]
    loss, logits = (max(_far(road[key], wanted[key]) for road in roads) for key in ("loss", "logits"))
    found = Found(len(names), weights, loss, logits, sorted(set(changed) - names), sorted(names - set(changed)))
    try:
        found.exported = _export(model, processor, root, place / "exported", SOURCES[source].family)
    except ZooError as error:
        found.refusal = " ".join(str(error).split())
    return found


@torch.no_grad()
def _export(model: Any, processor: Any, root: Path, folder: Path, family: str) -> float:
    """Export; how far the logits of transformers' own class are from ours."""
    from transformers import AutoModelForImageTextToText

    from zoo.published.export import export

    batch = batch_of(processor, root)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    ours = model(**inputs).logits
    export(model, processor, folder, family=family)
    theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return _far(theirs(**inputs).logits, ours)


def _far(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max()) if one.shape == two.shape else float("inf")


def train_in_two(root: Path, cases: Sequence[tuple[str, str, str]], context: Any = None) -> None:
    """Run the trainings that `(source, optimizer, how)` name, all in one group of two processes.

    Args:
        root: folder of `write_checkpoints`.
        cases: arguments of `train`.
        context: of multiprocessing, as `in_group` takes it.

    Raises:
        ZooError: a process failed; what it wrote is on the terminal.
    """
    in_group(2, train_all, str(root), [list(case) for case in cases], context=context)


def train_all(root: str, cases: Sequence[Sequence[str]]) -> None:
    """Run these trainings, in this process of several."""
    for case in cases:
        train(Path(root), *case)
