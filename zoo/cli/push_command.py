"""`zoo push MODEL org/name`: put a saved or exported model on the Hugging Face hub."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from zoo.cli.export_command import model_word
from zoo.registry import ZooError
from zoo.registry.foreign import read_json, read_text
from zoo.settings import model_names
from zoo.storage.weights import weight_files
from zoo.text.command_line import Parser
from zoo.text.sizes import bytes_text

# What a model is loaded from. Anything else in its folder is left out: optimisers, logs, notes, keys.
KEPT = (
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "*.jinja",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "model*.safetensors", "model.safetensors.index.json", "*.gguf", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip
FOLDERS = ("peft", "encoders", "text_tower", "additional_chat_templates")  # below a model's, with such files too
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
SEARCHED = ("*.md", "*config.json", "*.jinja", "*.txt", "chat_template.json", "*LICENSE", "*NOTICE")
# A model without one of these is not whole. A link that leads out of its folder is not followed: it may lead anywhere.
NEEDED = re.compile(r"config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors|.+\.gguf")
# An older set of weights would be read instead of a new one.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "*.gguf")


@dataclass
class Parcel:
    """What is uploaded.

    Attributes:
        folder: of the model.
        files: name in the repository -> a file, or its content where that differs.
        left_out: names that stay here.
    """

    folder: Path
    files: dict[str, Path | bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        what = self.files[name]
        return len(what) if isinstance(what, bytes) else what.stat().st_size

    def text(self, name: str) -> str:
        """Content of a text file; empty where it is not among the files."""
        what = self.files.get(name, b"")
        return (what if isinstance(what, bytes) else what.read_bytes()).decode("utf-8", "replace")


def main(words: Sequence[str]) -> int:
    """Collect the files, show them, and upload them in one commit unless `--dry-run`."""
    args = _parsed(words)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.repository) or ".." in args.repository:
        raise ZooError(f"{args.repository!r} is not the name of a repository: write <org>/<name>.")
    parcel = parcel_of(folder_of(model_word(args.model), args.model), args.repository)
    require_whole(parcel)
    place = f"{args.repository}{f' at {args.revision}' if args.revision else ''}{', as a pull request' * args.pr}"
    print(f"{'Would push' if args.dry_run else 'Pushing'} {parcel.folder} to {place}:")
    print("\n".join(shown(parcel)))
    if args.dry_run:
        print("\n".join(["", "The head of the card:", *head_of(parcel.text("README.md"))]))
        return 0
    print(f"Pushed: {upload(parcel, args)}")
    if not args.pr:
        lines = load_lines(parcel, args.repository, args.revision)
        print("\n".join(["Load it with:", *(f"    {line}" for line in lines)]))
    return 0


def folder_of(name: str, typed: str) -> Path:
    """Return the folder of a model's files.

    Raises:
        ZooError: there is none, or it is on the hub already.
    """
    kind, _, place = name.partition(":")
    if kind == "hub":
        raise ZooError(f"{typed!r} is on the hub already.")
    if name == "last":
        return model_names.newest(Path("runs"))
    if kind == "dir":
        folder = Path(place).expanduser()
        if folder.is_dir() and any(folder.glob("*.gguf")):
            return folder
        return model_names.content_of(folder, name)[0]
    folder = Path(str(package_files("zoo.model_cards"))) / name
    if re.fullmatch(r"\w+", name) and (folder / "config.json").is_file():
        return folder
    raise ZooError(
        f"{typed!r} is not a folder with a model: write it to one first, zoo export {shlex.quote(typed)} OUT."
    )


def parcel_of(folder: Path, repository: str) -> Parcel:
    """Choose the files of a model, and change what names this machine: paths in its config, load lines of its card.

    Raises:
        ZooError: the model needs weights of a folder on this machine or is a link to them, or a file holds a key.
    """
    parcel = Parcel(folder)
    root = folder.resolve()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        inside = path.is_file() and path.resolve().is_relative_to(root)  # a link may lead anywhere
        known = "/" not in name or name.partition("/")[0] in FOLDERS
        if inside and known and any(fnmatch(path.name, pattern) for pattern in KEPT):
            parcel.files[name] = path
        elif known and path.is_symlink() and NEEDED.fullmatch(path.name):
            raise ZooError(
                f"{str(path)!r} is a link that leads out of the folder: put a copy of the file in its place."
            )
        else:
            parcel.left_out.append(name)
    card = Path(str(package_files("zoo.model_cards"))) / f"{folder.name}.md"
    if "README.md" not in parcel.files and card.parent == folder.parent and card.is_file():  # of a shipped model
        parcel.files["README.md"] = card
    for name in parcel.files:
        if any(fnmatch(name, pattern) for pattern in SEARCHED) and (found := SECRETS.search(parcel.text(name))):
            raise ZooError(f"{name} holds what looks like a key ({found[0][:6]}...): remove it before it is public.")
    if "config.json" in parcel.files:
        config = read_json(folder / "config.json")
        _require_no_local_base(config, folder)
        if (clean := without_paths(config)) != config:
            parcel.files["config.json"] = (json.dumps(clean, indent=2, sort_keys=True) + "\n").encode()
    if (card := folder / "README.md").is_file():
        text = read_text(card)
        if (changed := loaded_from(text, repository)) != text:
            parcel.files["README.md"] = changed.encode()
    return parcel


def require_whole(parcel: Parcel) -> None:
    """Refuse a model without all files of its weights.

    Raises:
        ZooError: there are none, or the index names one that is not there.
    """
    if any(name.endswith(".gguf") for name in parcel.files):
        return
    gone = [file.name for file in weight_files(parcel.folder) if file.name not in parcel.files]
    if gone:
        raise ZooError(f"{str(parcel.folder)!r} lacks weights that its index names: {', '.join(gone[:4])}.")


def _require_no_local_base(config: Any, folder: Path) -> None:
    bases = config.get("base") if isinstance(config, Mapping) else None
    for part, entry in (bases if isinstance(bases, Mapping) else {}).items():
        place = str(entry.get("checkpoint", "")) if isinstance(entry, Mapping) else ""
        if _is_path(place) and not entry.get("whole"):
            raise ZooError(
                f"The weights of {part} are in {place!r}, a folder of this machine, and the model holds what differs. "
                f"Write all of it first: zoo export {shlex.quote(f'dir:{folder}')} OUT --format safetensors; then "
                "zoo push OUT."
            )


def without_paths(value: Any) -> Any:
    """Return a config with paths of this machine shortened to their last name; nothing is loaded from them."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Whether a text is a path of this machine; names of the hub and of packages are not."""
    return text.startswith(("/", "~", "./", "../")) and len(text) > 1 and "\n" not in text


