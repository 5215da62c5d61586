"""What is proved of all dialogues alike is what rendering each of them shows, and a template that looks at the texts proves nothing."""

import random

import pytest
from conftest import CHATML
from test_chat import ASK, BODY, CHATML_TOKENS, KINDS, LLAMA3, LLAMA3_TOKENS, REFUSED, byte_tokenizer, prepared, random_dialogue, turns

from recipes.common import chat
from recipes.common.outlines import outline

REAL_QWEN3 = (  # the parts of Qwen3's own template that look at a text; its tools are left out
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not(message.content.startswith("
    "'<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}{%- else %}"
    "{%- set content = '' %}{%- endif %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}{%- if message.reasoning_content is string %}"
    "{%- set reasoning_content = message.reasoning_content %}{%- else %}{%- if '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}"
    "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA2 = (  # the system's text stands in the first user turn
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for m in loop_messages %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}"
    "{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {name: build for name, (build, *_, any_roles) in KINDS.items() if any_roles} | {
    "real qwen3": lambda: byte_tokenizer(REAL_QWEN3, CHATML_TOKENS), "llama2": lambda: byte_tokenizer(LLAMA2, bos="<bos>")}


def both(messages, tokenizer):
    """What `spans` finds and what rendering this dialogue finds, or the sentence with which either refuses it."""
    found = []
    for function in (chat.spans, chat._rendered_spans):
        try:
            found.append(function(messages, tokenizer))
        except chat.TemplateError as error:
            found.append(str(error))
    return found


def proved(messages, tokenizer):
    """Whether the place of the answers is known without rendering this dialogue."""
    layout = chat._layout(tokenizer, tokenizer.chat_template, tuple(tokenizer.special_tokens_map.items()),
                          tuple((turn["role"], *turn) for turn in messages))
    return layout is not None and layout.outline.fits([turn["content"] for turn in messages])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_proved_of_all_dialogues_is_what_rendering_each_shows(name):
    tokenizer, rng = prepared(TEMPLATES[name]()), random.Random(name)
    many = [random_dialogue(rng, any_roles=True) for _ in range(60)]
    for messages in many:
        for turn in messages:
            if rng.random() < 0.1:
                turn |= {"intent": rng.choice(["a", "b"]), "content": rng.choice([" x", "x\n", "<|im_end|>", "</think>", "\ue000x"])}
        one, other = both(messages, tokenizer)
        assert one == other, messages
    assert sum(proved(messages, tokenizer) for messages in many) > 20


def test_gemma_is_proved_for_the_roles_that_it_takes():
    tokenizer = prepared(KINDS["gemma"][0]())
    assert proved(turns("Hi", "Yo", "So?", "No."), tokenizer) and not proved(turns("Hi", " Yo"), tokenizer)
    assert not proved(turns("Hi", "Yo", system="Be kind."), tokenizer)


def test_a_dialogue_is_rendered_no_more_once_its_outline_is_known(monkeypatch):
    tokenizer = prepared(byte_tokenizer(CHATML, CHATML_TOKENS))
    chat.encode(turns("Hi", "Yo", "So?", "No."), tokenizer, 999)
    monkeypatch.setattr(chat, "_render", None)
    monkeypatch.setattr(chat.outlines, "outline", None)
    assert chat.encode(turns("在吗", "在的", "a", "b"), tokenizer, 999)


@pytest.mark.parametrize("asked, texts, fits", [
    ("{% if m.content | trim %}{% endif %}", ["x", "y"], True), ("{% if m.content | trim %}{% endif %}", ["x", "y "], False),
    ("{% if '</t>' in m.content %}{% endif %}", ["x", "y"], True), ("{% if '</t>' in m.content %}{% endif %}", ["</t>", "y"], False),
    ("{% if m.content == 'x' %}{% endif %}", ["y", "y"], True), ("{% if m.content != 'x' %}{% endif %}", ["y", "x"], False),
    ("{% if m.content in ['x'] %}{% endif %}", ["y", "y"], True), ("{% if m.content in ['x'] %}{% endif %}", ["y", "x"], False),
    ("{{ m.content.lstrip('_') }}", ["y", "y_"], True), ("{{ m.content.rstrip('_') }}", ["y", "y_"], False),
    ("{% if m.content.endswith('?') %}{% endif %}", ["?y", "y"], True), ("{% if m.content.endswith('?') %}{% endif %}", ["y", "y?"], False),
    ("{% if m.content and m.content is string and m.content is not none %}a{% endif %}", ["x", "y"], True),
    ("{% if m.content and m.content is string and m.content is not none %}a{% endif %}", ["", "y"], False),
    ("", ["x", 5], False), ("", ["x", None], False),
])
def test_what_the_template_asked_of_a_text_is_a_condition(asked, texts, fits):
    shape = [("user", "role", "content"), ("assistant", "role", "content")]
    found = outline("{% for m in messages %}" + asked + "{{ m.role + m.content }}{% endfor %}", shape, False, {})
    assert found.fits(texts) == fits


LOOKS = {  # what a template may do so that what it writes depends on more than the roles
    "length": "{% if m.content | length > 3 %}long{% endif %}",
    "letter": "{{ m.content[0] }}",
    "slice": "{% if m.content[:2] == 'ab' %}ab{% endif %}",
    "loop": "{% for letter in m.content %}{{ letter }}{% endfor %}",
    "upper": "{{ m.content | upper }}",
    "replace": "{{ m.content | replace('.', '!') }}",
    "number": "{% if m.content | int > 3 %}3{% endif %}",
    "fraction": "{% if m.content | float > 3 %}3{% endif %}",
    "words": "{% if m.content | wordcount > 3 %}long{% endif %}",
    "is lower": "{% if m.content is lower %}lower{% endif %}",
    "is iterable": "{% if m.content is iterable %}{% endif %}{% if m.content is sequence %}{{ m.content.split()[0] }}{% endif %}",
    "format": "{% set text = '%s' % m.content %}{% if 'a' in text %}a{% endif %}",
    "tilde": "{% set text = m.content ~ '' %}{% if 'a' in text %}a{% endif %}",
    "join": "{% set text = [m.content] | join %}{% if 'a' in text %}a{% endif %}",
    "needle": "{% if m.content in 'a long text' %}in{% endif %}",
    "key": "{{ {'a': 1}[m.content] }}",
    "other text": "{% if m.content == messages[0].content %}same{% endif %}",
    "joined": "{% if ('x' + m.content).endswith('a') %}a{% endif %}",
    "macro": "{% macro text() %}{{ m.content }}{% endmacro %}{% if 'a' in text() %}a{% endif %}",
    "set block": "{% set text %}{{ m.content }}{% endset %}{% if 'a' in text %}a{% endif %}",
    "filter block": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "recursion": "{% for x in [[]] recursive %}{{ m.content }}{% if 'a' in loop(x) %}a{% endif %}{% endfor %}",
    "number in the text": "{% if 5 in m.content %}{% endif %}",
    "escape": "{% autoescape true %}{{ m.content }}{% endautoescape %}",
    "json": "{{ m | tojson }}",
    "whole turn": "{{ m }}",
    "another key": "{{ m.intent }}",
    "another key's truth": "{% if m.train %}{% endif %}",
    "another key's kind": "{% if m.train is string %}{% endif %}",
    "another key's value": "{% if m.train is true %}a{% endif %}",
    "a key's value in all": "{% if messages | selectattr('train', 'false') | list %}a{% endif %}",
    "same object": "{% if m.content is sameas messages[0].content %}a{% endif %}",
    "sorted": "{{ (messages | sort(attribute='content'))[0].role }}",
    "unique": "{{ messages | unique(attribute='content') | list | length }}",
    "mapped": "{{ messages | map(attribute='content') | join }}",
    "raise": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("how", LOOKS)
def test_a_template_that_looks_at_a_text_proves_nothing(how):
    shape = [("user", "role", "content", "intent", "train"), ("assistant", "role", "content", "intent", "train")]
    whole = "{% for m in messages %}" + LOOKS[how] + "{{ m.role + m.content }}{% endfor %}"
    assert outline(whole.replace(LOOKS[how], ""), shape, False, {}) is not None
    assert outline(whole, shape, False, {}) is None
    tokenizer = byte_tokenizer(BODY + LOOKS[how] + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK, CHATML_TOKENS)
    for texts in (("Hi", "Yo"), ("a text.", "12", "Hi", "A")):
        messages = [turn | {"intent": "ask", "train": True} for turn in turns(*texts)]
        one, other = both(messages, tokenizer)
        assert one == other


@pytest.mark.parametrize("why", REFUSED)
def test_what_rendering_refuses_is_refused(why):
    tokenizer = byte_tokenizer(REFUSED[why][0], CHATML_TOKENS)
    for messages in (turns("Hi", "Yo!"), turns("Hi", "Yo!", "So?", "No."), turns("Hi", "Yo!", "So?")):
        one, other = both(messages, tokenizer)
        assert one == other


def test_what_only_the_prompt_asks_of_a_text_is_a_condition():
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>' + ('x' if '?' in messages[-1].content else 'assistant') + '\n' }}{% endif %}"
    tokenizer = byte_tokenizer(BODY + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ask, CHATML_TOKENS)
    assert proved(turns("Hi", "Yo"), tokenizer) and not proved(turns("Hi?", "Yo"), tokenizer)
    with pytest.raises(chat.TemplateError, match="before turn 2 is not what the template writes"):
        chat.spans(turns("Hi?", "Yo"), tokenizer)


def test_an_end_that_the_next_text_could_make_longer_is_looked_up_in_each_dialogue():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}", [*CHATML_TOKENS, "<|im_end|>!"])
    messages = turns("Hi", "Yo", "!", "No.")
    text, (first, _) = chat.spans(messages, tokenizer)
    assert text[slice(*first)] == "Yo<|im_end|>!" and not proved(messages, tokenizer)
    assert both(messages, tokenizer)[0] == both(messages, tokenizer)[1]


def test_turns_that_a_template_does_not_get_as_they_are_are_rendered():
    tokenizer = byte_tokenizer(BODY + "{{ (m.reasoning_content or '') + m.content + '<|im_end|>\n' }}{% endfor %}" + ASK, CHATML_TOKENS)
    for more in ({"thinking": "Hm."}, {"thinking": None}, {"list": [1]}):
        messages = [turn | more for turn in turns("Hi", "Yo")]
        one, other = both(messages, tokenizer)
        assert one == other


def test_tokens_are_those_that_calling_the_tokenizer_gives():
    for split in (False, True):
        tokenizer = byte_tokenizer(CHATML, CHATML_TOKENS)
        text = "<|im_start|>user\nHi<|im_end|>"
        wanted = tokenizer(text, split_special_tokens=split)["input_ids"]
        tokenizer.split_special_tokens = split
        tokenizer.backend_tokenizer.encode_special_tokens = not split
        tokenizer.backend_tokenizer.enable_truncation(3)  # as some tokenizer.json have it
        tokenizer.backend_tokenizer.enable_padding(length=50)
        assert chat._tokens(text, tokenizer).ids == wanted and len(wanted) == (len(text) if split else 9)


def test_a_layout_is_that_of_the_template_in_use():
    tokenizer, messages = prepared(byte_tokenizer(CHATML, CHATML_TOKENS)), turns("Hi", "Yo")
    before, _ = chat.spans(messages, tokenizer)
    tokenizer.chat_template = CHATML.replace("\n", " ")
    assert chat.spans(messages, tokenizer)[0] == before.replace("\n", " ")
    tokenizer = prepared(byte_tokenizer(LLAMA3, [*LLAMA3_TOKENS, "<other>"], bos="<bos>"))
    assert chat.spans(messages, tokenizer)[0].startswith("<bos><|start")
    tokenizer.bos_token = "<other>"
    assert chat.spans(messages, tokenizer)[0].startswith("<other><|start")
