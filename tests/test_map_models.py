"""Models on encoders with feature maps, the way that a person goes: composed, trained, saved, loaded."""

import pytest
import torch

import zoo
from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.test_vision_hf_maps import SMALL, backbone
from tests.vision_builders import MAPS, save_timm, settle, timm_map_model
from zoo.published.export import export
from zoo.registry import ZooError

TEXTS = [f"{q} {a}" for q in QUESTIONS for a in ANSWERS] * 3


def words_of(kind, folder):
    """Options of an encoder with a checkpoint in `folder`, or with random weights."""
    name, _, what = kind.partition(" ")
    if what == "random":
        extra = ",".join(f"{k}:{list(v) if isinstance(v, tuple) else v}" for k, v in SMALL["convnext"].items())
        return ["vision=hf", "vision.model_type=convnext", "vision.image_size=64", f"vision.extra={{{extra}}}"]
    folder.mkdir()
    if name == "timm":
        save_timm(timm_map_model(what), folder)
        return ["vision=timm", f"vision.checkpoint={folder}"]
    settle(backbone(what, -1)).save_pretrained(folder)
    return ["vision=hf", f"vision.checkpoint={folder}", "vision.image_size=64", "vision.stage=-2"]


def batch_of(processor, rows=1):
    return processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))] * rows)


def answers(model, processor):
    with torch.no_grad():
        return model.eval()(**batch_of(processor), all_logits=True).logits.float()


@pytest.mark.parametrize("kind", ["timm test_efficientnet", "hf resnet", "hf swinv2", "hf random"])
def test_trained_saved_and_loaded_it_answers_the_same(kind, tmp_path):
    words = words_of(kind, tmp_path / "encoder")
    model, processor = zoo.compose(
        *words, "projector=linear", "llm=hf", "llm.hidden_size=32", "device=cpu", texts=TEXTS
    )
    model.set_trainable(["vision", "projector"])
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("vision.")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**batch_of(processor, 2)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    now = model.state_dict()
    assert all(torch.equal(now[n], t) for n, t in before.items() if "running" in n or "tracked" in n)
    assert any(not torch.equal(now[n], t) for n, t in before.items())
    want = answers(model, processor)
    for whole in (False, True):
        folder = tmp_path / f"saved_{whole}"
        model.save_pretrained(folder, include_base=whole)
        processor.save_pretrained(folder)
        if whole:  # the folder of the encoder is not read again
            (tmp_path / "encoder").rename(tmp_path / "gone") if (tmp_path / "encoder").exists() else None
        again, its = zoo.load(f"dir:{folder}", device="cpu")
        assert torch.equal(answers(again, its), want)
    short, its = zoo.load(f"dir:{folder}", device="cpu", dtype="bfloat16")
    torch.testing.assert_close(answers(short, its), want, atol=0.05, rtol=0.05)
    statistics = [b for n, b in short.named_buffers() if n.startswith("vision.") and "running" in n]
    assert all(b.dtype == torch.float32 for b in statistics)
    with pytest.raises(ZooError, match="its tokens are a feature map"):
        export(model, processor, tmp_path / "exported")


def test_a_named_architecture_of_timm_needs_no_checkpoint_once_all_weights_are_saved(tmp_path):
    import timm

    torch.manual_seed(0)
    source = timm.create_model("test_resnet")
    (tmp_path / "encoder").mkdir()
    save_timm(source, tmp_path / "encoder")
    words = ["vision=timm", f"vision.checkpoint={tmp_path / 'encoder'}", "vision.stage=-2", "vision.image_size=64"]
    model, processor = zoo.compose(*words, "projector=linear", "llm=hf", "device=cpu", texts=TEXTS)
    model.save_pretrained(tmp_path / "whole", include_base=True)
    processor.save_pretrained(tmp_path / "whole")
    (tmp_path / "encoder").rename(tmp_path / "gone")
    again, its = zoo.load(f"dir:{tmp_path / 'whole'}", device="cpu")
    assert torch.equal(answers(again, its), answers(model, processor))


PRUNERS = ["random", "divprune", "pool", "downsample", "dart"]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruners_that_need_a_grid_or_nothing_run_on_a_map(pruner):
    words = ["vision=timm", "vision.model=test_resnet", "vision.image_size=64", "vision.stage=-2", f"pruner={pruner}"]
    model, processor = zoo.compose(*words, "projector=linear", "llm=hf", "device=cpu", texts=TEXTS)
    assert torch.isfinite(answers(model, processor)).all()


def test_pruners_that_need_scores_are_refused_with_the_reason():
    words = ["vision=timm", "vision.model=test_resnet", "vision.image_size=64", "projector=linear", "llm=hf"]
    with pytest.raises(ZooError, match=r"there is no .CLS., whose attention is read"):
        zoo.compose(*words, "pruner=fastervlm", texts=TEXTS)


def test_a_model_of_timm_with_tables_takes_crops():
    extra = ",".join(
        f"{k}:{list(v) if isinstance(v, tuple) else v}" for k, v in MAPS["swin_tiny_patch4_window7_224"].items()
    )
    words = [
        "vision=timm",
        "vision.model=swin_tiny_patch4_window7_224",
        "vision.image_size=64",
        f"vision.extra={{{extra}}}",
    ]
    model, processor = zoo.compose(
        *words, "layout=anyres", "layout.pinpoints=[[64,128]]", "projector=linear", "llm=hf", "device=cpu", texts=TEXTS
    )
    assert torch.isfinite(answers(model, processor)).all()
