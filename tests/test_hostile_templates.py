# ruff: noqa: E501  templates stand in one line each
"""Chat templates of others: what loops or grows for ever ends soon, with an error; sound ones give what they gave."""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.published_builders import tokenizer as fast_tokenizer
from zoo import ZooError
from zoo.text.chat_sandbox import bounded
from zoo.text.chat_template import ChatTemplate, variables_of

TALK = [{"role": "user", "content": "a question, 12345"}, {"role": "assistant", "content": "an answer"}]
DOUBLE = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = EXPR %}{% endfor %}"

BOMBS = {
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "loops that leave all out": "{% for a in range(90000) %}{% for b in range(90000) if b < 0 %}{% endfor %}{% endfor %}",
    "filters in loops": "{% for a in range(90000) %}{{ range(90000)|list|length }}{% endfor %}",
    "maps in loops": "{% for a in range(90000) %}{{ range(90000)|map('string')|list|length }}{% endfor %}",
    "sums": "{% for a in range(90000) %}{{ range(90000)|sum }}{% endfor %}",
    "a macro of macros": "".join(
        f"{{% macro m{n}() %}}{f'{{{{ m{n - 1}() }}}}' * 9 if n else 'x'}{{% endmacro %}}" for n in range(12)
    )
    + "{{ m11() }}",
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a loop of itself": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "doubling by ~": DOUBLE.replace("EXPR", "ns.x ~ ns.x"),
    "doubling by +": DOUBLE.replace("EXPR", "ns.x + ns.x"),
    "doubling by *": DOUBLE.replace("EXPR", "ns.x * 2"),
    "doubling by replace": DOUBLE.replace("EXPR", "ns.x.replace('x', 'xx')"),
    "doubling by the filter": DOUBLE.replace("EXPR", "ns.x|replace('x', 'xx')"),
    "doubling by join": DOUBLE.replace("EXPR", "[ns.x, ns.x]|join"),
    "doubling by format": DOUBLE.replace("EXPR", "'{0}{0}'.format(ns.x)"),
    "doubling by percent": DOUBLE.replace("EXPR", "'%s%s' % (ns.x, ns.x)"),
    "doubling by a block": "{% set x = 'xxxxxxxx' %}"
    + "{% set y %}{{ x }}{{ x }}{% endset %}{% set x = y %}" * 60,
    "doubling of lists": DOUBLE.replace("EXPR", "[ns.x, ns.x]") + "{{ ns.x }}",
    "lists of one list": DOUBLE.replace("EXPR", "[ns.x] * 9"),
    "lists in json": DOUBLE.replace("EXPR", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns|tojson }}",
    "repetition": "{{ 'x' * 9999999999 }}",
    "repetition of a list": "{{ [1] * 9999999999 }}",
    "repetition from the left": "{{ 9999999999 * 'x' }}",
    "powers": "{{ 9 ** 999999999 }}",
    "powers in a loop": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x ** 2 %}{% endfor %}",
    "a wide number": "{{ '%9999999999d' % 1 }}",
    "a wide text": "{{ '%-9999999999s' % 'x' }}",
    "a width beside": "{{ '%*d' % (9999999999, 1) }}",
    "precision": "{{ '%.9999999999f' % 1.5 }}",
    "a wide format": "{{ '{:>9999999999}'.format('x') }}",
    "a width in a format": "{{ '{:{}}'.format('x', 9999999999) }}",
    "a named width": "{{ '{:{w}}'.format('x', w=9999999999) }}",
    "the filter format": "{{ '%9999999999d'|format(1) }}",
    "center": "{{ 'x'.center(9999999999) }}",
    "the filter center": "{{ 'x'|center(9999999999) }}",
    "center by map": "{{ ['x']|map('center', 9999999999)|list }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "tabs": "{{ '\t'.expandtabs(9999999999) }}",
    "indent": "{{ 'a\nb'|indent(9999999999) }}",
    "json": "{{ [1]|tojson(indent=9999999999) }}",
    "batches": "{{ [1]|batch(9999999999, 'x')|list }}",
    "slices": "{{ [1]|slice(9999999999)|list }}",
    "bytes": "{{ (5).to_bytes(9999999999, 'big') }}",
    "bytes of a text": "{{ 'x'.encode().center(9999999999) }}",
    "a date": "{{ strftime_now('%9999999999Y') }}",
    "lorem ipsum": "{{ lipsum(n=99999) }}",
    "joined by a long text": "{{ range(90000)|join('x' * 9999999) }}",
    "joined by method": "{{ ('x' * 9999999).join(range(90000)|map('string')) }}",
    "comparisons": "{% set x = 'x' * 60000000 %}{{ " + " or ".join(["'y' in x"] * 4000) + " }}",
    "slices of a long text": "{% set x = 'x' * 9999999 %}{{ " + "~".join(["x[1:]|length"] * 4000) + " }}",
    "cycles": "{% for a in range(90000) %}{% for b in 'x' * 90000 %}{{ loop.cycle(1, 2) }}{% endfor %}{% endfor %}",
    "characters": "{% for a in 'x' * 9000000 %}{% for b in 'x' * 9000000 %}{% endfor %}{% endfor %}",
    "folded while it compiles": "{% set x = 'x'|center(9999999999) %}",
    "folded in a test": "{% if ('x' * 9999999999)|length %}{% endif %}",
    "brackets without end": "{{ " + "[" * 9_000,
    "loops in loops": "{% for a in [1] %}" * 50_000 + "{% endfor %}" * 50_000,
    "a sum of a hundred thousand": "{{ " + "1+" * 9_000 + "1 }}",
    "too long": "x" * 300_000,
    "the file system": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "internals by attr": "{{ (''|attr('__class__')).__mro__ }}",
    "internals by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "the messages": "{{ messages.append(1) }}",
    "no Jinja": "{% if %}",
    "the loop's depth": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(fast_tokenizer())


