"""Number formats: what an adapter keeps in float32, on every road to a model of 16 bits, and what comes out."""

import re

import pytest
import torch

import zoo
from tests.conftest import sample, tiny_slots
from tests.fusion_builders import SMALL
from zoo.composed.model import ZooModel
from zoo.loading.build import load_teacher
from zoo.settings.stage import TEACHER
from zoo.storage.precision import kept_wide
from zoo.teaching.teacher import Teacher

# Of each adapter: what its options are here, the families it stands on, which of its weights stay float32.
SETTINGS = {
    "lora": ({}, ["llama", "mixtral"], "nothing"),
    "vlora": ({**SMALL["vlora"], "max_images": 2}, ["llama", "qwen2_moe"], "nothing"),
    "mole": ({"gate": "none", "dropout": 0.0}, ["llama", "mixtral"], "."),
    "mole-prob": ({"gate": "prob", "dropout": 0.0}, ["llama", "mixtral"], "."),
    "mole-ste": ({"gate": "ste", "dropout": 0.0}, ["llama", "qwen3_moe"], "."),
    "mole-dense": ({"gate": "dense", "dropout": 0.0}, ["llama", "mixtral"], "."),
    "moextend": ({"layers": [0, 1], "calibration_width": 0}, ["mixtral", "qwen3_moe"], "."),
    "moextend-calibrated": ({}, ["qwen2_moe"], "."),
    "upcycle": ({"every": 1, "capacity": 1.5}, ["llama"], "router"),
}
CASES = [(name, family) for name, (_, families, _) in SETTINGS.items() for family in families]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEAR = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}  # of the norm of hidden states; near ties may choose anew


@pytest.fixture
def saved(make_model, tmp_path):
    """`saved(name, family) -> (model, folder, processor)` of one whose adapter has moved from where it started."""

    def save(name, family):
        options, _, _ = SETTINGS[name]
        llm = (
            tiny_slots()["llm"] | {"model_type": family} | ({} if family == "llama" else {"num_experts": 4, "top_k": 2})
        )
        adapter = {name.partition("-")[0]: {"name": name.partition("-")[0], **options}}
        slots = {"llm": llm, "adapter": adapter} | ({"projector": None} if name == "vlora" else {})
        model, processor = make_model(**slots)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in own(model).values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        return model, tmp_path, processor

    return save


def own(model):
    """The adapter's weights by their names in the model."""
    return {n: p for n, p in model.named_parameters() if model.part_of(n).startswith("adapter")}


def batch_of(processor):
    samples = [sample(("is there a red circle?", "yes"), seed=i, name=f"s{i}") for i in range(2)]
    return processor.collate([processor.encode(s) for s in samples])


def roads(model, folder, dtype):
    """A model in a number format, the ways that people take."""
    yield "load", zoo.load(f"dir:{folder}", dtype=dtype)[0]
    if dtype != "bfloat16":
        return
    yield "from_pretrained", ZooModel.from_pretrained(folder, dtype=DTYPES[dtype])
    yield "to", model.to(DTYPES[dtype])
    node = TEACHER | {"model": f"dir:{folder}", "dtype": dtype}
    yield "teacher", load_teacher(node, device=torch.device("cpu"), precision="fp32")[0]


def watched(model):
    """Hooks of somebody else on a feed-forward layer and inside of it; the shapes that they see."""
    seen = []
    mlp = next(m for n, m in model.llm.layers[0].named_children() if n == "mlp")
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    for module in mlp.modules():
        module.register_forward_hook(lambda module, args, out: None)
    return seen


