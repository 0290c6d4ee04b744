"""transformers' Auto classes and pipelines on what is saved here, whoever imports what first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from tests import published_builders as build

ROOT = Path(__file__).resolve().parents[1]
ASK = "is there a red circle?"
SIZES = ["vision.width=16", "vision.depth=2", "vision.heads=2", "vision.image_size=32", "vision.patch_size=8"]
TEXT = ["llm=hf", "llm.hidden_size=32", "llm.num_layers=2", "tokenizer.chat_template=chatml"]
COMPOSED = {
    "encoder of transformers": ["vision=hf", *SIZES, "projector=mlp", *TEXT],
    "timm, pruned": ["vision=timm", *SIZES, "pruner=[random]", "projector=mlp", *TEXT],
    "crops": ["vision=hf", *SIZES, "projector=mlp", "layout=anyres", "layout.pinpoints=[[32,64],[64,64]]", *TEXT],
    "no image tokens": ["vision=hf", *SIZES, "adapter=[vlora]", "adapter.vlora.skip=1", *TEXT],
}
PUBLISHED = {"llava": ["pruner=[pool]"], "llava_next": ["pruner=[random]"], "idefics3": ["adapter=[lora]"]}


@pytest.fixture(scope="module", params=[*COMPOSED, "own folders", *PUBLISHED])
def saved(request, tmp_path_factory):
    """A folder that was saved, and the model and processor that it is of."""
    root = tmp_path_factory.mktemp("saved")
    if request.param in PUBLISHED:
        getattr(build, request.param)(root / "base")
        model, processor = zoo.load(f"dir:{root / 'base'}", *PUBLISHED[request.param])
    elif request.param == "own folders":
        model, processor = zoo.compose(*own_parts(root))
    else:
        model, processor = zoo.compose(*COMPOSED[request.param], texts=build.WORDS)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root / "model", model.eval(), processor


def own_parts(root):
    """An encoder, and a language model whose tokenizer knows no image."""
    import transformers as t

    t.CLIPVisionModel(t.CLIPVisionConfig(**build.VISION)).save_pretrained(root / "clip")
    tok = build.tokenizer()
    plain = t.PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    plain.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    t.Qwen2ForCausalLM(t.Qwen2Config(**build.TEXT, vocab_size=len(plain))).save_pretrained(root / "qwen")
    plain.save_pretrained(root / "qwen")
    return [
        "vision=hf",
        f"vision.checkpoint={root / 'clip'}",
        "projector=mlp",
        f"llm.checkpoint={root / 'qwen'}",
        "llm=hf",
    ]


def talk(photo):
    return [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": ASK}]}]


def test_auto_classes_give_the_same_model_and_processor(saved):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    folder, model, processor = saved
    assert type(AutoConfig.from_pretrained(folder)) is zoo.ZooConfig
    theirs, prepares = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(theirs) is zoo.ZooModel and type(prepares) is zoo.ZooProcessor
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch, want = (p.apply_chat_template(talk(build.photo(40, 56)), **asked) for p in (prepares, processor))
    assert batch.keys() == want.keys()
    assert torch.equal(batch["input_ids"], want["input_ids"]) and torch.equal(
        batch["pixel_values"], want["pixel_values"]
    )
    torch.testing.assert_close(theirs(**batch).logits, model(**want).logits, atol=1e-6, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(processor.tokenizer) and tokenizer.image_token == processor.image_token


def test_pipelines_answer_what_the_model_answers(saved):
    from transformers import pipeline

    folder, model, processor = saved
    photos = [build.photo(40, 56), build.photo(40, 56, seed=1)]
    want = [model.chat(ASK, image=photo, max_new_tokens=6) for photo in photos]
    options = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    pipe = pipeline("image-text-to-text", model=str(folder))
    for batch_size in (1, 2):
        if batch_size > 1 and not processor.num_image_tokens:
            continue
        out = pipe(text=[talk(photo) for photo in photos], batch_size=batch_size, **options)
        assert [row[0]["generated_text"][-1]["content"].strip() for row in out] == want


ORDERS = (
    "import zoo",
    "from transformers import AutoModelForImageTextToText; import zoo",
    "import zoo; import transformers.pipelines",
)
KNOWN = """
import os, sys, traceback
import torch._dynamo, torchvision  # take longest, and are the same for each order
def known(first):
    exec(first)
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    config = type(AutoConfig.for_model("zoo"))
    mappings = AutoModel._model_mapping, AutoModelForImageTextToText._model_mapping, PROCESSOR_MAPPING
    print("KNOWN", *[mapping[config].__name__ for mapping in mappings], "after", first, flush=True)
assert not {"zoo", "transformers"} & sys.modules.keys()
for first in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            known(first)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_it_does_not_matter_what_is_imported_first():
    """Each order in a process of its own, where neither zoo nor transformers was imported."""
    done = subprocess.run(
        [sys.executable, "-c", KNOWN, *ORDERS], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("KNOWN")]
    assert lines == [f"KNOWN ZooModel ZooModel ZooProcessor after {first}" for first in ORDERS], done.stderr
