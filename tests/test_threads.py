"""Eight people at once on one model: each gets what they get alone, to the bit, whatever parts it is made of.

Every part that is registered runs here, with pruners that ask encoders for what their hooks take. Python changes
threads a thousand times as often as usual, so that what a pass leaves on a module is met by others.
"""

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import zoo
from tests import qwen_builders
from tests.conftest import picture
from zoo import registry
from zoo.contracts.trial import MOE, node_of
from zoo.vision.encoders.hf import FAMILIES

PEOPLE = 8
NEW = {"max_new_tokens": 3, "min_new_tokens": 3}
WORDS = ("is there a red circle?", "what color is the square? and the cross?", "how many?", "describe the picture.")


@pytest.fixture
def at_once():
    """`at_once(work)` runs work(0), work(1), ... in threads of their own, and gives what each gave."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)

    def run(work: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None] * PEOPLE
        ready = threading.Barrier(PEOPLE)

        def one(i: int) -> None:
            try:
                ready.wait()
                found[i] = work(i)
            except BaseException as error:
                found[i] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(PEOPLE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if error := next((f for f in found if isinstance(f, BaseException)), None):
            raise error
        return found

    yield run
    sys.setswitchinterval(before)


def shaken(model):
    """Move every parameter, so that each part does something."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))
    return model


def visit(model, processor) -> Callable[[int], Any]:
    """What one of the people does: a pass, beams, and a chat, which every other one reads as it comes."""

    def work(i: int) -> Any:
        image = picture(i, size=32 + 32 * (i % 2) * (model.layout is not None))
        text = WORDS[i % len(WORDS)]
        talk = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        with torch.no_grad():
            logits = model(**prompt).logits
        beams = model.generate(**prompt, **NEW, num_beams=2)
        pieces: list[str] = []
        said = model.chat(text, image=image, **NEW, **({"stream": pieces.append} if i % 2 else {}))
        return logits, beams, said, "".join(pieces)

    return work


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def require_alike(model, processor, at_once) -> None:
    """Everybody gets what they get alone, and no module remembers anybody."""
    model.__dict__["processor"] = processor
    work = visit(shaken(model), processor)
    alone = [work(i) for i in range(PEOPLE)]
    assert len({out[0].double().sum().item() for out in alone}) == PEOPLE, "they would not notice others' images"
    before = kept_on(model)
    for one, other in zip(alone, at_once(work), strict=True):
        assert [equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)
    after = kept_on(model)
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()


