"""A language model in few bits by bitsandbytes: refused where it cannot be, and no more than its name is saved.

The package runs on CUDA only; in its place stands one with its classes, whose weights stay as they are.
"""

import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zoo
from tests import published_builders as build
from zoo.registry import ZooError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits") / "llava"
    build.llava(folder)
    return folder


def test_bits_are_refused_where_they_cannot_be(folder, monkeypatch):
    with pytest.raises(ZooError, match=r"bits=4 needs CUDA: .* the model goes to 'cpu'"):
        zoo.load(f"dir:{folder}", bits=4, device="cpu")
    with pytest.raises(ZooError, match="8 or 4 bits, got bits=3"):
        zoo.load(f"dir:{folder}", bits=3)
    with pytest.raises(ZooError, match="takes one device"):
        zoo.load(f"dir:{folder}", bits=4, device_map={"": 0, "llm": 1})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # else the device is refused first
    with pytest.raises(ZooError, match="is for published checkpoints"):
        zoo.load("scenes_tiny", bits=4, device="cuda")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    with pytest.raises(ZooError, match="pip install bitsandbytes"):
        zoo.load(f"dir:{folder}", bits=4, device="cuda")


class Params(nn.Parameter):
    def __new__(cls, data, requires_grad=False, **options):
        made = super().__new__(cls, data, requires_grad)
        made.options = options
        return made


class Linear(nn.Linear):
    """Keeps numbers beside its weight, as the real ones do."""

    def __init__(self, sizes_in, sizes_out, bias, **options):
        super().__init__(sizes_in, sizes_out, bias)
        self.options = options

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = torch.ones(3)
        destination[f"{prefix}SCB"] = torch.ones(3)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.fixture
def package(monkeypatch):
    fake = ModuleType("bitsandbytes")
    fake.__spec__ = ModuleSpec("bitsandbytes", None)
    fake.nn = SimpleNamespace(Linear4bit=Linear, Linear8bitLt=Linear, Params4bit=Params, Int8Params=Params)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr("zoo.published.bits.require_bits", lambda bits, device: None)


@pytest.mark.parametrize(("bits", "options"), [(4, {"quant_type": "nf4"}), (8, {"has_fp16_weights": False})])
def test_the_decoder_is_held_in_bits_and_saved_by_name(folder, package, tmp_path, bits, options):
    whole, processor = zoo.load(f"dir:{folder}")
    model, _ = zoo.load(f"dir:{folder}", bits=bits, device="cpu")
    held = [m for m in model.llm.lm.modules() if isinstance(m, Linear)]
    assert len(held) == 3 * 7 and options.items() <= held[0].weight.options.items()
    assert type(model.llm.lm.lm_head) is nn.Linear and type(model.projector.net[0]) is nn.Linear
    batch = processor(images=[build.photo(40, 40)], text="<image> a")
    torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, atol=2e-2, rtol=0)  # 8: through half
    with torch.no_grad():
        model.projector.net[0].weight.mul_(2.0)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert list(load_file(tmp_path / "saved" / "model.safetensors")) == ["projector.net.0.weight"]
    again, _ = zoo.load(f"dir:{tmp_path / 'saved'}", bits=bits, device="cpu")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ZooError, match="load without bits"):
        model.save_pretrained(tmp_path / "whole", include_base=True)
    with pytest.raises(ZooError, match="which no published layout has"):
        zoo.export(model, processor, tmp_path / "out")


def test_weights_in_bits_that_changed_are_refused_and_the_rest_is_never_lost(folder, package, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    model, _ = zoo.load(f"dir:{tmp_path / 'base'}", bits=4, device="cpu")
    held = next(m for m in model.llm.lm.modules() if isinstance(m, Linear))
    before = held.weight.data.clone()
    held.weight.data.mul_(1.5)
    with pytest.raises(ZooError, match=r"q_proj.weight' is held in few bits and is no longer what .* gives \(1 such"):
        model.save_pretrained(tmp_path / "saved")
    held.weight.data.copy_(before)
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match="base weights of model in .* cannot be read any more"):
        model.save_pretrained(tmp_path / "saved")
    names = list(load_file(tmp_path / "saved" / "model.safetensors"))
    assert "projector.net.0.weight" in names
    assert not [n for n in names if n.startswith("llm") and n.endswith("q_proj.weight")], "it has no form of its own"


def test_adapters_that_copy_weights_are_not_served(folder, package):
    with pytest.raises(ZooError, match="adapter 'upcycle' needs dense"):
        zoo.load(f"dir:{folder}", "adapter=[upcycle]", bits=4, device="cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_with_the_package_itself_a_merge_in_bits_is_refused(folder, tmp_path, monkeypatch, bits):
    """It runs on a CPU, slowly; skipped where it is not installed."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("zoo.published.bits.require_bits", lambda bits, device: None)
    options = {"bits": bits, "device": "cpu", "dtype": "bfloat16"}
    model, processor = zoo.load(f"dir:{folder}", "adapter=[lora]", "adapter.lora.rank=2", **options)
    batch = processor(images=[build.photo(40, 40)], text="<image> a")
    wanted = model(**batch).logits  # the first pass moves what layers of eight bits keep
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(zoo.load(f"dir:{tmp_path}", **options)[0](**batch).logits, wanted)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    model.adapter["lora"].merge()
    with pytest.raises(ZooError, match="is held in few bits and is no longer what"):
        model.save_pretrained(tmp_path / "merged")
