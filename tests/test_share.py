"""`zoo export`: what it writes loads by the lines that it prints, gives the same answers, and is whole or not there."""

import shutil
from pathlib import Path

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.test_export import CLIP, LLAMA, MLP, TALKS, ask, composed
from zoo.checking.checker import RefusedError
from zoo.cli.entry import main
from zoo.registry import ZooError

CHAT = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PHOTOS = [build.photo(40, 56), build.photo(70, 30, seed=1)]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A saved model with LoRA in the folder `mine`, which is the working folder's, and what it gives."""
    monkeypatch.chdir(tmp_path)
    model, processor = composed([*CLIP, *MLP, *LLAMA, "adapter=[lora]", "adapter.lora.rank=2"])
    model.save_pretrained("mine")
    processor.save_pretrained("mine")
    return ask(model, processor, PHOTOS)


def loaded(printed: str) -> dict:
    """Run the lines that an export printed."""
    lines = [line.strip() for line in printed.partition("Load it with:\n")[2].splitlines()]
    scope: dict = {}
    exec("\n".join(lines), scope)
    return scope


def same(found, wanted, atol=1e-5):
    for talk in TALKS:
        assert found[talk][0] == wanted[talk][0] and found[talk][2] == wanted[talk][2], talk
        torch.testing.assert_close(found[talk][1], wanted[talk][1], atol=atol, rtol=0)


@pytest.mark.parametrize("words", [["--format", "hf"], ["--merge", "format=hf", "out"], ["mine-hf"]])
def test_the_printed_lines_load_what_transformers_takes(saved, capsys, words):
    assert main(["export", "mine", *words]) == 0
    printed = capsys.readouterr().out
    out = "out" if "out" in words else "mine-hf"
    assert "Merged into the language model: lora." in printed and f"Wrote {out}, " in printed
    assert all(file.name in printed for file in Path(out).iterdir())
    scope = loaded(printed)
    assert type(scope["model"]).__name__ == "LlavaForConditionalGeneration"
    same(ask(scope["model"], scope["processor"], PHOTOS), saved, atol=1e-4)  # merging rounds


@pytest.mark.parametrize("merge", [[], ["merge=true"]])
def test_zoo_elsewhere_needs_nothing_but_the_folder(saved, capsys, merge):
    assert main(["export", "dir:mine", "whole", "--format", "safetensors", *merge]) == 0
    scope = loaded(capsys.readouterr().out)
    assert list(scope["model"].adapter) == ([] if merge else ["lora"])
    same(ask(scope["model"], scope["processor"], PHOTOS), saved, atol=1e-4 if merge else 1e-6)


def test_weights_of_a_part_that_is_gone_are_in_a_whole_export(tmp_path, monkeypatch):
    import transformers as t

    monkeypatch.chdir(tmp_path)
    backend = build.tokenizer(bos=True).backend_tokenizer
    tokens = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    tokens.save_pretrained("llm")
    build.shake(t.LlamaForCausalLM(t.LlamaConfig(**build.TEXT, vocab_size=len(tokens)))).save_pretrained("llm")
    model, processor = zoo.compose(*CLIP, *MLP, "llm=hf", "llm.checkpoint=llm")
    model.save_pretrained("thin")
    processor.save_pretrained("thin")
    assert main(["export", "thin", "whole", "--format=safetensors"]) == 0
    shutil.rmtree("llm")
    same(ask(*zoo.load("dir:whole"), PHOTOS), ask(model, processor, PHOTOS), atol=1e-6)


def test_nothing_is_written_over_and_nothing_is_half_written(saved, capsys, monkeypatch):
    there = Path("there")
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    assert main(["export", "mine", "there"]) == 2
    assert "'there' exists and is not empty" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("zoo.published.export.write_weights", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["export", "mine", "new/folder/out"])
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "there"]


def test_a_link_stays_one_and_is_written_to_where_it_points(saved, capsys):
    Path("disk").mkdir()
    for link, target in (("a", Path("disk")), ("b", Path("disk/later/out"))):  # an empty folder, and none yet
        Path(link).symlink_to(target)
        assert main(["export", "mine", link, "--format", "safetensors"]) == 0
        assert f"Wrote {target.absolute()}, " in capsys.readouterr().out
        assert Path(link).is_symlink() and (target / "config.json").is_file()
        shutil.rmtree(target)


REFUSED = {
    "a flag": (["--formt", "gguf"], "zoo export has no flag '--formt'. Did you mean '--format'?"),
    "a type of another format": (["--type", "f32"], "--type is of --format gguf, and this export is hf"),
    "a layout of another format": (["--family", "llava", "format=zoo"], "of --format hf, and this export is safet"),
    "a size": (["--max-shard-size", "1foo"], "--max-shard-size is a size such as 500MB or 5GB, got '1foo'"),
    "a licence": (["--license", "foolicense"], "the hub has no licence of that name.*--license other:<name>"),
    "a format": (["--format", "hff"], "No format of zoo export named 'hff'. Did you mean 'hf'?"),
    "two folders": (["a", "b"], "takes no 'b'. Its form: zoo export model"),
    "a layout": (["--family", "idefics3"], "'clip_vision_model'.*As it is.*zoo export mine --format safetensors"),
    "a layout that there is not": (
        ["--family", "lava"],
        r"named 'lava'. Did you mean 'llava'\?.*smolvlm, video_llava.\s*\Z",
    ),
    "a type": (["--format", "gguf", "--type", "q8_1"], r"named 'q8_1'. Did you mean 'q8_0'\?.*q8_0.\s*\Z"),
    "a model": (["--format", "hf", "pruner=[randm]"], "Did you mean 'random'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_to_do(saved, capsys, case):
    import re

    words, why = REFUSED[case]
    assert main(["export", "mine", *words]) == 2
    found = capsys.readouterr().err
    assert re.search(why, found, re.DOTALL), found
    assert sorted(path.name for path in Path().iterdir()) == ["mine"]


def test_weights_of_an_adapter_that_is_left_out(saved, tmp_path):
    with pytest.raises(
        RefusedError, match=r"with adapter 'lora', which is left out.*=\[lora,mole\].*--merge"
    ) as refusal:
        zoo.check("dir:mine", "adapter=[mole]", fixes=0)
    assert "unknown in llm" in str(refusal.value)
    with pytest.raises(RefusedError) as refusal:
        zoo.check("dir:mine", "adapter=[]", fixes=1)
    assert refusal.value.fixes == ["adapter=[lora]"]
    model, processor = composed([*CLIP, *MLP, *LLAMA, "adapter=[mole]"])
    model.save_pretrained("experts")
    processor.save_pretrained("experts")
    assert zoo.check("dir:experts", "adapter=[]").notes == ["The trained weights of adapter 'mole' are left out."]


def test_the_working_folder_is_not_replaced(saved, capsys, monkeypatch):
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    assert main(["export", "../mine", "."]) == 2
    assert "'.' is the working folder" in capsys.readouterr().err


def test_adapters_that_cannot_be_merged_are_kept_or_refused():
    from zoo.published.export import merge_adapters

    model, _ = composed([*CLIP, *MLP, *LLAMA, "adapter=[mole]"])
    with pytest.raises(ZooError, match="adapter 'mole' cannot be merged"):
        merge_adapters(model)
    assert list(model.adapter) == ["mole"]
