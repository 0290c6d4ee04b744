"""A sample of `zoo bench check`: mistakes are refused by name, what runs is let through, fixes work as typed."""

import pytest

from zoo import registry
from zoo.benches.check import MISFITS, NAMED, Options, run, spread, tried, valid
from zoo.benches.check_folders import write_checkpoints
from zoo.checking.checker import RefusedError, check, for_a_shell
from zoo.checking.plan import plan_from
from zoo.registry import Dataset, Dialog, Sample, ZooError
from zoo.runs.scored import require_dialogs
from zoo.settings.config import compose


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder)
    return folder


def checked(*words):
    return check(plan_from(compose("check", list(words))))


def test_the_misfits_are_many_and_no_two_are_alike():
    assert len(MISFITS) >= 150
    assert len({m.words for m in MISFITS}) == len(MISFITS)
    assert all(m.says and all(m.says) for m in MISFITS)


def test_a_sample_of_misfits_is_refused_by_what_is_wrong_and_where(tmp_path):
    sample = spread(MISFITS[3:], 14)
    found = tried(sample, tmp_path / "c")
    assert found.named == len(sample), [*found.unnamed, *found.raw, *found.passed]


def test_parts_that_contradict_themselves_are_named(tmp_path):
    own = [m for m in MISFITS if "plugins=[zoo.benches.check_parts]" in m.words]
    found = tried(own, tmp_path / "c")
    assert found.named == len(own) == 10, [*found.unnamed, *found.raw, *found.passed]
    assert not any(name.startswith("own_") for kind in registry.KINDS for name in registry.names(kind))


def test_what_runs_is_let_through_and_what_fails_is_not(tmp_path):
    false, missed, _, kinds = valid(8, 5, tmp_path / "m")
    assert not false and not missed
    assert f"{len(registry.names('pruner'))} of kind pruner" in kinds


@pytest.mark.fixes
def test_fixes_work_as_they_are_typed(tmp_path):
    typed = [m for m in MISFITS if "pruner=fastervlm" in m.words or "projector=null" in m.words]
    found = tried(typed[:1], tmp_path / "c", fixes=1)
    assert found.offered == 3 and not found.broken


@pytest.mark.fixes
def test_the_bench_says_what_it_found(capsys):
    page = run(Options(misfits=2, valid=1, fixes=1))
    rows = {row.what: row for row in page.rows}
    assert len(rows) == 6 and rows["of 2 misfits, refused by words that name what and where"].value.median >= NAMED
    with pytest.raises(ZooError, match="at least 0"):
        Options(valid=-1)


# ---- a checkpoint that the run names ---------------------------------------------------------------------------------


def test_options_of_random_parts_do_not_reach_a_checkpoint(folders):
    cfg = compose("check", ["llm=hf", f"llm.checkpoint={folders}/llama"])
    assert cfg.llm.checkpoint and not cfg.llm.extra and not cfg.llm.zero_init_residual
    assert cfg.tokenizer.chat_template == ""  # its own: chatml
    walk = check(plan_from(cfg))
    assert walk.rows[-1].width == 32
    assert checked(f"llm.checkpoint={folders}/llama", "projector.depth=1").rows[-1].width == 32


def test_a_checkpoint_without_a_template_has_that_of_the_preset(folders, tmp_path):
    from shutil import copytree

    copytree(folders / "llama", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    cfg = compose("check", ["llm=hf", f"llm.checkpoint={tmp_path}/bare"])
    assert cfg.tokenizer.chat_template == "plain"
    check(plan_from(cfg))


def test_another_checkpoint_in_the_place_of_a_stated_one_keeps_what_was_said_of_it():
    cfg = compose("train", ["recipe=llava_kd_qwen2", "vision.checkpoint=other/siglip", "llm.checkpoint=other/qwen"])
    assert cfg.vision.layer == -2 and cfg.vision.checkpoint == "other/siglip"
    assert cfg.tokenizer.chat_template == "chatml"


def test_fields_of_a_family_do_not_reach_another():
    cfg = compose("check", ["llm.model_type=gpt2"])
    assert not cfg.llm.extra and cfg.llm.hidden_size == 128
    assert compose("check", ["llm.num_layers=2"]).llm.extra == {"hidden_act": "relu"}


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_a_random_encoder_beside_a_trained_language_model_is_said_so(folders):
    words = [f"llm.checkpoint={folders}/llama", "stages.look.train=[projector]", "stages.look.distiller=null"]
    words += ["stages.look.loss_weights.answer=1", "stages.name.train=[projector]", "stages.relate.train=[llm]"]
    (note,) = checked("llm=hf", *words).notes
    assert "vision 'timm' starts from random weights, and no stage trains it" in note
    assert not checked().notes  # all is random, and learns
    cfg = compose("load", ["vision=timm", "vision.model=vit_tiny_patch16_224", "projector=mlp", "llm=hf"])
    assert "vision.checkpoint=pretrained" in check(plan_from(cfg)).notes[0]


def test_a_slot_that_is_chosen_twice_has_the_last_choice():
    cfg = compose("check", ["pruner=random", "pruner.random.keep_ratio=0.5", "pruner=null"])
    assert not cfg.pruner
    cfg = compose("check", ["pruner=[random]", "pruner.random.keep_ratio=0.5", "pruner=[random,divprune]"])
    assert cfg.pruner.random.keep_ratio == 0.5 and list(cfg.pruner) == ["random", "divprune"]
    with pytest.raises(ZooError, match="'random' is not chosen"):
        compose("check", ["pruner.random.keep_ratio=0.5", "pruner=fastv"])


@pytest.mark.parametrize(
    ("override", "typed"),
    [
        ("pruner=[pool,random]", "pruner=[pool,random]"),
        ("stages.a.distiller={name:kl,weight:0}", "'stages.a.distiller={name:kl,weight:0}'"),
        ("~stages.a.data.b", "'~stages.a.data.b'"),
        ("vision.model=''", "\"vision.model=''\""),
    ],
)
def test_fixes_are_shown_as_a_shell_takes_them(override, typed):
    assert for_a_shell(override) == typed


@pytest.mark.fixes
def test_column_means_are_offered_where_there_is_no_cls():
    with pytest.raises(RefusedError) as refusal:
        checked(
            "vision=hf", "vision.model_type=siglip", "vision.image_size=64", "vision.patch_size=8", "pruner=visionzip"
        )
    assert "pruner.visionzip.score=column_mean" in refusal.value.fixes


def test_tasks_that_no_dialog_is_for_are_refused_before_a_model_is_loaded():
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    samples = [Sample(str(i), [], [Dialog(said, task="vqa")]) for i in range(3)]

    class Data(list, Dataset):
        def get(self, index, epoch=0):
            return self[index]

    require_dialogs({"mine": Data(samples)}, {"vqa": None})
    require_dialogs({"mine": Data(samples)}, None)
    with pytest.raises(ZooError, match="No dialog in data mine is for the tasks boxes"):
        require_dialogs({"mine": Data(samples)}, {"boxes": None})
