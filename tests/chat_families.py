"""Chat templates and tokenizers in the shapes of published families, each written anew and small.

What matters is kept: which tokens surround a turn, whether contents are trimmed, what is refused, what is written
behind the last answer, whether thoughts are stripped, and how the tokenizer treats blanks and special tokens.
"""

import json
from dataclasses import dataclass
from functools import cache

WORDS = [
    "what is in the picture? a red cat on a mat.",
    "where is it? on the mat, I think",
    "be kind and short",
    "hm well",
]


@dataclass(frozen=True)
class Shape:
    template: str
    end: str  # of every answer; of the last where `between` is another
    eos: str
    special: tuple[str, ...] = ()  # added tokens beside bos, eos and pad
    bos: str | None = None
    pad: str | None = "<pad>"
    kind: str = (
        "bytes"  # bytes: GPT-2's; split: a regex and bytes, as Llama 3 and Qwen; words: blanks as Llama 2 has them
    )
    rstrip: tuple[str, ...] = ()  # special tokens that swallow the blanks behind them, as Phi-3's do
    plain: tuple[str, ...] = ()  # added tokens that are not special: decoding shows them
    between: str | None = None  # what ends an answer that another question follows; None: as `end`
    stops_between: bool = True  # what ends such an answer stops generation too
    lead: str = ""  # in front of the last answer, behind the opening
    lead_between: str | None = None  # the same of an answer that another question follows; None: as `lead`
    system: str = "written"  # or "refused"
    typed: bool = False  # wants typed parts and writes images itself
    splits: bool = False  # earlier answers are not written as they are asked for: a row for each
    stops: tuple[str, ...] = ()  # texts of several tokens that end an answer
    stated: tuple[str, ...] = ()  # tokens that the checkpoint says end an answer


def turns(before: str, after: str, asks: str, start: str = "", content: str = "m['content']", last: str = "") -> str:
    """`before` may use `role`; `last` is written behind everything where nothing is asked."""
    turn = "{% set role = m['role'] %}" + before + "{{ " + content + " }}" + after
    loop = "{% for m in messages %}" + turn + "{% endfor %}"
    return start + loop + "{% if add_generation_prompt %}" + asks + "{% else %}" + last + "{% endif %}"