@pytest.fixture
def little(monkeypatch):
    """A third of a second; and a process that takes 3 GB more than it has is at fault."""
    monkeypatch.setattr("zoo.text.chat_sandbox.SECONDS", 0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (3 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_that_takes_too_much(kind, template, little):
    """Whether it is asked at once or behind a condition that the first texts do not meet."""
    template.tokenizer.chat_template = BOMBS[kind]
    began = time.thread_time()
    with pytest.raises(ZooError, match=r"refuses the turns"):
        template.render(TALK)
    assert time.thread_time() - began < 5


def test_variables_are_asked_for():
    """Which is done without running it."""
    refused = []
    for kind, text in BOMBS.items():
        try:
            assert variables_of(text) is not None
        except ZooError as error:
            assert "chat template" in str(error)
            refused.append(kind)
    assert {"no Jinja", "too long", "loops in loops", "brackets without end"} <= set(refused)


SOUND = {
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "of everything": (
        "{% set ns = namespace(n=0, out='') %}{%- macro say(m, k=2) -%}[{{ m.role|upper }}|{{ m['content']|trim }}]{%- endmacro -%}"
        "{% for m in messages %}{% if loop.first or m.role == 'user' and not loop.last %}{{ say(m) }}{% elif m.content is string %}"
        "{{ say(m)|replace('a', 'b') }}{% else %}-{% endif %}{% set ns.n = ns.n + m.content|length * 2 ** 2 %}"
        "{% set ns.out = ns.out ~ m.content.split(' ')[-1] %}{{ loop.index0 }}/{{ loop.length }}{{ loop.cycle('x', 'y') }}{% endfor %}"
        "{{ ns.n }}{{ ns.out }}{{ messages|map(attribute='role')|join(', ') }}{{ messages[0]|tojson(indent=2) }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ '%s-%05d' % ('a', 7) }}{{ '{:>9}'.format('x') }}"
        "{{ none }}{{ undefined_one }}{{ [1, 2.5, true, 'a'] }}{{ (1, 2) }}{{ {'a': [1]} }}{{ messages[::-1]|length }}"
        "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% if v == 1 %}{% continue %}{% endif %}!{% endfor %}"
        "{% set block %}in {{ messages[0].content }}{% endset %}{{ block }}{{ 'x' * 3 }}{{ 7 % 4 }}{{ 7 // 2 }}{{ -7 }}"
        "{{ '12345' ~ 99999 }}{{ ' pad '|center(12) }}{{ 'a\nb'|indent(3) }}{{ range(3)|list }}{{ 'b' in 'abc' }}"
        "{% for group in range(5)|batch(2, 0) %}{{ group }}{% endfor %}{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    ),
    "marks its answers": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    ),
    "with blanks": "  {%- if true -%}\n  x\n  {%- endif %}\n   {% for m in messages -%}\n {{ m.content }} \n{%- endfor %}\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_template_gives_what_transformers_gives(kind):
    given = {
        "conversations": [TALK * 3],
        "chat_template": SOUND[kind],
        "return_assistant_tokens_mask": "generation" in SOUND[kind],
    }
    with bounded():
        mine = render_jinja_template(**given)
    assert mine == render_jinja_template(**given)
    assert "question" in mine[0][0]


def test_a_long_dialog_is_none():
    """A thousand turns of ten thousand characters each."""
    talk = [{"role": role, "content": "a word, " * 1250} for role in ("user", "assistant")] * 500
    template = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{{ m.content|replace('<image>', '')|trim }}"
        "{% if m.content.split('</think>')[-1] and loop.index0 < messages|length - 1 %}\n{% endif %}{% endfor %}"
    )
    with bounded():
        text = render_jinja_template(conversations=[talk], chat_template=template)[0][0]
    assert len(text) > 9_000_000


def test_outside_of_the_bounds_transformers_is_as_it_was():
    with bounded():
        render_jinja_template(conversations=[TALK], chat_template=SOUND["plain"])
    text = "{{ 'x' * 99999 }}{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}"
    assert len(render_jinja_template(conversations=[TALK], chat_template=text)[0][0]) == 99999
