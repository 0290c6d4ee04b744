"""A run with several encoders: killed and resumed, in two processes, and what becomes of it on every later way."""

import pytest
import torch
from safetensors.torch import load_file

import zoo
from tests import killed_runs
from tests.killed_runs import left, train
from tests.train_builders import config, losses, recipe
from zoo.training.loop import Run

STAGES = {
    "a": "steps: 2, batch_size: 4, checkpoint_every: 1, train: [projector, vision.loc], lr: 0.01, workers: 2",
    "b": "steps: 2, batch_size: 4, train: [projector, llm], lr: 0.01, pack_length: 400",
}
ENCODERS = (
    "vision.encoders={sem: {name: hf, model_type: siglip, image_size: 32, patch_size: 8, width: 32, depth: 2, "
    "heads: 2}, loc: {name: timm, image_size: 48, patch_size: 16, width: 24, depth: 1, layer: -1, heads: 2}}"
)
WORDS = ["vision=fused", ENCODERS, "pruner=fastervlm", "pruner.fastervlm.keep_ratio=0.5"]


@pytest.fixture(scope="module", autouse=True)
def server():
    with killed_runs.served():
        yield


def words(place, name="run"):
    return [*recipe(place, STAGES), *WORDS, f"run.folder={place / name}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    given = words(place)
    ended = train(place, given)
    assert ended.code == 0, ended.said
    return place / "run"


def test_what_trains_moves_and_the_rest_stays(whole):
    started, _ = zoo.load(f"dir:{whole / 'model'}", device="cpu")
    torch.manual_seed(0)
    state = load_file(whole / "model" / "model.safetensors")
    assert {n.split(".")[2] for n in state if n.startswith("vision.")} == {"sem", "loc"}, "of sizes: all are saved"
    assert started.config.slots["vision"]["encoders"]["loc"]["width"] == 24
    assert losses(whole).keys() == {1, 2, 3, 4}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole):
    assert train(tmp_path, words(tmp_path), "terminated_at_step", 1, "behind").code == 143
    ended = train(tmp_path, [*recipe(tmp_path, STAGES)[:2], f"resume={tmp_path / 'run'}"])
    assert ended.code == 0, ended.said
    assert left(tmp_path / "run") == left(whole)


def test_two_processes_train_as_one(tmp_path, whole):
    ended = train(tmp_path, words(tmp_path), processes=2)
    assert ended.code == 0, ended.said
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    one, two = (load_file(place / "model" / "model.safetensors") for place in (whole, tmp_path / "run"))
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)
    frozen = [n for n in one if ".sem." in n]
    assert frozen and all(torch.equal(one[n], two[n]) for n in frozen)


def test_training_is_that_of_the_joined_features_by_hand(tmp_path):
    """The twin calls the encoders by themselves, joins by hand, and steps plain AdamW: the same weights to the bit."""
    run = Run(config([*recipe(tmp_path, STAGES), *WORDS[:2], f"run.folder={tmp_path / 'run'}"]))
    model, processor = run.model, run.processor
    from tests.conftest import ANSWERS, QUESTIONS, sample

    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    model.set_trainable(["vision", "projector"])
    start = {n: t.clone() for n, t in model.state_dict().items()}

    def trained(step):
        model.load_state_dict(start)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimiser.zero_grad()
            step().backward()
            optimiser.step()
        return {n: t.clone() for n, t in model.state_dict().items()}

    def by_hand():
        split = model.vision.split(batch["pixel_values"])
        sem, loc = (model.vision.encoders[n](split[n]).tokens for n in ("sem", "loc"))
        loc = loc.transpose(1, 2).reshape(len(loc), -1, 3, 3)
        loc = torch.nn.functional.interpolate(loc, (4, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        image = zoo.registry.ImageFeatures(torch.cat([sem, loc], -1), (4, 4))
        given = {k: v for k, v in batch.items() if k != "pixel_values"}
        return model(**given, encoded=model.encode_features(image)).loss

    ours, naive = trained(lambda: model(**batch).loss), trained(by_hand)
    assert all(torch.equal(ours[n], naive[n]) for n in ours)
    assert any(not torch.equal(ours[n], start[n]) for n in ours if ".loc." in n)


def test_what_was_trained_is_read_scored_and_asked(whole, monkeypatch):
    model, processor = zoo.load(f"dir:{whole / 'model'}", device="cpu")
    from tests.conftest import picture

    assert isinstance(model.chat("what is this?", picture(), max_new_tokens=2), str)
    prompt = processor(images=picture(), text=f"{processor.image_token}what is it?")
    found = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    again = model.generate(
        **{k: v for k, v in prompt.items() if k != "pixel_values"},
        encoded=model.encode_images(prompt["pixel_values"]),
        max_new_tokens=3,
        do_sample=False,
    )
    assert torch.equal(found, again)
    with torch.no_grad():
        wanted = model(**prompt).logits
        compiled = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda part: compiled(part, backend="eager"))  # traced alone
        model.compile_parts()
        assert torch.allclose(model(**prompt).logits, wanted, atol=1e-5)


def test_zoo_inspect_draws_the_patches_of_the_common_grid(whole):
    from tests.conftest import picture
    from zoo.inspection.xray import look

    model, processor = zoo.load(f"dir:{whole / 'model'}", device="cpu")
    view, shown = look(model, processor, picture(), "what is it?")
    assert view.grid == (4, 4) and len(view.layers[0]) == 16 and view.scores is not None
    assert shown.size[0] >= 32