# The odd turns are the user's, a system turn in front apart.
ALTERNATE = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m['role'] != 'system' %}"
    "{% if (m['role'] == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}"
    "{% endif %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
)
REFUSE_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
MODEL = "<start_of_turn>{{ 'model' if role == 'assistant' else role }}\n"
GEMMA = turns(
    MODEL,
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
    start="{{ bos_token }}" + REFUSE_SYSTEM + ALTERNATE,
    content="m['content'] | trim",
)
GEMMA3 = (  # typed, and the system text in front of the first question
    "{{ bos_token }}{% set hint = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set hint = messages[0]['content'][0]['text'] + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{% set role = m['role'] %}{% if (role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}" + MODEL + "{{ hint if loop.first else '' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = turns("<|im_start|>{{ role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
LLAMA3 = turns(
    "<|head|>{{ role }}<|/head|>\n\n",
    "<|eot_id|>",
    "<|head|>assistant<|/head|>\n\n",
    start="{{ bos_token }}",
    content="m['content'] | trim",
)
PHI3 = turns("<|{{ role }}|>\n", "<|end|>\n", "<|assistant|>\n", last="{{ eos_token }}")
PHI4_MINI = turns("<|{{ role }}|>", "<|end|>", "<|assistant|>", last="{{ eos_token }}")
# The system text stands in front of the first question, in brackets of its own or not.
INST = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set hint = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set hint = '' %}{% set rest = messages %}{% endif %}"
)
MISTRAL = (
    ALTERNATE + INST + "{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.first and hint %}{{ hint }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    ALTERNATE + INST + "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and hint %}<<SYS>>\n{{ hint }}\n<</SYS>>\n\n{% endif %}{{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = turns(
    "{% if role != 'system' %}{{ 'USER' if role == 'user' else 'ASSISTANT' }}: {% endif %}",
    "{{ eos_token if role == 'assistant' else ' ' }}",
    "ASSISTANT:",
)
TULU = turns(
    "<|{{ role }}|>\n",
    "{% if role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}",
    "<|assistant|>\n",
    start="{{ bos_token }}",
)
COMMAND_R = turns(
    "<|TURN|><|{{ role | upper }}|>",
    "<|END_OF_TURN|>",
    "<|TURN|><|ASSISTANT|>",
    start="{{ bos_token }}",
    content="m['content'].strip()",
)
# Thoughts: earlier turns lose theirs, the last turn always has one.
QWEN3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}{% set thought = '' %}"
    "{% if '</think>' in m['content'] %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_THINKING = QWEN3.removesuffix("{% endif %}") + "<think>\n{% endif %}"
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}<|Assistant|>"
    "{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
GLM4 = turns("<|{{ role }}|>\n", "", "<|assistant|>\n", start="[gMASK]<sop>")
HARMONY = (
    "<|start|>system<|message|>be kind<|end|>{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TWO_ENDS = turns(
    "<|{{ role }}|>",
    "{{ ('<|stop|>' if loop.last else '<|more|>') if role == 'assistant' else '' }}",
    "<|assistant|>",
)
HARMONY_BLOCKS = HARMONY.replace("<|start|>assistant<|channel|>", "<|start|>assistant{% generation %}<|channel|>")
HARMONY_BLOCKS = HARMONY_BLOCKS.replace("{% else %}<|start|>{{", "{% endgeneration %}{% else %}<|start|>{{")
MARKED = (  # as SmolLM 3: the template says itself what is generated
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "<think>\n\n</think>\n{{ m['content'].strip() }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_ENDS = turns("### {{ role }}:\n", "\n### end\n", "### assistant:\n")
IMAGES = "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
LLAVA = (  # typed parts, images first, no end
    "{% for m in messages %}{{ '' if m['role'] == 'system' else m['role'].upper() + ': ' }}"
    + IMAGES
    + "{% for c in m['content'] %}{% if c['type'] == 'text' %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
INTERNVL = turns(
    "<|im_start|>{{ role }}\n" + IMAGES,
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
    content="m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join",
)

IM = ("<|im_start|>", "<|im_end|>")
GEMMAS = ("<start_of_turn>", "<end_of_turn>")
PHIS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
THINK = ("<think>", "</think>")
SHAPES = {
    "chatml on a base tokenizer": Shape(CHATML, "<|im_end|>", "<|endoftext|>", IM, kind="split"),
    "qwen 2.5": Shape(DEFAULT_SYSTEM + CHATML, "<|im_end|>", "<|im_end|>", IM, kind="split"),
    "smollm 2": Shape(DEFAULT_SYSTEM + CHATML, "<|im_end|>", "<|im_end|>", IM, bos="<|im_start|>", pad="<|im_end|>"),
    "gemma": Shape(GEMMA, "<end_of_turn>", "<eos>", GEMMAS, "<bos>", kind="words", system="refused"),
    "gemma 3": Shape(GEMMA3, "<end_of_turn>", "<eos>", GEMMAS, "<bos>", kind="words", typed=True),
    "llama 3": Shape(
        LLAMA3, "<|eot_id|>", "<|end_of_text|>", ("<|head|>", "<|/head|>", "<|eot_id|>"), "<|begin|>", kind="split"
    ),
    "phi 3": Shape(PHI3, "<|end|>", "<|endoftext|>", PHIS, "<s>", kind="words", rstrip=PHIS),
    "phi 4 mini": Shape(PHI4_MINI, "<|end|>", "<|endoftext|>", PHIS, kind="split"),
    "mistral": Shape(MISTRAL, "</s>", "</s>", ("[INST]", "[/INST]"), "<s>", kind="words"),
    "llama 2": Shape(LLAMA2, "</s>", "</s>", (), "<s>", kind="words"),
    "vicuna": Shape(VICUNA, "</s>", "</s>", (), "<s>", pad=None, kind="words"),
    "tulu": Shape(TULU, "<|endoftext|>", "<|endoftext|>", (), "<|endoftext|>", kind="split"),
    "command r": Shape(
        COMMAND_R, "<|END_OF_TURN|>", "<|END_OF_TURN|>", ("<|TURN|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"),
        "<BOS>",
    ),
    "qwen 3": Shape(
        QWEN3, "<|im_end|>", "<|im_end|>", IM, kind="split", plain=THINK,
        lead="<think>\n\n</think>\n\n", lead_between="",
    ),
    "qwen 3 thinking": Shape(
        QWEN3_THINKING, "<|im_end|>", "<|im_end|>", IM, kind="split", plain=THINK,
        lead="\n</think>\n\n", splits=True,
    ),
    "deepseek r1": Shape(
        R1, "<|eos|>", "<|eos|>", ("<|User|>", "<|Assistant|>"), "<|bos|>", kind="split", plain=THINK
    ),
    "glm 4": Shape(
        GLM4, "<|endoftext|>", "<|endoftext|>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        kind="split", between="",
    ),
    "glm 4 that states its ends": Shape(
        GLM4, "<|endoftext|>", "<|endoftext|>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        kind="split", between="<|user|>", stated=("<|user|>",),
    ),
    "harmony": Shape(
        HARMONY, "<|return|>", "<|return|>", ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        kind="split", lead="<|channel|>final<|message|>", between="",
    ),
    "harmony with generation blocks": Shape(
        HARMONY_BLOCKS, "<|return|>", "<|return|>", ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        kind="split", lead="<|channel|>final<|message|>", between="<|end|>", stops_between=False,
    ),
    "two ends": Shape(
        TWO_ENDS, "<|stop|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|stop|>", "<|more|>"),
        between="<|more|>",
    ),
    "generation blocks": Shape(
        MARKED, "<|im_end|>", "<|endoftext|>", IM, kind="split", lead="<think>\n\n</think>\n"
    ),
    "chatml in words": Shape(CHATML, "<|im_end|>", "</s>", (), "<s>", kind="words", stops=("<|im_end|>",)),
    "text ends": Shape(TEXT_ENDS, "\n### end", "<|endoftext|>", kind="split", stops=("### end",)),
    "end not special": Shape(CHATML, "<|im_end|>", "<|endoftext|>", ("<|im_start|>",), plain=("<|im_end|>",)),
    "llava": Shape(LLAVA, "</s>", "</s>", (), "<s>", kind="words", lead=" ", between="", typed=True),
    "smolvlm": Shape(
        SMOLVLM, "<end_of_utterance>", "<end_of_utterance>", ("<|im_start|>",), lead=" ", typed=True
    ),
    "internvl": Shape(INTERNVL, "<|im_end|>", "<|endoftext|>", IM, kind="split", typed=True),
}  # fmt: skip


def tokenizer(shape: Shape):
    """A tokenizer of a shape: 300 to 500 ids, trained on `WORDS`."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=_trained(shape), bos_token=shape.bos, eos_token=shape.eos, pad_token=shape.pad,
        extra_special_tokens={"image_token": "<image>"} if shape.typed else {},
    )  # fmt: skip
    made.chat_template = shape.template
    return made


@cache
def _json(shape: Shape) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    names = [
        t
        for t in dict.fromkeys([shape.pad, shape.bos, shape.eos, *shape.special, *(["<image>"] if shape.typed else [])])
        if t
    ]
    if shape.kind == "words":  # Llama 2: a blank in front of texts, blanks as a letter, bytes for what is unknown
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece goes over a blank
        alphabet, names = [], ["<unk>", *names, *(f"<0x{i:02X}>" for i in range(256))]
    else:
        bpe = Tokenizer(models.BPE())
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if shape.kind == "split":  # words, numbers and runs of blanks, as Qwen and Llama 3 do
            words = Regex(
                r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            whole = pre_tokenizers.Sequence([
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ])  # fmt: skip
        bpe.pre_tokenizer, bpe.decoder, alphabet = whole, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    corpus = [*WORDS * 3, *([] if shape.kind == "words" else ["a\n\nb\n\n\nc"] * 4)]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=len(names) + 330, special_tokens=names, initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    if shape.kind == "words":
        bpe.pre_tokenizer = None
    bpe.add_special_tokens([AddedToken(t, rstrip=True, special=True, normalized=False) for t in shape.rstrip])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in shape.plain])
    content = json.loads(bpe.to_str())  # bytes are letters, not added tokens
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(content)


def _trained(shape: Shape):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_json(shape))
