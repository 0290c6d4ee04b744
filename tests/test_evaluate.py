"""Evaluation: the same figures for any batch size and number of processes, beside models that do not look."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, picture, talk
from zoo.evaluation import predict
from zoo.evaluation.evaluate import _on_default_data, _to_score, evaluate, main, prompt_of
from zoo.evaluation.predict import Question, answer
from zoo.registry import Dataset, Dialog, RecordError, Sample, Score, ZooError, build
from zoo.runs.data import RunData
from zoo.runs.scored import samples_of
from zoo.settings.config import compose, typed_of


class Talks:
    """Questions of unlike lengths about few images, one or none of them; some kinds are never trained."""

    def __init__(self, count: int = 9, split: str = "eval") -> None:
        self.count, self.split = count, split

    def __len__(self):
        return self.count

    def get(self, index, epoch=0):
        images = [picture(index % 3)] * (index % 4 != 0)
        dialogs = []
        for k in range(1 + index % 3):
            question = " ".join(QUESTIONS[(index + j) % 5] for j in range(1 + (index + k) % 4))
            dialog = talk(question, "yes" if index % 3 else "no", len(images))
            dialog.kind, dialog.meta = f"k{k}", {"held_out": k == 2}
            dialogs.append(dialog)
        return Sample(f"{self.split}-{index}", images, dialogs)

    def train_split(self):
        return Talks(30, "train")


class Choices(Talks):
    def get(self, index, epoch=0):
        one = super().get(index)
        for dialog in one.dialogs:
            dialog.task, dialog.choices = "choice", ["yes", "no", "a red circle left of a blue square"]
        return one


@pytest.fixture
def model(make_model):
    model, processor = make_model(seed=3)
    with torch.no_grad():  # an untrained model says the same to all; make it look and read
        for p in model.parameters():
            p.mul_(3.0)
    return model, processor


def test_any_batch_size_gives_the_same(model):
    results = [evaluate(*model, {"talks": Talks(6), "choices": Choices(5)}, batch_size=b) for b in (1, 7, 64)]
    assert len({r["prediction"] for r in results[0].predictions}) > 5, "the model says different things"
    for other in results[1:]:
        assert other.predictions == results[0].predictions
        assert other.lines == results[0].lines


def test_what_a_checkpoint_states_for_other_uses_does_not_end_an_evaluation(model):
    expected = evaluate(*model, {"talks": Talks(6)}, batch_size=4, baselines=False).predictions
    draws = {"do_sample": True, "num_return_sequences": 2}
    for stated in ({"return_dict_in_generate": True}, draws, {"cache_implementation": "dynamic"}):
        for name, value in stated.items():
            setattr(model[0].generation_config, name, value)
        assert evaluate(*model, {"talks": Talks(6)}, batch_size=4, baselines=False).predictions == expected
        for name in stated:
            setattr(model[0].generation_config, name, None)


def test_a_question_without_options_is_named(model):
    class Some(Choices):
        def get(self, index, epoch=0):
            one = super().get(index)
            one.dialogs[0].choices = [] if index == 2 else one.dialogs[0].choices
            return one

    with pytest.raises(RecordError, match=r"eval-2.*no options to choose from"):
        evaluate(*model, {"some": Some(4)}, batch_size=16, baselines=False)
    result = evaluate(*model, {"some": Some(4)}, batch_size=16, baselines=False, skip_broken=True, max_broken=1.0)
    assert [line["id"] for line in result.skipped] == ["eval-2"]


def test_predictions_are_what_the_model_says_alone(model):
    net, processor = model
    sample = Talks().get(5)
    asked = [Question(sample, d, "generate", 12) for d in sample.dialogs]
    for question, text in answer(net, processor, asked, batch_size=4):
        batch = processor.collate([processor.encode_prompt(sample, question.dialog)])
        out = net.generate(batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=12, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
        assert processor.tokenizer.decode(out[0], skip_special_tokens=True).strip() == text


def test_an_image_is_encoded_once_and_equal_questions_are_asked_once(model):
    net, processor = model
    sample = Sample("s", [picture()], [talk(q, "yes") for q in QUESTIONS + QUESTIONS])
    seen, read, rows = [], [], []
    inner, hidden, generate = net.encode_images, net.llm.hidden, net.llm.lm.generate
    net.encode_images = lambda pixels: seen.append(len(pixels)) or inner(pixels)
    net.llm.hidden = lambda **kwargs: read.append(len(kwargs["inputs_embeds"])) or hidden(**kwargs)
    net.llm.lm.generate = lambda ids, **kwargs: rows.append(len(ids)) or generate(ids, **kwargs)
    asked = [Question(sample, d, "generate", 4) for d in sample.dialogs]
    texts = [text for _, text in answer(net, processor, asked, batch_size=64)]
    assert seen == [1], "the encoder sees the image once"
    assert read == [1], "the LLM reads it once"
    assert sum(rows) == len(QUESTIONS) and texts[:5] == texts[5:]


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "qwen3", "gemma2"])
def test_reading_an_image_once_changes_nothing(make_model, model_type, monkeypatch):
    llm = {"name": "hf", "model_type": model_type, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    net, processor = make_model(seed=3, attention="eager", llm={**llm, "intermediate_size": 64, "max_positions": 256})
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0 if p.dim() > 1 else 1.0)
    samples = [Talks().get(i) for i in range(9)]

    def texts():
        asked = [Question(s, d, "generate", 8) for s in samples for d in s.dialogs]
        return [text for _, text in answer(net, processor, asked, batch_size=4)]

    once = texts()
    monkeypatch.setattr("zoo.composed.prefix_cache.PrefixCache.serves", staticmethod(lambda model: False))
    assert once == texts() and len(set(once)) > 3


def test_the_likeliest_option_is_chosen(model):
    net, processor = model
    sample = Talks().get(1)
    dialog = sample.dialogs[0]
    dialog.choices = ANSWERS
    ((_, text),) = answer(net, processor, [Question(sample, dialog, "choice", 0)], batch_size=2)
    found = {}
    for option in ANSWERS:
        row = processor.encode(Sample("s", sample.images, [talk(prompt_of(dialog).removeprefix("<image> "), option)]))
        out = net(**processor.collate([row]))
        found[option] = -out.loss.item() * int((row.labels != -100).sum())
    assert text == max(found, key=found.get)


def test_a_video_is_named_in_the_prompt_and_is_retrieved_as_a_picture_is():
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "what moves?"}]
    for parts, shown in ((content[::2], 1.0), (content, 1.0), (content[2:], 0.0)):
        dialog = Dialog([{"role": "user", "content": parts}], meta={"group": "a"})
        assert build("task", {"name": "recall"}).score(dialog, [0.0])["_shown"] == shown
    assert prompt_of(Dialog([{"role": "user", "content": content}])) == "<video> <image> what moves?"


def test_a_broken_model_chooses_no_option(monkeypatch):
    scored = {0: {"a": -2.0, "b": -1.0}, 1: {"a": -2.0, "b": float("nan")}, 2: {"a": float("nan"), "b": -1.0}}
    monkeypatch.setattr(predict, "_score", lambda *given: scored)
    assert predict._choose(None, None, {}, {}, None, 2) == {0: "b", 1: "", 2: ""}
    right = Dialog([{"role": "user", "content": "?"}], choices=["a", "b"], answers=["a"])
    assert build("task", {"name": "choice"}).score(right, "")["accuracy"] == 0


def test_blind_sees_no_image_and_text_stays_as_it_is(model):
    net, processor = model
    samples = [Talks().get(i) for i in range(9)]

    def texts(blind, change=lambda s: s):
        asked = [Question(change(s), d, "generate", 8) for s in samples for d in s.dialogs]
        return [text for _, text in answer(net, processor, asked, batch_size=8, blind=blind)]

    def black(sample):
        return Sample(sample.id, [picture(77)] * len(sample.images), sample.dialogs)

    assert texts(True) == texts(True, black), "a blind model does not see what the image is"
    assert texts(False) != texts(False, black), "and the other does"
    alone = [i for i, s in enumerate(samples) for _ in s.dialogs if not s.images]
    where = [j for j, s in enumerate([s for s in samples for _ in s.dialogs]) if not s.images]
    assert alone and [texts(True)[j] for j in where] == [texts(False)[j] for j in where]


def test_the_table_has_every_kind_with_its_baselines(model):
    result = evaluate(*model, {"talks": Talks()}, batch_size=16)
    lines = {line.kind: line for line in result.lines}
    assert set(lines) == {"k0", "k1", "k2"}
    assert [lines[k].held_out for k in ("k0", "k1", "k2")] == [False, False, True]
    assert lines["k0"].score.n == 9
    assert lines["k0"].majority == Score(pytest.approx(6 / 9), 9, pytest.approx(0.1667, abs=1e-3))
    assert lines["k0"].blind is not None
    assert result.summary()["talks/k0/accuracy"] == lines["k0"].score.value


class Rank:
    """One of two processes, the second of which runs first; what the first one sends is lost."""

    num_processes = 2

    def __init__(self, rank):
        self.process_index, self.is_main_process = rank, rank == 0

    def wait_for_everyone(self):
        pass


@pytest.fixture
def one_after_the_other(monkeypatch, tmp_path):
    """`run(rank)` evaluates as one of two processes; their files stay in `tmp_path`."""
    from zoo.evaluation import evaluate as module
    from zoo.evaluation import shares

    monkeypatch.setattr(shares, "by_first", lambda one, call: call() if one.is_main_process else None)
    monkeypatch.setattr(shares, "shares_in", lambda one, folder: nullcontext(folder))
    monkeypatch.setattr(module, "everywhere", lambda one, value: value or ([], []))
    options = {"batch_size": 4, "limit": 7, "skip_broken": True, "max_broken": 1.0, "folder": tmp_path}
    return lambda model, data, rank: evaluate(*model, {"talks": data}, accelerator=Rank(rank), **options)


def test_processes_share_the_samples(model, one_after_the_other):
    class Holed(Talks):
        def get(self, index, epoch=0):
            if index in (1, 2):
                raise ValueError(f"record {index} is broken")
            return super().get(index, epoch)

    options = {"batch_size": 4, "limit": 7, "skip_broken": True, "max_broken": 1.0}
    for data in (Talks(), Holed()):
        second = one_after_the_other(model, data, 1)
        assert not second.predictions, "rows stay in their files"
        both = one_after_the_other(model, data, 0)
        alone = evaluate(*model, {"talks": data}, **options)
        assert both.predictions == alone.predictions and both.lines == alone.lines
        assert sorted(s["id"] for s in both.skipped) == sorted(s["id"] for s in alone.skipped)


def test_numbers_of_numpy_beside_answers_are_written(model, one_after_the_other, monkeypatch, tmp_path):
    class Own(Talks):
        def get(self, index, epoch=0):
            one = super().get(index)
            for dialog in one.dialogs:
                dialog.meta = {"at": np.int64(index), "box": np.arange(2, dtype=np.float32)}
            return one

    half = Score(np.float32(0.5), np.int64(2), np.float32(0.0))
    monkeypatch.setattr("zoo.tasks.exact.Exact.summarise", lambda task, rows: {"accuracy": half})
    one_after_the_other(model, Own(4), 1)
    for result in (one_after_the_other(model, Own(4), 0), evaluate(*model, {"talks": Own(4)}, batch_size=4)):
        result.save(tmp_path)
        rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        assert rows[-1]["meta"] == {"at": 3, "box": [0.0, 1.0]}
        assert json.loads((tmp_path / "scores.json").read_text())[0]["score"]["value"] == 0.5


def test_a_share_that_was_cut_off_is_refused(model, one_after_the_other, tmp_path):
    one_after_the_other(model, Talks(), 1)
    file = tmp_path / "1.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ZooError, match=r"1\.jsonl.* is not complete"):
        one_after_the_other(model, Talks(), 0)


def test_tasks_choose_the_dialogs(model):
    from zoo.registry import build

    class Mixed(Talks):
        def get(self, index, epoch=0):
            one = super().get(index)
            one.dialogs[0].task = "yes_no"
            return one

    own = evaluate(*model, {"talks": Mixed()}, batch_size=16, baselines=False)
    assert {(line.kind, line.task) for line in own.lines} == {("k0", "yes_no"), ("k1", "exact"), ("k2", "exact")}
    asked = {"yes_no": build("task", {"name": "yes_no"})}
    only = evaluate(*model, {"talks": Mixed()}, asked, batch_size=16, baselines=False)
    assert {(line.kind, line.task) for line in only.lines} == {("k0", "yes_no"), ("k1", "yes_no"), ("k2", "yes_no")}
    boxes = {"boxes": build("task", {"name": "boxes"})}

    class Named(Talks):
        def get(self, index, epoch=0):
            one = super().get(index)
            for dialog in one.dialogs:
                dialog.task = "exact"
            return one

    with pytest.raises(ZooError, match="is for the tasks boxes"):
        evaluate(*model, {"talks": Named()}, boxes, batch_size=16)


def test_several_tasks_that_give_the_same_metric_are_told_apart(model, tmp_path):
    from zoo.evaluation.score_table import score_table
    from zoo.inspection.run_summary import summarise
    from zoo.registry import build

    tasks = {name: build("task", {"name": name}) for name in ("exact", "vqa")}
    result = evaluate(*model, {"talks": Talks()}, tasks, batch_size=16, baselines=False)
    names = [f"talks/{kind}/{task}.accuracy" for kind in ("k0", "k1", "k2_held_out") for task in tasks]
    assert sorted(result.summary()) == sorted(names)
    assert list(map(str, score_table(result.lines).columns[2].cells))[:2] == ["exact.accuracy", "vqa.accuracy"]
    result.save(tmp_path)
    (tmp_path / "eval.yaml").write_text("seed: 0")
    assert sorted(summarise(tmp_path).scores) == sorted(names)


def test_data_for_evaluation_alone_have_no_majority(model, capsys):
    class Alone(Talks):
        def train_split(self):
            raise ZooError("There is no file 'train.json'.")

    result = evaluate(*model, {"talks": Alone()}, batch_size=16)
    assert result.lines and all(line.majority is None and line.blind is not None for line in result.lines)
    assert "No majority for data 'talks'" in capsys.readouterr().out


def test_zoo_eval_writes_scores_and_predictions(tmp_path, capsys):
    from tests.train_builders import config, recipe
    from zoo.training.loop import main as train

    words = recipe(tmp_path, {"a": "steps: 1, batch_size: 4"})
    run = train(config(words, f"run.folder={tmp_path / 'run'}", "limit=2"))
    capsys.readouterr()
    cfg = compose("eval", [f"model=dir:{run.path}", "limit=3", "device=cpu", f"run.folder={tmp_path / 'out'}"])
    assert list(cfg.data) == ["scenes"] and cfg.data.scenes["size"] == 32, "the data that the model was trained for"
    assert not _on_default_data(cfg) and _on_default_data(compose("eval", ["model=scenes_tiny"]))
    assert not _on_default_data(compose("eval", ["model=scenes_tiny", "data=[scenes]"]))
    result = main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    assert len(rows) == len(result.predictions) and len({r["id"] for r in rows}) == 3
    assert {"id", "kind", "prompt", "prediction", "answers", "scores", "meta"} <= set(rows[0])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {"data", "kind", "task", "metric", "held_out", "score", "blind", "majority"} == set(scores[0])
    assert set(scores[0]["score"]) == {"value", "n", "stderr"}
    assert "majority" in capsys.readouterr().out


def test_a_split_that_is_typed_is_scored(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": "Which?", "answer": split}))
    (tmp_path / "data").mkdir()
    head = "# @package data.two_splits\ndefaults: [/data/chat_json@_here_, _self_]\n"
    (tmp_path / "data/two_splits.yaml").write_text(f"{head}file: {tmp_path}/{{split}}.jsonl\neval_split: dev\n")

    def scored(*more):
        cfg = compose("eval", ["model=scenes_tiny", "data=[two_splits]", *more], tmp_path)
        return _to_score(RunData(cfg.data), typed_of(cfg))["two_splits"].get(0).dialogs[0].messages[-1]["content"]

    assert scored()[0]["text"] == "dev" and scored("data.two_splits.split=train")[0]["text"] == "train"


class Sorted(Dataset):
    """Ten samples of each of ten classes, one class after the other; groups of four, or none."""

    def __init__(self, grouped: bool = False) -> None:
        self.grouped = grouped

    def __len__(self):
        return 100

    def get(self, index, epoch=0):
        dialog = talk("Which class?", str(index // 10), 1)
        dialog.meta = {"group": index // 4} if self.grouped else {}
        return Sample(str(index), [picture(0)], [dialog])


def test_a_limit_draws_from_sorted_data_and_leaves_groups_whole():
    def scored(limit, data=None, rank=0, world=1):
        return [s and int(s.id) for s in samples_of("a", data or Sorted(), limit, rank, world)]

    twenty, fifty = scored(20), scored(50)
    assert twenty == sorted(set(twenty)) and len(twenty) == 20 and len({i // 10 for i in twenty}) > 6
    assert set(twenty) < set(fifty), "a larger limit asks what a smaller one does"
    assert [max(both, key=bool) for both in zip(*(scored(20, None, r, 2) for r in (0, 1)), strict=True)] == twenty
    assert scored(20, Sorted(grouped=True)) == list(range(20))
    assert scored(None) == scored(100) == scored(200) == list(range(100))
