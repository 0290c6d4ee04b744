"""Models by name, folder and parts: what loads, what is refused, and with which words."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import zoo
from tests.conftest import ANSWERS, QUESTIONS, sample
from zoo.registry import ZooError
from zoo.storage.weights import sha256_of

TINY = [
    "vision=timm", "vision.image_size=32", "vision.patch_size=8", "vision.width=32", "vision.heads=2", "vision.depth=2",
    "projector=mlp", "llm=hf", "llm.hidden_size=32", "llm.num_layers=2", "llm.num_heads=2", "tokenizer.vocab_size=320",
]  # fmt: skip
TEXTS = [f"{q} {a}" for q in QUESTIONS for a in ANSWERS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A composed model in a folder, as a run leaves it."""
    torch.manual_seed(0)
    model, processor = zoo.compose(*TINY, texts=TEXTS)
    folder = tmp_path_factory.mktemp("run") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def logits(model, processor, **kwargs):
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    return model(**batch, all_logits=True, **kwargs).logits


def test_a_model_is_composed_from_options_alone(saved):
    model, processor, _ = saved
    assert not model.training and processor.num_image_tokens == 16
    assert [s.kind for s in model.steps] == ["vision", "projector", "llm"]


def test_a_folder_loads_to_the_same_logits(saved):
    model, processor, folder = saved
    again, same = zoo.load(f"dir:{folder}")
    assert torch.equal(logits(again, same), logits(model, processor))
    run, _ = zoo.load(f"dir:{folder.parent}")  # the run folder that holds it
    assert torch.equal(logits(run, same), logits(model, processor))


def test_overrides_change_parts_and_the_processor_follows(saved):
    model, _, folder = saved
    pruned, processor = zoo.load(f"dir:{folder}", "pruner=random", "pruner.random.keep_ratio=0.5")
    assert processor.num_image_tokens == pruned.num_image_tokens == 8
    assert logits(pruned, processor).isfinite().all()
    assert torch.equal(pruned.llm.lm.lm_head.weight, model.llm.lm.lm_head.weight)


def test_an_added_adapter_starts_fresh_and_changes_nothing_yet(saved):
    model, processor, folder = saved
    adapted, same = zoo.load(f"dir:{folder}", "adapter=[lora]", "adapter.lora.rank=2")
    torch.testing.assert_close(logits(adapted, same), logits(model, processor), atol=1e-6, rtol=1e-6)
    adapted.set_trainable(["adapter"])
    assert all("lora" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_an_adapter_is_saved_and_loaded(saved, tmp_path):
    _, _, folder = saved
    adapted, processor = zoo.load(f"dir:{folder}", "adapter=[lora]", "adapter.lora.rank=2")
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if adapted.part_of(name) == "adapter.lora":
                p.normal_(std=0.1)
    adapted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = zoo.load(f"dir:{tmp_path}")
    assert torch.equal(logits(again, same), logits(adapted, processor))


def test_another_part_without_weights_is_named(saved):
    _, _, folder = saved
    with pytest.raises(ZooError, match="missing in projector"):
        zoo.load(f"dir:{folder}", "projector=resampler", "projector.num_heads=2")
    model, _ = zoo.load(f"dir:{folder}", "projector=resampler", "projector.num_heads=2", fresh=["projector"])
    assert model.fresh_parts == ["projector"]


@pytest.mark.fixes
def test_what_does_not_fit_is_refused_before_weights_are_read(saved, monkeypatch):
    _, _, folder = saved
    monkeypatch.setattr("zoo.loading.build.load_model", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ZooError, match=r"pruner 'pool' needs grid(.|\n)*fix 1: pruner=\[pool,random\]"):
        zoo.load(f"dir:{folder}", "pruner=[random,pool]")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scenes_tni", "Did you mean 'scenes_tiny'"),
        ("{folder}", "Did you mean 'dir:{folder}'"),
        ("dir:{folder}/nowhere", "no such folder"),
        ("someone/something", "Did you mean 'hub:someone/something'"),
        ("hub:../etc", "write a repository as <org>/<name>"),
    ],
)
def test_names_that_are_wrong_or_ambiguous_are_refused_with_what_works(saved, name, words):
    with pytest.raises(ZooError, match=words.format(folder=saved[2])):
        zoo.load(name.format(folder=saved[2]))


