"""Under transformers' `Trainer` a composed model trains, evaluates, saves and resumes as their own class does."""

import copy
import json

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

import zoo
from tests import published_builders as build
from tests.published_builders import said

QUESTIONS = ["is there a red circle?", "describe the picture.", "yes no", "what color is the square?"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The model of transformers, the folder it is from, and rows of unlike numbers of labels."""
    folder = tmp_path_factory.mktemp("trainer") / "llava"
    reference, processor = build.llava(folder)
    rows = []
    for i, question in enumerate(QUESTIONS):
        text = processor.apply_chat_template(said(1, question), add_generation_prompt=True) + "yes" * (3 * i + 1)
        image = build.photo(40 + i, 50, seed=i)
        row = processor(
            images=[image], text=[text], padding="max_length", max_length=60, padding_side="right", return_tensors="pt"
        )
        labels = row["input_ids"].clone()
        labels[:, : 20 + 3 * i] = -100
        labels[(labels == reference.config.image_token_id) | (row["attention_mask"] == 0)] = -100
        rows.append({**{k: row[k][0] for k in ("input_ids", "attention_mask", "pixel_values")}, "labels": labels[0]})
    return folder, reference, rows


def trainer(model, rows, folder, **options):
    """A trainer that writes into the folder."""
    given = {"max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 0}
    given |= {"disable_tqdm": True, "max_grad_norm": 1e9}
    metrics = options.pop("compute_metrics", None)
    args = t.TrainingArguments(output_dir=str(folder), **given | options)
    return t.Trainer(
        model=model.train(), args=args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics,
        data_collator=lambda some: {k: torch.stack([row[k] for row in some]) for k in some[0]},
    )  # fmt: skip


SPLITS = [(4, 1), (2, 2), (1, 4)]  # rows at once, passes that make a step


@pytest.mark.parametrize("first_label", [False, True])
@pytest.mark.parametrize("rows_at_once, passes", SPLITS)
def test_accumulated_losses_and_gradients(llava, tmp_path, rows_at_once, passes, first_label):
    """A first label, which nothing predicts, is not counted either."""
    folder, reference, rows = llava
    rows = [{**r, "labels": r["labels"].clone()} for r in rows]
    for row in rows:
        row["labels"][0] = row["input_ids"][0] if first_label else -100
    logs = []
    for model in (copy.deepcopy(reference), zoo.load(f"dir:{folder}")[0]):
        run = trainer(
            model, rows, tmp_path, per_device_train_batch_size=rows_at_once, gradient_accumulation_steps=passes,
            learning_rate=0.0, max_steps=1,
        )  # fmt: skip
        assert run.label_names == ["labels"]
        run.train()
        logs.append(run.state.log_history[0])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-6)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-5)


def test_evaluation_gives_transformers_loss_and_logits(llava, tmp_path):
    """Their Trainer cannot gather what their class gives beside the logits, which must be told to ignore it."""
    folder, reference, rows = llava
    found = []
    for model, ignored in (
        (copy.deepcopy(reference), ["cache", "past_key_values", "image_outputs", "image_hidden_states"]),
        (None, None),
    ):
        seen = []

        def metrics(prediction, seen=seen):
            logits, labels = prediction.predictions, prediction.label_ids
            seen.append((torch.from_numpy(logits), torch.from_numpy(labels)))
            return {"right": float((logits[:, :-1].argmax(-1) == labels[:, 1:]).mean())}

        model = model or zoo.load(f"dir:{folder}")[0]
        run = trainer(model, rows, tmp_path, per_device_eval_batch_size=3, compute_metrics=metrics)
        found.append((run.evaluate(ignore_keys=ignored), *seen))
        assert run.predict(rows, ignore_keys=ignored).predictions.shape == seen[0][0].shape
    (theirs, wanted), (ours, got) = found
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert ours["eval_right"] == theirs["eval_right"]
    torch.testing.assert_close(got[1], wanted[1])
    real = torch.stack([row["attention_mask"] for row in rows]).bool()
    torch.testing.assert_close(got[0][real], wanted[0][real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_it_trains_as_transformers_class(llava, tmp_path, checkpointing):
    folder, reference, rows = llava
    weights = []
    options = {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    for model in (copy.deepcopy(reference), zoo.load(f"dir:{folder}")[0]):
        run = trainer(
            model, rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
            learning_rate=1e-2, optim="sgd", **options,
        )  # fmt: skip
        run.train()
        weights.append([model.get_input_embeddings().weight, model.get_output_embeddings().weight])
    for theirs, ours in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_it_saves_and_resumes(llava, tmp_path):
    """Killed between two checkpoints and resumed: the weights of the run that was not; the folder is a model."""
    folder, _, rows = llava
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    options |= {"max_steps": 5}

    def train(out, resume=None, stop=None):
        model = zoo.load(f"dir:{folder}")[0]
        run = trainer(model, rows, tmp_path / out, **options)
        if stop:

            class Stop(t.TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step == stop
                    control.should_save = control.should_save and not control.should_training_stop

            run.add_callback(Stop())
        run.train(resume_from_checkpoint=resume)
        return run

    whole = train("whole")
    train("killed", stop=3)
    resumed = train("killed", resume=True)
    wanted = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    whole.save_model(tmp_path / "saved")
    again = zoo.ZooModel.from_pretrained(tmp_path / "saved")
    for name, value in again.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "zoo"


def test_it_ends_with_the_best_checkpoint(llava, tmp_path):
    """Steps are far too long, so the last checkpoint is not the best."""
    folder, _, rows = llava
    options = {"learning_rate": 3.0, "optim": "sgd", "max_steps": 4, "per_device_train_batch_size": 4}
    options |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"lr_scheduler_type": "constant"}
    run = trainer(zoo.load(f"dir:{folder}")[0], rows, tmp_path, load_best_model_at_end=True, **options)
    run.train()
    assert not run.state.best_model_checkpoint.endswith("checkpoint-4")
    best = zoo.ZooModel.from_pretrained(run.state.best_model_checkpoint).state_dict()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, best[name]), name


def test_weights_that_a_best_checkpoint_leaves_to_the_base_come_back_too(llava, tmp_path):
    """A checkpoint without what had not changed yet (a first step of rate 0, say), loaded as their Trainer does."""
    model = zoo.load(f"dir:{llava[0]}")[0]
    build.shake(model.projector, seed=1)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "best")
    build.shake(model, seed=3)
    loaded = model.load_state_dict(load_file(tmp_path / "best" / "model.safetensors"), False)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    some = {"projector.other": torch.zeros(1)}
    assert model.load_state_dict(some, False).unexpected_keys == ["projector.other"], "of another dict: as torch does"


def test_an_adapter_of_peft_trains_as_on_transformers_class(llava, tmp_path):
    import peft

    folder, reference, rows = llava
    logs = []
    for model in (copy.deepcopy(reference), zoo.load(f"dir:{folder}")[0]):
        config = peft.LoraConfig(r=2, target_modules=r".*(language_model|llm).*\.q_proj", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        run = trainer(
            peft.get_peft_model(model, config), rows, tmp_path, per_device_train_batch_size=1,
            gradient_accumulation_steps=4, max_steps=3, learning_rate=1e-2,
        )  # fmt: skip
        assert run.label_names == ["labels"]
        run.train()
        logs.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4) and len(logs[0]) == 3