def kept_on(model) -> dict[str, Any]:
    """What every module of a model, and every object of ours on one, holds: place -> which object, in which state."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("model", model)]
    while todo:
        path, held = todo.pop()
        if isinstance(held, (list, tuple)):
            inside = {str(i): value for i, value in enumerate(held)}
        elif isinstance(held, dict):
            inside = {str(key): value for key, value in held.items()}
        elif isinstance(held, torch.nn.Module) or type(held).__module__.startswith("zoo."):
            inside = dict(vars(held))
        else:
            plain = isinstance(held, (str, int, float, bool, frozenset))
            found[path] = held if plain else (id(held), getattr(held, "_version", 0))
            continue
        if id(held) not in seen and not path.endswith(".processor"):
            seen.add(id(held))
            found[path] = sorted(inside)
            todo += [(f"{path}.{key}", value) for key, value in inside.items()]
    return found


@pytest.mark.parametrize("name", registry.names("adapter"))
def test_adapters(name, make_model, at_once):
    needs = registry.get("adapter", name).cls.needs
    llm = {"llm": node_of("llm", "mixtral")} if "moe" in needs else {}
    slots = {"projector": None} if name == "vlora" else {}
    require_alike(*make_model(adapter={name: node_of("adapter", name)}, **llm, **slots), at_once)


# The score that a pruner asks of an encoder, from the one that a [CLS] token gives on.
SCORES = {"cls_attention": "cls", "key_attention": "column_mean"}
ENCODERS = {
    **{name: {} for name in registry.names("vision") if name not in ("hf", "fused", "qwen_vision")},
    "fused": {"name": "fused", "encoders": {"a": node_of("vision", "hf siglip"), "b": node_of("vision", "timm")}},
    **{f"hf {family}": {"name": "hf", "model_type": family} for family in FAMILIES},
    "hf siglip probe": {"name": "hf", "model_type": "siglip", "pooling_head": True},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, make_model, at_once):
    node = {**({} if name == "fused" else node_of("vision", name)), **ENCODERS[name]}
    gives = registry.build("vision", node).provides
    score = "probe" if node.get("pooling_head") else next((SCORES[word] for word in SCORES if word in gives), "")
    pruner = {"fastervlm": {"name": "fastervlm", "keep_ratio": 0.5, "score": score}} if score else {}
    require_alike(*make_model(vision=node, pruner=pruner), at_once)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_that_keep_their_shapes(family, make_model, at_once):
    pruner = {"fastervlm": {"name": "fastervlm", "keep_ratio": 0.5, "score": "column_mean"}}
    require_alike(*make_model(**qwen_builders.slots(family, pruner=pruner)), at_once)


@pytest.mark.parametrize("name", registry.names("pruner"))
def test_pruners(name, make_model, at_once):
    options = {"fastv": {"layer": 1}, "dart": {"layer": 1}, "cdpruner": {"relevance": "embeddings"}}
    options |= {"prumerge": {"score": "cls"}}
    require_alike(*make_model(pruner={name: {"name": name, **options.get(name, {})}}), at_once)


@pytest.mark.parametrize("name", registry.names("projector"))
def test_projectors(name, make_model, at_once):
    require_alike(*make_model(projector=node_of("projector", name)), at_once)


LAYOUTS = {
    "anyres": ["pinpoints=[[32,64],[64,32],[64,64]]"],
    "tiles": ["style=grid", "begin='<b>'", "end='<e>'", "most=10"],
}


@pytest.mark.parametrize("name", [n for n in registry.names("layout") if n != "native"])
def test_layouts(name, at_once):
    words = [f"layout.{word}" for word in LAYOUTS.get(name, ())]
    sizes = ["vision.width=16", "vision.depth=2", "vision.heads=2", "vision.image_size=32", "vision.patch_size=8"]
    llm = ["llm.hidden_size=32", "llm.num_layers=2", "llm.num_heads=2", "llm.max_positions=512"]
    parts = ["vision=hf", *sizes, "projector=mlp", f"layout={name}", "llm=hf", *llm]
    model, processor = zoo.compose(*parts, *words, texts=list(WORDS))
    require_alike(model.eval(), processor, at_once)


@pytest.mark.parametrize("family", MOE)
def test_several_parts_that_act_in_one_pass(family, make_model, at_once):
    """A pruner inside the LLM and adapters that route, on a language model that routes too."""
    adapters = ["lora", "mole"] if family == "mixtral" else ["lora", "moextend"]
    slots = {"adapter": {name: node_of("adapter", name) for name in adapters}, "llm": node_of("llm", family)}
    slots["adapter"]["lora"] |= {"targets": ["q_proj"]}
    require_alike(*make_model(pruner={"fastv": {"name": "fastv", "layer": 1}}, **slots), at_once)


VLORA = {"vlora": node_of("adapter", "vlora")}
WAYS = {
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "early exit": {"assistant_early_exit": 1},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "samples": {"num_return_sequences": 2, "num_beams": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", [{}, {"projector": None, "adapter": VLORA}], ids=["tokens", "vlora"])
def test_ways_to_generate(way, slots, make_model, at_once):
    model, processor = make_model(**slots)
    shaken(model)

    def work(i: int) -> Any:
        batch = processor(images=picture(i), text=f"{processor.image_token}{WORDS[i % 4]}", return_tensors="pt")
        # Half of the people ask in the ordinary way, and must not notice.
        options = WAYS[way] if i % 2 else {}
        return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)

    alone = [work(i) for i in range(PEOPLE)]
    assert all(map(torch.equal, alone, at_once(work)))


def test_a_streamer_of_transformers_gives_each_their_own_words(make_model, at_once):
    """It is read in one thread and written in another, which begins with nothing of the first."""
    from transformers import TextIteratorStreamer

    model, processor = make_model(adapter={"mole": node_of("adapter", "mole")})
    shaken(model)

    def work(i: int) -> str:
        batch = processor(images=picture(i), text=f"{processor.image_token}{WORDS[i % 4]}", return_tensors="pt")
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
        options = {**batch, "streamer": streamer, "max_new_tokens": 5, "do_sample": False}
        writer = threading.Thread(target=model.generate, kwargs=options)
        writer.start()
        said = "".join(streamer)
        writer.join()
        return said

    alone = [work(i) for i in range(PEOPLE)]
    assert len(set(alone)) > 2 and at_once(work) == alone


def test_talks_that_are_decoded_by_hand_in_turns_keep_their_own_image(make_model):
    """What an adapter made of an image goes on with the cache that begins with it, not with the adapter."""
    model, processor = make_model(projector=None, adapter=VLORA)
    shaken(model)

    @torch.no_grad()
    def begun(i: int) -> Any:
        batch = processor(images=picture(i), text=f"{processor.image_token}{WORDS[0]}", return_tensors="pt")
        return model(**batch, use_cache=True)

    @torch.no_grad()
    def next_of(out: Any) -> Any:
        return model(out.logits[:, -1:].argmax(-1), cache=out.cache, use_cache=True)

    alone = [next_of(next_of(begun(i))).logits for i in range(3)]
    talks = [begun(i) for i in range(3)]
    for _ in range(2):
        talks = [next_of(out) for out in talks]
    assert not torch.equal(alone[0], alone[1])
    assert all(torch.equal(out.logits, one) for out, one in zip(talks, alone, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vlora", "mole", "upcycle", "lora"])
def test_layers_that_run_again_in_the_thread_of_backward_find_their_pass(name, reentrant, make_model):
    """Two batches wait for backward, which runs in a thread that has seen no pass, as autograd's own for a device."""
    grads = []
    for again in (False, True):
        slots = {"projector": None} if name == "vlora" else {}
        # Balance losses refuse reentrant checkpointing.
        options = {"balance": 0.0} if name in ("mole", "upcycle") and reentrant else {}
        model, processor = make_model(adapter={name: node_of("adapter", name) | options}, **slots)
        shaken(model).train().requires_grad_(True)
        if name == "mole":
            model.adapter["mole"].config.dropout = 0.0
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = []
        for i in range(2):
            batch = processor(images=picture(i), text=f"{processor.image_token}{WORDS[i]}", return_tensors="pt")
            labels = batch["input_ids"].clone()
            losses.append(model(**batch, labels=labels).loss)
        thread = threading.Thread(target=sum(losses).backward)
        thread.start()
        thread.join()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert sum(g is not None for g in grads[0].values()) > 20
    for key, grad in grads[0].items():
        assert (grad is None) == (grads[1][key] is None), key
        assert grad is None or torch.allclose(grads[1][key], grad, atol=1e-6 * max(1, grad.abs().max())), key