def test_a_hostile_config_does_nothing(saved, tmp_path):
    import shutil

    for path, value in [
        (("projector", "_target_"), "os.system"),
        (("vision", "model"), "${oc.env:HOME}"),
        (("projector", "name"), "../../etc/passwd"),
    ]:
        folder = tmp_path / path[1]
        shutil.copytree(saved[2], folder)
        config = json.loads((folder / "config.json").read_text())
        config["slots"][path[0]][path[1]] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ZooError):
            zoo.load(f"dir:{folder}")
        from zoo.composed.model import ZooModel

        with pytest.raises(ZooError):
            ZooModel.from_pretrained(folder)


def test_weights_of_another_hash_are_refused(saved, tmp_path):
    from zoo.settings.source import Source

    model, _, folder = saved

    def found(folder, *stated):
        return Source(str(folder), "dir", {}, {}, sha256=" ".join(stated)).folder

    good = sha256_of(folder / "model.safetensors")
    assert found(folder, good) == folder
    for wrong in (["0" * 64], [good, good]):
        with pytest.raises(ZooError, match=rf"are model.safetensors {good}; their card states {wrong[0]}"):
            found(folder, *wrong)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    several = [sha256_of(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len(several) > 1 and found(tmp_path, *several) == tmp_path
    for wrong in (several[:1], several[::-1], [*several[:-1], "0" * 64]):
        with pytest.raises(ZooError, match="their card states"):
            found(tmp_path, *wrong)


def test_the_auto_classes_know_us_after_import_zoo(saved):
    """In a fresh process: `import zoo` alone must not load torch, and afterwards the Auto classes find our class."""
    code = (
        "import sys, zoo; assert 'torch' not in sys.modules\n"
        "from transformers import AutoModelForImageTextToText as A\n"
        f"print(type(A.from_pretrained({str(saved[2])!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("ZooModel"), done.stderr


@pytest.mark.parametrize("name", ["./gone", "../gone", "/gone/too", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_so(name):
    with pytest.raises(ZooError, match="there is no such folder"):
        zoo.compose("vision=timm", "projector=mlp", "llm=hf", f"llm.checkpoint={name}", texts=["a"])


@pytest.mark.parametrize("kind", ["saved", "run", "pruned", "published"])
def test_a_folder_by_itself_says_what_composing_makes_of_it(saved, tmp_path, kind):
    """`zoo.load(folder)` reads the folder's config without Hydra; what a person adds is composed on the same."""
    from tests import published_builders
    from zoo.settings import source as sources
    from zoo.settings.config import compose
    from zoo.settings.overrides import quoted

    folder = tmp_path / "model"
    if kind == "published":
        published_builders.llava(folder)
    else:
        shutil.copytree(saved[2], folder)
        config = json.loads((folder / "config.json").read_text())
        if kind == "run":
            config["data"] = {"scenes": {"name": "scenes", "split": "eval"}}
            config["task"] = {"exact": {"name": "exact"}}
        if kind == "pruned":
            config["slots"]["pruner"] = {"mine": {"name": "random", "keep_ratio": 1}, "pool": {"name": "pool"}}
        (folder / "config.json").write_text(json.dumps(config))
    name = f"dir:{tmp_path if kind == 'run' else folder}"
    alone, composed = sources._in_folder(name), sources.source_of(compose("load", [f"model={quoted(name)}"]))
    assert alone is not None
    known = {key: [repr(vars(s)[key]) for s in (alone, composed)] for key in vars(composed)}
    assert all(a == b for a, b in known.values()), known
    assert alone.folder == composed.folder == folder
    content = json.loads((folder / "config.json").read_text())  # and what the folder says now, not what it said
    key = "slots" if kind != "published" else "text_config"
    (content[key]["llm"] if key == "slots" else content[key])["no_such_option"] = 1
    (folder / "config.json").write_text(json.dumps(content))
    if key == "slots":
        assert sources._in_folder(name) is None
        with pytest.raises(ZooError, match="no_such_option"):
            zoo.load(name)