def loaded_from(card: str, repository: str) -> str:
    """Return a card whose load lines name a repository, and no path of this machine; one that a person wrote stays."""
    from zoo.composed.card import MARK

    if MARK not in card:
        return card
    card = re.sub(r'"plugins=\[([^"\n]*)\]"', _plugins_alone, card)
    card = re.sub(r'zoo\.load\("dir:[^"\n]*"', f'zoo.load("hub:{repository}"', card)
    return re.sub(r'from_pretrained\("[^"\n]*"', f'from_pretrained("{repository}"', card)


def _plugins_alone(found: re.Match[str]) -> str:
    return f'"plugins=[{",".join(without_paths(found[1].split(",")))}]"'


def shown(parcel: Parcel) -> Iterator[str]:
    """Lines with the files and their sizes, and what is left out."""
    width = max(map(len, parcel.files), default=0)
    for name in parcel.files:
        yield f"  {name:<{width}}  {bytes_text(parcel.size(name)):>7}"
    yield f"  {len(parcel.files)} files, {bytes_text(sum(map(parcel.size, parcel.files)))} in all"
    if parcel.left_out:
        names = ", ".join(parcel.left_out[:6])
        more = f" and {len(parcel.left_out) - 6} more" if len(parcel.left_out) > 6 else ""
        yield f"  left out: {names}{more}"
    if "README.md" not in parcel.files:
        yield "  It has no card (README.md); zoo export writes one."


def head_of(card: str) -> list[str]:
    """Return the metadata of a card, and its first lines."""
    lines = card.splitlines()
    end = lines.index("---", 1) + 1 if lines[:1] == ["---"] and "---" in lines[1:] else 0
    return [f"  {line}".rstrip() for line in lines[: end + 8]] or ["  none"]


def load_lines(parcel: Parcel, repository: str, revision: str) -> list[str]:
    """Return the lines that load the repository."""
    at = f', revision="{revision}"' if revision else ""
    if any(name.endswith(".gguf") for name in parcel.files):
        return [f"hf download {repository}{f' --revision {revision}' if revision else ''}"]
    config = json.loads(parcel.text("config.json"))
    if "slots" in config:
        at = f', "model.revision={revision}"' if revision else ""
        return ["import zoo", f'model, processor = zoo.load("hub:{repository}"{at})']
    return [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        f'model = AutoModelForImageTextToText.from_pretrained("{repository}"{at})',
        f'processor = AutoProcessor.from_pretrained("{repository}"{at})',
    ]


def upload(parcel: Parcel, args: Any) -> str:
    """Make the repository if needed, and upload in one commit; return the address.

    Raises:
        ZooError: there is no token, or the hub refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ZooError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or try --dry-run.")
    if not get_token():
        raise ZooError("There is no token of the hub here: run `hf auth login`, or set HF_TOKEN to one that may write.")
    api, where = HfApi(), {"repo_id": args.repository}
    try:
        api.create_repo(**where, private=True if args.private else None, exist_ok=True)
        if args.revision and not args.pr:
            api.create_branch(**where, branch=args.revision, exist_ok=True)
        there = api.list_repo_files(**where, revision=args.revision or None)
        gone = [n for n in there if any(fnmatch(n, p) for p in WEIGHTS) and n not in parcel.files and "/" not in n]
        add = [CommitOperationAdd(name, what) for name, what in parcel.files.items()]
        done = api.create_commit(
            **where,
            operations=[*(CommitOperationDelete(name) for name in gone), *add],
            commit_message=args.message,
            revision=args.revision or None,
            create_pr=args.pr,
        )
    except (
        OSError,
        ValueError,
        HTTPError,
    ) as error:  # of the library: no access, a name that it refuses, a lost connection
        first = " ".join(str(error).split())[:400]
        raise ZooError(f"The hub did not take {args.repository!r}: {first}") from error
    return str(done.pr_url if args.pr else f"{api.endpoint}/{args.repository}")


def _parsed(words: Sequence[str]) -> Any:
    examples = """zoo push last me/model --dry-run
    zoo push last me/model --private"""
    parser = Parser("push", "Put a saved or exported model on the Hugging Face hub.", examples)
    parser.add_argument("model", help="a run, last, or a folder that was saved or that zoo export wrote")
    parser.add_argument("repository", help="<org>/<name>; made if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="show what would go, with sizes and the card's head")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", default="", metavar="name", help="branch to push to; made if it does not exist")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead of pushing to the branch")
    parser.add_argument("--message", default="Upload a model of zoo", metavar="text", help="of the commit")
    args = parser.read(words)
    if args.pr and args.revision:
        raise ZooError("--pr opens a pull request against the main branch: leave --revision out.")
    return args
