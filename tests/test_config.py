"""From overrides to one typed config: slots, presets, saved models, and what is refused."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from zoo import ZooError
from zoo.registry import build
from zoo.settings import config, presets
from zoo.settings.config import compose, slots_of, validate
from zoo.settings.schema import RunRoot
from zoo.settings.stage import Stage

CONF = {
    "model/base.yaml": """
        # @package _global_
        # A base
        defaults:
          - override /vision: hf
          - override /projector: mlp
          - override /llm: hf
          - override /pruner: [random]
        vision: {checkpoint: openai/clip-vit-large-patch14}
        projector: {depth: 3}
        pruner: {random: {keep_ratio: 0.125}}
        """,
    "model/variant.yaml": """
        # @package _global_
        # A variant with another pruner
        defaults:
          - base
          - override /pruner: [pool]
        projector: {hidden_size: 7}
        """,
    "recipe/mine.yaml": """
        # @package _global_
        # Two stages
        defaults:
          - override /model: variant
          - override /data: [scenes, small]
          - override /task: [exact]
        projector: {hidden_size: 9}
        data: {scenes: {size: 48}}
        stages:
          one: {steps: 3, data: {scenes: 1, small: 2}}
          two: {epochs: 1, lr: 0.5}
        """,
    "data/small.yaml": """
        # @package data.small
        # Few scenes
        defaults: [scenes@_here_]
        scenes: 12
        """,
}


@pytest.fixture(scope="module")
def conf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    for name, text in CONF.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = [line[8:] for line in text.splitlines()[1:]]
        (folder / name).write_text("\n".join(lines))
    return folder


def refused(*overrides: str, command: str = "train", conf: Path | None = None) -> str:
    with pytest.raises(ZooError) as error:
        compose(command, overrides, conf)
    return str(error.value)


def test_the_defaults_compose():
    cfg = compose("train")
    assert OmegaConf.get_type(cfg) is RunRoot
    assert cfg.model.name == cfg.run.recipe == "scenes_tiny"
    assert cfg.vision and cfg.llm and cfg.stages
    assert all(OmegaConf.get_type(stage) is Stage for stage in cfg.stages.values())


def test_options_of_single_slots():
    cfg = compose("train", ["vision=timm", "vision.layer=-1", "projector=linear", "projector.bias=false", "seed=7"])
    assert (cfg.vision.name, cfg.vision.layer, cfg.projector.bias, cfg.seed) == ("timm", -1, False, 7)


def test_slots_of_several():
    cfg = compose(
        "load", ["pruner=[random,pool]", "pruner.random.keep_ratio=0.25", "adapter=lora", "adapter.lora.rank=8"]
    )
    assert list(cfg.pruner) == ["random", "pool"]
    assert (cfg.pruner.random.keep_ratio, cfg.adapter.lora.rank) == (0.25, 8)
    assert [(kind, key) for kind, key, _ in slots_of(cfg)][1:3] == [("pruner", "random"), ("pruner", "pool")]
    assert compose("load", ["pruner=[random,pool]", "pruner.keep_ratio=0.5"]).pruner.random.keep_ratio == 0.5


def test_nobody_in_a_slot():
    assert compose("load", ["projector=null", "pruner=null"]).projector is None


def test_recipe_beats_model_beats_component_and_the_command_line_beats_all(conf):
    cfg = compose("train", ["recipe=mine"], conf)
    assert (cfg.projector.depth, cfg.projector.hidden_size) == (3, 9)
    assert compose("load", ["model=variant"], conf).projector.hidden_size == 7
    assert compose("train", ["recipe=mine", "projector.hidden_size=11"], conf).projector.hidden_size == 11
    assert compose("load", ["model=base"], conf).pruner.random.keep_ratio == 0.125


def test_data_sets_of_yaml_are_components_under_another_name(conf):
    cfg = compose("train", ["recipe=mine", "data.small.seed=5"], conf)
    assert (cfg.data.small.name, cfg.data.small.scenes, cfg.data.small.seed) == ("scenes", 12, 5)
    assert cfg.data.scenes.size == 48
    assert len(build("dataset", cfg.data.small)) == 12


def test_options_of_a_preset_stay_with_the_component_it_picks(conf):
    """A checkpoint of CLIP makes no timm encoder; what the run does not choose leaves nothing behind."""
    assert compose("load", ["model=base"], conf).vision.checkpoint == "openai/clip-vit-large-patch14"
    assert compose("load", ["model=base", "vision=hf"], conf).vision.checkpoint == "openai/clip-vit-large-patch14"
    for overrides in (["model=base", "vision=timm"], ["recipe=mine", "vision=timm"]):
        cfg = compose("train", overrides, conf)
        assert (cfg.vision.name, cfg.vision.checkpoint) == ("timm", "")
    assert compose("load", ["model=variant"], conf).pruner == {"pool": compose("load", ["pruner=pool"]).pruner.pool}
    assert compose("load", ["model=base", "pruner=null"], conf).pruner == {}
    cfg = compose("train", ["recipe=mine", "data=[small]"], conf)
    assert list(cfg.data) == ["small"] and cfg.stages.one.data == {"small": 2.0}


def test_dicts_of_a_stage_take_any_key(conf):
    cfg = compose("train", ["recipe=mine", "stages.one.loss_weights.dense=0.5", "stages.one.data.small=4"], conf)
    assert cfg.stages.one.loss_weights == {"dense": 0.5} and cfg.stages.one.data.small == 4
    assert compose("train", ["llm.extra.rope_theta=3"]).llm.extra.rope_theta == 3
    assert list(compose("train", ["recipe=mine", "~stages.two"], conf).stages) == ["one"]


def test_composing_inside_a_running_hydra_job():
    from hydra.core.global_hydra import GlobalHydra

    from zoo.settings.config import hydra_of_its_own

    with hydra_of_its_own() as outer:
        compose("load")
        assert GlobalHydra.instance().hydra is outer


def saved(folder: Path, **changes) -> Path:
    """A folder as a run leaves it, weights aside."""
    cfg = compose("load", ["pruner=[random]", "pruner.random.keep_ratio=0.75"])
    slots = {k: OmegaConf.to_container(cfg[k]) for k in ("vision", "pruner", "projector", "llm", "adapter")}
    data = {"seen": {"name": "scenes", "size": 40}}
    content = {"model_type": "zoo", "slots": slots, "tokenizer": {"vocab_size": 999}, "plugins": [], "data": data}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_a_saved_model_is_a_preset_with_typed_options(tmp_path):
    folder = saved(tmp_path / "run")
    cfg = compose("eval", [f"model=dir:{folder}", "adapter=[lora]", "adapter.lora.rank=3"])
    assert (cfg.pruner.random.keep_ratio, cfg.tokenizer.vocab_size, cfg.adapter.lora.rank) == (0.75, 999, 3)
    assert (cfg.model.source, cfg.model.name) == ("dir", str(folder))
    assert cfg.data.seen.size == 40 and cfg.run.recipe == ""  # its own data, not the default recipe's
    assert compose("eval", [f"model=dir:{folder}", "pruner=null"]).pruner == {}
    assert "named 'rnk'" in refused(f"model=dir:{folder}", "adapter=[lora]", "adapter.lora.rnk=3")


def test_a_preset_that_is_asked_for_has_the_paths_of_now(tmp_path, monkeypatch):
    conf, run = tmp_path / "conf", tmp_path / "run"
    (conf / "data").mkdir(parents=True)
    text = "# @package data.mine\ndefaults: [/data/chat_json@_here_, _self_]\n"
    (conf / "data/mine.yaml").write_text(text + "file: ${oc.env:ZOO_DATA,data}/{split}.jsonl\n")
    node = {"name": "chat_json", "file": "/then/train.jsonl", "split": "odd", "limit": 7}
    split = {"name": "chat_json", "file": "/then/{split}.jsonl", "eval_split": "dev", "limit": 7}
    saved(run / "model", data=None)
    nodes = {"mine": node, "chat_json": node, "split": split, "seen": {"name": "scenes", "size": 40}}
    OmegaConf.save({"data": nodes}, run / "config.yaml")
    monkeypatch.setenv("ZOO_DATA", "/now")

    def data(*overrides):
        return compose("eval", [f"model=dir:{run}", *overrides], conf).data

    assert (data().mine.file, data().mine.limit, data().seen.size) == ("/then/train.jsonl", 7, 40)
    for overrides in (["data=mine"], ["data=[mine,seen]"], ["data=[mine]", "data.mine.limit=0"]):
        found = data(*overrides).mine
        assert (found.file, found.split, found.limit) == ("/now/{split}.jsonl", "train", 0)
    assert data("data=[mine,seen]").seen.size == 40
    assert data("data=[chat_json]").chat_json.file == "/then/train.jsonl"  # a component alone has no paths of its own
    one = data("data.split.file=/now/other.jsonl").split  # the same file for all splits
    assert (one.file, one.limit, one.eval_split) == ("/now/other.jsonl", 7, "")
    assert data("data.split.file=/now/{split}.json").split.eval_split == "dev"
    (conf / "recipe").mkdir()
    (conf / "recipe/r.yaml").write_text("# @package _global_\ndefaults: [{override /data: [mine]}]\n")
    assert data("recipe=r").mine.file == "/now/{split}.jsonl"
    for path, said in (("/then/train.jsonl", "given explicitly"), ("/now/train.jsonl", "Presets look")):
        with pytest.raises(ZooError, match=rf"There is no file '{path}'. .*{said}.* below '/now' \(ZOO_DATA\).$"):
            build("dataset", {"name": "chat_json", "file": path})


def test_last_is_the_newest_run(tmp_path):
    import os

    for age, name in ((50, "old"), (10, "new"), (30, "middle")):
        folder = saved(tmp_path / "2026-01-01" / name / "model")
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    cfg = compose("eval", ["model=last", f"run.dir={tmp_path}"])
    assert Path(cfg.model.name).parent.name == "new"
    assert "no finished run below" in refused("model=last", f"run.dir={tmp_path / 'none'}")


def test_a_saved_model_asks_for_its_plugin_by_name(tmp_path):
    folder = saved(tmp_path / "run", plugins=["./my_pruner.py"])
    content = json.loads((folder / "config.json").read_text())
    content["slots"]["pruner"] = {"mine": {"name": "mine"}}
    (folder / "config.json").write_text(json.dumps(content))
    message = refused(f"model=dir:{folder}", command="load")
    assert "needs pruner 'mine'" in message and "If you trust it, add plugins=[./my_pruner.py]." in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["projector=[mlp,linear]"], "the slot 'projector' holds one component"),
        (["pruner=random,pool"], "is a sweep: add -m to run each, or brackets for several at once: pruner=[...]"),
        (["run.name=a,b"], "add -m to run each, or quotes for one text with commas: \"run.name='...'\""),
        (["seed=1,2"], "'seed=1,2' is a sweep: add -m to run each."),
        (["projector=mlp,linear"], "'projector=mlp,linear' is a sweep: add -m to run each."),
        (["~pruner.random.seed"], "options cannot be added or removed. Without one, its default holds."),
        (["~projector"], "options cannot be added or removed. Write projector=null."),
        (["+pruner.random.x=1"], "options cannot be added or removed. Write pruner.random.x=1."),
        (["~pruner"], "Write pruner=[]."),
        (["pruner.random.keep_ratio=1"], "pruner 'random' is not chosen in this run: add it with pruner=[random]"),
        (["projector=null", "projector.depth=1"], "'projector' holds no component in this run"),
        (["vision.name=hf"], "a component is chosen with vision=<name>"),
        (["projector.depth=deep"], "Option 'depth' of projector 'mlp' takes int (default 2), got 'deep'."),
        (["projector.depth=null"], "takes int (default 2), got 'null'."),
        (["projector.depth=0"], "projector 'mlp': depth must be at least 1, got 0."),
        (["seed=one"], "Option 'seed' of the run takes int (default 0), got 'one'."),
        (["survey.limit=3"], "of the run itself. It is limit or teach.limit."),
        (["run=3"], "Write run.<option>=<value>."),
        (["stages=3"], "Write stages.<stage>.<option>=<value>."),
        (["stages.nowhere.lr=1"], "No stage named 'nowhere'."),
        (["recipe=mine", "stages.one.lr=abc"], "Option 'lr' of stage 'one' takes float (default 0.001), got 'abc'."),
        (["recipe=mine", "stages.one.epochs=1"], "stage 'one': A stage needs either steps or epochs"),
        (["recipe=mine", "stages.one.betas=[0.9,x]"], "Option 'betas' of stage 'one' takes list[float]"),
        (["data.sizes=3", "data=[scenes]"], "No option of the chosen data sets named 'sizes'. Did you mean 'size'"),
        (["vision"], "Cannot read 'vision'. Options are given as vision=<value>."),
        (["model=base/../base"], "No model named 'base/../base'. Did you mean 'base'?"),
        (["model=null"], "start from a preset"),
        (["recipe=mine", "stages.one.data.smal=1"], "No data set of this run named 'smal'. Did you mean 'small'?"),
        (["recipe=mine", "stages.one.distiller=dens"], "stage 'one': No distiller named 'dens'. Did you mean 'dense'?"),
        (["recipe=mine", "stages.one.distiller={name: dense, wights: []}"], "Did you mean 'weights' (list[float], "),
        (["precision=pf32"], "No precision named 'pf32'. Did you mean 'fp32'?"),
        (["data=[chat_json]"], "dataset 'chat_json': a value is needed for 'file'."),
    ],
)
def test_what_is_refused(overrides, message, conf):
    assert message in refused(*overrides, conf=conf)


def test_a_question_of_a_data_set_can_be_left_out():
    words = ["model=scenes_tiny", "data=[emoji]"]
    whole, less = (compose("eval", [*words, *more]) for more in ([], ["~data.emoji.questions.name"]))
    assert set(whole.data.emoji.questions) - set(less.data.emoji.questions) == {"name"}
    assert "'data.emoji.questions.nam' does not exist" in refused(*words, "~data.emoji.questions.nam", command="eval")


def test_mistakes_inside_a_preset_name_the_preset(conf):
    bad = {
        "model/typo.yaml": "# @package _global_\ndefaults: [base]\nprojector: {dept: 3}\n",
        "model/stranger.yaml": "# @package _global_\ndefaults: [base, {override /pruner: [rndom]}]\n",
        "model/lonely.yaml": "# @package _global_\ndefaults: [bse]\n",
        "model/member.yaml": "# @package _global_\ndefaults: [base]\npruner: {rndom: {keep_ratio: 1}}\n",
        "model/broken.yaml": "# @package _global_\ndefaults: [base\n",
        "recipe/typo.yaml": "# @package _global_\ndefaults: [mine]\nstages: {one: {stps: 3}}\n",
    }
    for name, text in bad.items():
        (conf / name).write_text(text)
    assert "No option of projector 'mlp' named 'dept'. Did you mean 'depth'" in refused("model=typo", conf=conf)
    assert "typo" in refused("model=typo", conf=conf)
    assert "No pruner named 'rndom'. Did you mean 'random'?" in refused("model=stranger", conf=conf)
    assert "No model named 'bse'. Did you mean 'base'?" in refused("model=lonely", conf=conf)
    assert "'rndom'" in refused("model=member", conf=conf)
    assert "model 'broken'" in refused("model=broken", conf=conf) and "not valid YAML" in refused(
        "model=broken", conf=conf
    )
    assert "No option of stage 'one' named 'stps'. Did you mean 'steps'" in refused("recipe=typo", conf=conf)
    for name in bad:
        (conf / name).unlink()


def test_ambiguous_model_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    assert "Did you mean 'dir:runs/x' or 'hub:runs/x'?" in refused("model=runs/x")
    assert "Did you mean 'hub:llava-hf/llava-1.5-7b-hf'?" in refused("model=llava-hf/llava-1.5-7b-hf")
    assert "the folder holds no saved model" in refused("model=dir:runs/x")
    assert "no such folder. Did you mean 'dir:runs/x'?" in refused("model=dir:runs/y")
    assert "write a repository as <org>/<name>" in refused("model=hub:llava")


def test_validate_reports_options_of_a_slot_without_a_component():
    cfg = compose("load")
    OmegaConf.set_struct(cfg, False)
    cfg.projector = {"depth": 2}
    with pytest.raises(ZooError, match="projector has options but no component"):
        validate(cfg)


def test_every_preset_of_ours_composes():
    from zoo.settings.presets import available, preset_files

    for name in available("model"):
        compose("load", [f"model={name}"])
    for name in available("recipe"):
        compose("train", [f"recipe={name}"])
    data = list(preset_files("data"))
    assert list(compose("load", [f"data=[{','.join(data)}]"]).data) == data


def test_presets_made_in_this_process_do_not_slow_later_configs():
    """Hydra copies its store for each config; what it read from it before is not changed by who has the config."""
    from copy import deepcopy

    from hydra.core.config_store import ConfigStore

    before = OmegaConf.to_yaml(first := compose("load"))
    store = ConfigStore.instance()
    assert deepcopy(store).repo is store.repo
    first.projector.depth, first.tokenizer.chat_template = 7, "chatml"
    assert OmegaConf.to_yaml(compose("load")) == before


def test_a_config_like_one_before_parses_no_component_again(monkeypatch):
    """It was a third of the time of composing one. The first imports some components, the second asks those."""
    import ast

    words, parse, parsed = ["pruner=[random]"], ast.parse, []
    before = [OmegaConf.to_yaml(compose("train", words)) for _ in range(2)]
    monkeypatch.setattr(ast, "parse", lambda *args, **options: parsed.append(args) or parse(*args, **options))
    assert [OmegaConf.to_yaml(compose("train", words)), before[0]] == before
    assert not parsed


def test_parts_without_a_model_start_as_they_are(tmp_path):
    """Neither a composition from parts nor a recipe that names its own parts takes options of the default model."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /vision: timm\n  - override /llm: hf\nstages: {a: {steps: 1}}\n"
    )
    for cfg in (
        compose("load", ["vision=timm", "llm=hf"]),
        compose("train", ["recipe=mine"], config_dir=tmp_path),
    ):
        assert (cfg.vision.stem, cfg.llm.model_type, cfg.model.name) == ("patch", "llama", "")
    assert compose("train", []).vision.stem == "conv"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("features.keep=bf61", r"\(features\.keep\) named 'bf61'\. Did you mean 'bf16'"),
        ("features.max_gb=-1", r"features\.max_gb must be more than 0, got -1"),
        ("teach.dtype=float61", r"named 'float61'\. Did you mean 'float16'"),
        ("survey.images=opn", r"\(survey\.images\) named 'opn'\. Did you mean 'open'"),
    ],
)
def test_rules_of_a_section_hold_before_anything_is_made(word, reason):
    with pytest.raises(ZooError, match=reason):
        compose("check", ["model=scenes_tiny", word])


