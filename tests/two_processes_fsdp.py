"""Run by test_two_processes in both of them: the engine on parameters that FSDP2 keeps in halves."""

import gc
import json
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train_builders import config, recipe
from zoo.runs import checkpoint
from zoo.runs.processes import by_first
from zoo.storage import weights
from zoo.storage.atomic import remove, written_beside
from zoo.training.finish import save_model, score
from zoo.training.loop import Run

SHARDED = "parallel.shard=fsdp2"


def halves(run: Run) -> int:
    return sum(p.to_local().numel() < p.numel() for p in run.model.parameters())


def main(place: Path) -> None:
    stages, tokens = json.loads((place / "stages.json").read_text())
    name = f"r{dist.get_rank() if dist.is_initialized() else 0}"
    run = Run(config(recipe(place, stages, name), tokens, SHARDED, f"run.folder={place / 'run'}"))
    assert run.accelerator.num_processes == dist.get_world_size() == 2
    run.train()
    assert halves(run) > 10, "nothing is sharded"
    save_model(run)
    scored = score(run, limit=3, baselines=True)  # the processes run unequal numbers of passes
    if run.main:
        (place / "answers.json").write_text(json.dumps([scored.predictions, scored.summary()]))
    assert scored.lines and bool(scored.predictions) == run.main and not list(run.folder.path.glob(".answers*"))

    folder = run.folder.list_checkpoints()[-1]
    named = {f"model.{n}": p for n, p in run.model.named_parameters()}
    before = {n: weights.whole(p) for n, p in named.items()}
    with torch.no_grad():
        for p in named.values():
            p.zero_()
    checkpoint.load_weights(folder, named, "model.")
    assert all(weights.whole(p).equal(before[n]) for n, p in named.items())
    if run.main:
        with written_beside(place / "weights.pt") as beside:
            torch.save(before, beside)
    run.close()
    by_first(run.accelerator, lambda: remove(folder))  # as if it had been killed in the last stage
    again = Run(config(recipe(place, stages, name), f"resume={place / 'run'}"))
    again.train()
    assert halves(again) > 10
    assert all(weights.whole(p).equal(before[f"model.{n}"]) for n, p in again.model.named_parameters())
    again.close()
    # Leaving with collectives in flight aborts two times in five.
    del run, again, named
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def go_on(place: Path, words: list[str]) -> None:
    """Train in two groups from the start, and from a checkpoint of one process in quarters and in groups."""
    begun = [[*words, "parallel.replicate=2", f"run.folder={place / 'groups'}"]]
    resumed = [[f"resume={place / 'one_cut'}"], [f"resume={place / 'one_cut2'}", "parallel.replicate=2"]]
    for chosen in [*begun, *([*words[:2], *more] for more in resumed)]:
        run = Run(config(chosen))
        run.train()
        assert halves(run) > 10, "nothing is sharded"
        (mesh,) = {p.device_mesh.shape for p in run.model.parameters()}
        assert mesh == ((2, 2) if "parallel.replicate=2" in chosen else (4,))
        run.close()
    del run
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
