"""Trackers of accelerate beside metrics.jsonl (`log=[tensorboard,wandb]`), checked before a run starts."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.registry import ZooError, unknown

# Names in accelerate -> packages, one of which must be installed; messages recommend the first.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
}
FOLDER = "trackers"  # in the run folder, for those that write files


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that would log nothing.

    Raises:
        ZooError: the tracker does not exist, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise unknown("tracker (log)", name, PACKAGES)
        if not any(_is_installed(package) for package in PACKAGES[name]):
            raise ZooError(
                f"log={name} needs a package that is not installed: pip install {PACKAGES[name][0]}. "
                "The figures of every step are in metrics.jsonl of the run folder in any case."
            )


def start_trackers(accelerator: Any, names: Sequence[str], folder: Path, step: int, config: Mapping[str, Any]) -> None:
    """Start the trackers of a run that continues after `step`."""
    from accelerate.tracking import filter_trackers

    if not names:
        return
    directory = folder / FOLDER
    accelerator.project_configuration.project_dir = str(folder)
    accelerator.project_configuration.logging_dir = str(directory)
    accelerator.log_with = filter_trackers(list(names), str(directory))
    own = {
        # A run that was killed after its last checkpoint runs those steps again: TensorBoard hides the first ones.
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": folder.name, "dir": str(folder)},
        "trackio": {"name": folder.name},
    }
    accelerator.init_trackers("zoo", config=dict(config), init_kwargs=own)


def send_pictures(accelerator: Any, name: str, pictures: Sequence[Any], step: int) -> list[str]:
    """Send pictures to the trackers that take them; return the names of those that do not.

    Args:
        accelerator: of the run, whose first process calls this.
        name: of the pictures.
        pictures: of PIL.
        step: of the run.
    """
    import numpy as np

    refused = []
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for number, picture in enumerate(pictures):  # heights differ, so not in one call
                tracker.writer.add_image(f"{name}/{number}", np.asarray(picture), step, dataformats="HWC")
        elif tracker.name == "trackio":
            import trackio

            tracker.log({f"{name}/{i}": trackio.Image(picture) for i, picture in enumerate(pictures)}, step=step)
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({name: list(pictures)}, step=step)
        else:
            refused.append(tracker.name)
    return refused


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    # A folder of that name in the working folder, as `wandb` makes, is found as a namespace package without an origin.
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