@pytest.mark.parametrize("name", ["vlora", "mole"])
def test_a_pass_without_backward_is_gone_when_its_output_is(name, make_model):
    """Layers that could run again hold their pass, and a pass must not hold the graph that holds the layers."""
    model, processor = make_model(
        adapter={name: node_of("adapter", name)}, **({"projector": None} if name == "vlora" else {})
    )
    model.train().gradient_checkpointing_enable()
    batch = processor(images=picture(), text=f"{processor.image_token}{WORDS[0]}", return_tensors="pt")
    out = model(**batch, labels=batch["input_ids"])
    told = weakref.ref(out.sequence)
    del out
    gc.collect()
    assert told() is None


@dataclass
class RemembersConfig:
    pass


class Remembers(torch.nn.Module):
    """An adapter from elsewhere, which keeps the image of a pass on itself."""

    needs = frozenset({"image"})
    provides = destroys = frozenset()

    def __init__(self, config: RemembersConfig, *, llm: Any) -> None:
        super().__init__()
        self.shift, self.image = torch.nn.Parameter(torch.ones(())), 0.0
        self.__dict__["layer"] = llm.layers[0]

    def attach(self) -> None:
        self.hook = self.layer.register_forward_hook(lambda module, args, out: out + self.shift * self.image)

    def detach(self) -> None:
        self.hook.remove()

    def owns(self, name: str) -> bool:
        return False

    def condition(self, image: Any, images_per_row: Any, expand: int = 1) -> None:
        self.image = 0.0 if image is None else image.tokens.mean()

    def aux_losses(self) -> dict[str, torch.Tensor]:
        return {}


def test_parts_from_elsewhere_make_threads_take_turns(make_model, at_once):
    registry.register("adapter", "remembers")(Remembers)
    model, processor = make_model(adapter={"remembers": {"name": "remembers"}})
    work = visit(shaken(model), model.__dict__.setdefault("processor", processor))
    alone = [work(i) for i in range(PEOPLE)]
    for one, other in zip(alone, at_once(work), strict=True):
        assert [equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)


def test_a_processor_that_pads_in_several_threads(make_model, at_once):
    _, processor = make_model()

    def work(i: int) -> Any:
        texts = [f"{processor.image_token}{text}" for text in WORDS[: 1 + i % 3]]
        batch = processor(images=[picture(i)] * len(texts), text=texts, padding=True, return_tensors="pt")
        return [batch["input_ids"], batch["attention_mask"], batch["pixel_values"]]

    alone = [work(i) for i in range(PEOPLE)]
    for _ in range(3):
        for one, other in zip(alone, at_once(work), strict=True):
            assert all(map(torch.equal, one, other))
