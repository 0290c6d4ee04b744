"""The model of a run as training begins: composed, compared with zoo.lock, restored, shared out over the processes."""

from pathlib import Path
from typing import Any

import torch

from zoo.composed.masters import widen, widen_names
from zoo.loading.build import build
from zoo.registry.foreign import read_object
from zoo.runs import checkpoint
from zoo.runs.processes import by_first
from zoo.runs.replay import adapters_of, changes_since, config_hash, data_facts, plugin_hashes
from zoo.runs.resume import require_same_start
from zoo.runs.sharding import gathers_short, shard
from zoo.runs.tensor_parallel import require_divisible
from zoo.storage.atomic import written_beside
from zoo.storage.weights import fingerprint
from zoo.training.calibration import begins_in, keep_beginning
from zoo.training.step import reseed


def compose_model(run: Any) -> tuple[Any, Any]:
    """Compose the model, with the tokenizer of the run's folder, which the first process saves there.

    A trained tokenizer depends on the data; a resumed run must not train it again.
    """
    made = run.folder.path / "tokenizer"
    by_first(run.accelerator, lambda: _make_tokenizer(run, made))
    model, processor = _build_model(run, made)
    by_first(run.accelerator, lambda: _note_start(run, model))
    return model, processor


def _make_tokenizer(run: Any, made: Path) -> None:
    if not made.is_dir():
        with run.folder.writing("the tokenizer"), written_beside(made, folder=True) as beside:
            run.source.find_tokenizer(run.data.texts()).save_pretrained(beside)


def _note_start(run: Any, model: Any) -> None:
    if run.folder.lock.is_file():
        require_same_start(run.folder, model, facts_of(run, model) | {"adapters": adapters_of(run.cfg)})
        for line in changes_since(run.folder, run.data, run.cfg.plugins):
            run.display.note(f"Since the run began: {line}.")
    else:
        run.folder.write_lock(**facts_of(run, model))


def facts_of(run: Any, model: Any) -> dict[str, Any]:
    """Return what zoo.lock holds beside versions: number of processes, plugins, and weights the run began on."""
    facts: dict[str, Any] = {"processes": run.accelerator.num_processes, "plugins": list(run.cfg.plugins)}
    facts |= {"config": config_hash(run.folder), **_begun(run)}
    facts["base"] = model.config.base
    facts |= {"parameters": sum(p.numel() for p in model.parameters()), "image_tokens": model.num_image_tokens}
    if run.source.folder is not None:
        facts["started_from"] = {"model": run.source.name, "fingerprint": fingerprint(run.source.folder)}
    return facts


def _begun(run: Any) -> dict[str, Any]:
    """Return what the run found when it began: lengths and hashes of the data sets, adapters, files of plugins."""
    noted = read_object(run.folder.lock) if run.folder.lock.is_file() else None
    adapters = adapters_of(run.cfg) if noted is None else noted.get("adapters")
    data = (noted or {}).get("data")
    found = {"data": data if isinstance(data, dict) else data_facts(run.data)}
    files = plugin_hashes(run.cfg.plugins) if noted is None else noted.get("plugin_files")
    return found | ({"adapters": adapters} if adapters else {}) | ({"plugin_files": files} if files else {})


def _build_model(run: Any, tokenizer: Path) -> tuple[Any, Any]:
    reseed(run.cfg.seed, 0, -1)  # new weights are a function of the seed alone, the same in every process
    device = run.accelerator.device
    if getattr(run.accelerator, "is_fsdp2", False):
        device = torch.device("cpu")  # where values stay in files until each process reads its share of them
    model, processor = build(run.source, tokenizer_folder=tokenizer, device=device, masters=True)
    return model, processor


def share_out(run: Any) -> None:
    """Share the model out over the processes, and widen in the shares what any stage trains.

    Now, since a process holds no more than its share then; and FSDP2 takes the data types of its first pass.
    """
    run.gather_short = gathers_short(run.parallel, map(run.precision_of, run.stages.values()))
    begun = list(run.stages.values())[run.progress.stage :][:1]
    run.model.detach_only([name for stage in begun for name in stage.detach])
    require_divisible(run.model, run.parallel.tensor, run.stages)
    shard(run.accelerator, run.model, run.parallel, short=run.gather_short)
    for stage in run.stages.values():
        if (stage.master_weights or run.cfg.master_weights) == "fp32":
            run.model.detach_only(stage.detach)
            run.model.set_trainable(stage.train, stage.freeze)
            widen(run.model, run.precision_of(stage))


def restore(run: Any, newest: Path) -> None:
    """Load the checkpoint's weights into the model."""
    stage, step = run.progress.stage, run.progress.step
    # Names of weights depend on which adapters are attached, so the stage's adapters come first.
    run.model.detach_only([] if run.is_trained else list(run.stages.values())[stage].detach)
    widen_names(run.model, checkpoint.names_in_float32(newest, "model."))  # the checkpoint has master weights
    named = run.named_tensors()
    checkpoint.load_weights(newest, named, "model.")
    # `start` copies weights of the LLM (into upcycled experts, say), which must be the trained ones; it overwrites
    # those of the adapter, so the checkpoint is loaded once more.
    if start_adapters(run, range(1, stage + (step > 0))):
        checkpoint.load_weights(newest, named, "model.")


def start_adapters(run: Any, stages: range) -> bool:
    """Start the adapters whose first stage is among these, other than stage 0; return whether there are any.

    Such adapters copy weights that earlier stages trained.
    """
    found = False
    for name, adapter in run.model.adapter.items():
        begins = begins_in(name, run.stages)
        if begins and begins in stages:
            reseed(run.cfg.seed, begins, -4)
            adapter.start()
            keep_beginning(run, name)
            found = True
    return found