@pytest.mark.parametrize(("option", "value"), [("data", {"scenes": 1.5}), ("lr_scale", {"projector": 2.0, "llm": 0.1})])
@pytest.mark.parametrize("recipe", ["scenes_tiny", "null"])
def test_names_and_numbers_of_a_stage_are_given_as_a_dict(recipe, option, value):
    new = recipe == "null"
    words = [f"recipe={recipe}", *(["model=scenes_tiny", "+stages.look.steps=1"] if new else [])]
    given = ", ".join(f"{name}: {number}" for name, number in value.items())
    cfg = compose("train", [*words, "data=[scenes]", f"{'+' if new else ''}stages.look.{option}={{{given}}}"])
    assert {name: cfg.stages.look[option][name] for name in value} == value


@pytest.mark.parametrize(
    "words",
    [
        ["tokenizer.template_options={enable_thinking: false, tone: 'no, never'}"],
        ["tokenizer.template_options.enable_thinking=false", "tokenizer.template_options.tone='no, never'"],
    ],
)
@pytest.mark.parametrize("command", ["train", "load"])
def test_variables_of_a_chat_template_are_given_by_their_own_names(command, words):
    options = compose(command, ["model=scenes_tiny", *words]).tokenizer.template_options
    assert options == {"enable_thinking": False, "tone": "no, never"}


def test_a_run_on_any_data_is_scored_on_the_same(tmp_path):
    names = presets.preset_files("data")
    cfg = compose("train", ["model=scenes_tiny", f"data=[{','.join(sorted(names))}]"])
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    (tmp_path / "model").mkdir()
    card = Path(__file__).parents[1] / "model_cards" / "scenes_tiny" / "config.json"
    (tmp_path / "model" / "config.json").write_bytes(card.read_bytes())
    again = compose("eval", [f"model=dir:{tmp_path}"])
    assert OmegaConf.to_container(again.data, resolve=True) == OmegaConf.to_container(cfg.data, resolve=True)


def test_threads_compose_one_after_the_other(monkeypatch):
    inside, most, prepare = [], [], config.prepare

    def slow(*given):
        inside.append(given)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return prepare(*given)

    monkeypatch.setattr(config, "prepare", slow)
    words = [["model=scenes_tiny", "pruner=[random]", f"pruner.random.keep_ratio=0.{i}"] for i in (3, 4, 5)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda given: compose("load", given), words))
    assert [cfg.pruner.random.keep_ratio for cfg in found] == [0.3, 0.4, 0.5] and set(most) == {1}