def same(hidden, exact, dtype):
    """Whether most tokens have the hidden states that they have in float32; a near tie may choose other experts."""
    error = (hidden.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return hidden.dtype == DTYPES[dtype] and bool(error.median() < NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_on_every_road_what_is_said_to_be_float32_is(name, family, dtype, saved):
    original, folder, processor = saved(name, family)
    wide = re.compile(SETTINGS[name][2])
    batch = batch_of(processor)
    assert batch["input_ids"].numel() > 16, "more tokens than are few"
    exact = original(**batch).last_hidden_state
    for road, model in roads(original, folder, dtype):
        trained = own(model)
        for n, p in trained.items():
            assert p.dtype == (torch.float32 if wide.search(n) else DTYPES[dtype]), f"{road}: {n}"
        assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {DTYPES[dtype]}, road
        given = {**batch, "pixel_values": batch["pixel_values"].to(DTYPES[dtype])}
        seen = Teacher(model).outputs_for(batch, None) if road == "teacher" else model(**given)
        assert same(seen.last_hidden_state, exact, dtype), road


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_gradients_flow_in_every_format_whoever_hooks_in(name, family, dtype, saved):
    model, _, processor = saved(name, family)
    batch = batch_of(processor)
    exact = model(**batch).last_hidden_state
    model.to(DTYPES[dtype]).train()
    batch["pixel_values"] = batch["pixel_values"].to(DTYPES[dtype])
    for foreign in (False, True):
        shapes = watched(model) if foreign else []
        out = model(**batch, all_logits=True)
        assert out.logits.dtype == DTYPES[dtype] and same(out.last_hidden_state, exact, dtype)
        assert all(len(shape) == 3 for shape in shapes), "tokens as the model orders them"
        model.zero_grad()
        out.loss.backward()
        trained = [p for p in own(model).values() if p.requires_grad]
        assert trained and all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lora", "vlora", "moextend"])
def test_merged_it_says_the_same(name, dtype, saved):
    model, _, processor = saved(name, SETTINGS[name][1][0])
    model.to(DTYPES[dtype])
    batch = batch_of(processor)
    batch["pixel_values"] = batch["pixel_values"].to(DTYPES[dtype])
    if name == "vlora":  # of one image
        one = model.encode_images(batch["pixel_values"])
        batch = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
        image = one[1]
        model.adapter[name].condition(type(image)(image.tokens[:1], image.grid), [1])
        wanted = model.llm.hidden(inputs_embeds=model.llm.embed(batch["input_ids"])).last_hidden_state
        model.adapter[name].merge()
        merged = model.llm.hidden(inputs_embeds=model.llm.embed(batch["input_ids"])).last_hidden_state
    else:
        wanted = model(**batch).last_hidden_state
        model.adapter[name].merge()
        merged = model(**batch).last_hidden_state
    assert same(merged, wanted.float(), dtype)


@pytest.mark.parametrize("name", ["mole-prob", "moextend", "moextend-calibrated"])
def test_cast_by_itself_an_adapter_computes_the_same_in_half_the_memory(name, saved):
    model, _, processor = saved(name, SETTINGS[name][1][0])
    model.to(torch.bfloat16)
    batch = batch_of(processor)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    wanted = model(**batch).last_hidden_state
    model.adapter[name.partition("-")[0]].to(torch.bfloat16)
    short = {n for n, p in own(model).items() if p.dtype == torch.bfloat16}
    assert short and not any("router" in n or "rows" in n for n in short)
    assert torch.equal(model(**batch).last_hidden_state, wanted)


def test_gradients_and_copies_follow_their_weights(saved):
    model, _, processor = saved("mole-ste", "llama")
    model.train()(**batch_of(processor)).loss.backward()
    for moved in (model.bfloat16, model.half, model.float, model.double):
        moved()
        assert all(p.grad.dtype == p.dtype for p in own(model).values() if p.grad is not None)
    assert {p.dtype for p in own(model).values()} == {torch.float64}
    model.half()
    assert {p.dtype for p in own(model).values()} == {torch.float32}, "as many bits as are promised"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_transformers_keeps_in_float32_stays_so(dtype, make_model, tmp_path):
    """Routers of DeepSeek-V3: transformers' own class loads them in float32 whatever the rest is loaded in."""
    extra = {
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": None,
    }
    extra |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1}
    llm = tiny_slots()["llm"] | {"model_type": "deepseek_v3", "num_experts": 4, "top_k": 2, "extra": extra}
    model, processor = make_model(llm=llm)
    model.save_pretrained(tmp_path / "zoo")
    processor.save_pretrained(tmp_path / "zoo")
    model.llm.lm.save_pretrained(tmp_path / "hf")
    theirs = type(model.llm.lm).from_pretrained(tmp_path / "hf", dtype=DTYPES[dtype])
    wanted = {n: t.dtype for n, t in theirs.state_dict().items()}
    assert torch.float32 in wanted.values() and DTYPES[dtype] in wanted.values()
    loaded = zoo.load(f"dir:{tmp_path / 'zoo'}", dtype=dtype)[0]
    assert {n: t.dtype for n, t in loaded.llm.lm.state_dict().items()} == wanted
    assert kept_wide([loaded.llm], DTYPES[dtype]) and not kept_wide([loaded.llm], torch.float64)
    assert {n: t.dtype for n, t in model.to(DTYPES[dtype]).llm.lm.state_dict().items()} == wanted


def test_pixels_of_a_processor_go_into_a_model_of_16_bits(make_model):
    model, processor = make_model()
    row = processor.encode(sample(("what is it?", "red")))
    batch = processor.collate([row])
    assert batch["pixel_values"].dtype == torch.float32
    model.bfloat16()
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
