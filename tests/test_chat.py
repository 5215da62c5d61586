"""What a dialogue is trained on, token by token, for the kinds of chat template that models come with.

    python -m pytest tests/test_chat.py

Most tests use a tokenizer that turns each byte into one token, next to a few special tokens: positions can be counted by hand.
"""

import random
from dataclasses import replace

import pytest
import torch
from conftest import CHATML, DIALOGUES, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from recipes.common import chat
from recipes.common.chat import IGNORE, TemplateError, encode, end_of_turn_id, pad, prepare, prompt
from recipes.common.errors import UserError

WHOLE = 10**6  # a max_length that nothing exceeds

GENERATION = (  # the tags with which a template tells by itself what the assistant wrote
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # thoughts are dropped from history; what follows the last user turn gets a block of thoughts, be it an empty one
    "{% set ns = namespace(query=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set thought = '' %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.query and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<start_of_turn>", "<end_of_turn>"]


def byte_tokenizer(template=None, specials=(), merges=(), bos=None, eos="<eos>", pad_token=None, post_processor=None):
    """A token a byte (`merges`: pairs that become one more token), with `specials` as special tokens: strings or AddedTokens."""
    names = [name for name in (bos, eos, pad_token) if name] + list(specials)
    specials = [s if isinstance(s, AddedToken) else AddedToken(s, special=True, normalized=False) for s in names]
    vocabulary = [s.content for s in specials] + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad_token)
    fast.chat_template = template
    return fast


def plain():
    tokenizer = byte_tokenizer()
    prepare(tokenizer)
    return tokenizer


def chatml(**options):
    return byte_tokenizer(CHATML, CHATML_TOKENS, **options)


def llama3(bos_in_post_processor=True):
    """Like Llama 3's: the tokenizer writes bos by itself, and so does the template."""
    writes_bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)]) if bos_in_post_processor else None
    return byte_tokenizer(LLAMA3, LLAMA3_TOKENS, bos="<bos>", post_processor=writes_bos)


KINDS = {  # how to build the tokenizer; text that the model writes before an answer; ... before the last one; end of turn; takes any roles
    "plain": (plain, " ", " ", "<eos>", True),
    "plain-gpt2": (lambda: prepared(tiny_tokenizer("gpt2")), " ", " ", "<|endoftext|>", True),
    "chatml": (chatml, "", "", "<|im_end|>", True),
    "chatml-merges": (lambda: tiny_tokenizer("chatml"), "", "", "<|im_end|>", True),
    "generation": (lambda: byte_tokenizer(GENERATION, CHATML_TOKENS), "", "", "<|im_end|>", True),
    "llama3": (llama3, "", "", "<|eot_id|>", True),
    "gemma": (lambda: byte_tokenizer(GEMMA, GEMMA_TOKENS, bos="<bos>"), "", "", "<end_of_turn>", False),
    "qwen3": (lambda: byte_tokenizer(QWEN3, CHATML_TOKENS), "", "", "<|im_end|>", True),
}


def prepared(tokenizer):
    prepare(tokenizer)
    return tokenizer


def turns(*contents, system=None, start="user"):
    """Alternating turns, the user first; `system` opens the dialogue."""
    roles = ("user", "assistant") if start == "user" else ("assistant", "user")
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def supervised(encoded):
    return [label for label in encoded.labels if label != IGNORE]


def assert_mask(encoded, tokenizer, *expected):
    """Trained on are exactly the `expected` runs: (position of the run's first token, its text)."""
    wanted = {}
    for position, text in expected:
        ids = ids_of(text, tokenizer)
        wanted.update(zip(range(position, position + len(ids)), ids, strict=True))
    found = {t: label for t, label in enumerate(encoded.labels) if label != IGNORE}
    assert len(encoded.labels) == len(encoded.input_ids)
    assert found == wanted, f"trained on {text_of(list(found.values()), tokenizer)!r} at {list(found)}, not at {list(wanted)}"
    assert {t: encoded.input_ids[t] for t in found} == found


# ------------------------------------------------------------------------------------------------- masks, by template


def test_chatml_every_token_written_out():
    tokenizer = chatml()
    encoded = encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE)
    start, end = "<|im_start|>", "<|im_end|>"
    user, assistant = [start, *"user", "\n"], [start, *"assistant", "\n"]
    assert [tokenizer.decode([i]) for i in encoded.input_ids] == [
        *user, *"Hi", end, "\n", *assistant, *"Yo", end, "\n", *user, *"So?", end, "\n", *assistant, *"No.", end, "\n"]
    assert [tokenizer.decode([i]) if i != IGNORE else None for i in encoded.labels] == [
        *[None] * 6, *[None] * 2, None, None, *[None] * 11, "Y", "o", end, None,
        *[None] * 6, *[None] * 3, None, None, *[None] * 11, "N", "o", ".", end, None]
    assert_mask(encoded, tokenizer, (21, "Yo<|im_end|>"), (47, "No.<|im_end|>"))


def test_plain_template_ends_a_reply_with_eos_and_leaves_the_blank_before_it_to_the_reply():
    tokenizer = plain()
    encoded = encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE)
    assert text_of(encoded.input_ids, tokenizer) == "User: Hi\n\nAssistant: Yo<eos>\n\nUser: So?\n\nAssistant: No.<eos>\n\n"
    assert_mask(encoded, tokenizer, (20, " Yo<eos>"), (47, " No.<eos>"))


def test_plain_template_on_a_gpt2_tokenizer_with_merges():
    tokenizer = prepared(tiny_tokenizer("gpt2"))
    encoded = encode(DIALOGUES[0]["messages"], tokenizer, WHOLE)
    head = "You are the assistant of a shop.\n\nUser: Where is my order?\n\nAssistant:"
    first, middle = " What is its number, please?<|endoftext|>", "\n\nUser: MW204518\n\nAssistant:"
    last = " It arrives on Friday.<|endoftext|>"
    assert text_of(encoded.input_ids, tokenizer) == head + first + middle + last + "\n\n"
    second = len(ids_of(head + first + middle, tokenizer))
    assert_mask(encoded, tokenizer, (len(ids_of(head, tokenizer)), first), (second, last))


def test_plain_template_opens_with_bos_where_the_model_has_its_own():
    tokenizer = byte_tokenizer(bos="<bos>")
    assert "chat template" in prepare(tokenizer)
    encoded = encode(turns("Hi", "Yo"), tokenizer, WHOLE)
    assert text_of(encoded.input_ids, tokenizer) == "<bos>User: Hi\n\nAssistant: Yo<eos>\n\n"
    assert_mask(encoded, tokenizer, (21, " Yo<eos>"))


def test_template_with_generation_tags_agrees_with_its_own_tags():
    tokenizer = byte_tokenizer(GENERATION, CHATML_TOKENS)
    messages = turns("Hi", "Yo", "So?", "No.")
    encoded = encode(messages, tokenizer, WHOLE)
    assert_mask(encoded, tokenizer, (21, "Yo<|im_end|>"), (47, "No.<|im_end|>"))
    own = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert own["input_ids"] == encoded.input_ids
    assert own["assistant_masks"] == [int(label != IGNORE) for label in encoded.labels]


def test_llama3_trims_answers_and_ends_them_with_its_own_token():
    tokenizer = llama3()
    encoded = encode(turns("Hi", "  Yo\n", "So?", "No."), tokenizer, WHOLE)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text_of(encoded.input_ids, tokenizer) == (
        "<bos>" + head.format("user") + "Hi<|eot_id|>" + head.format("assistant") + "Yo<|eot_id|>"
        + head.format("user") + "So?<|eot_id|>" + head.format("assistant") + "No.<|eot_id|>")
    # bos; 8 + 3 tokens of the first user turn; 13 of the assistant's header; 3; 8 + 4; 13
    assert_mask(encoded, tokenizer, (25, "Yo<|eot_id|>"), (53, "No.<|eot_id|>"))


def test_gemma_calls_the_assistant_model():
    tokenizer = KINDS["gemma"][0]()
    encoded = encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE)
    assert text_of(encoded.input_ids, tokenizer) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n")
    assert_mask(encoded, tokenizer, (18, "Yo<end_of_turn>"), (40, "No.<end_of_turn>"))


@pytest.mark.parametrize("messages, reason", [
    (turns("Hi", "Yo", system="Be kind."), "System role not supported"),
    ([*turns("Hi"), *turns("Hey", "Yo")], "roles must alternate"),
])
def test_gemma_refuses_what_its_template_refuses(messages, reason):
    tokenizer = KINDS["gemma"][0]()
    with pytest.raises(TemplateError, match=reason):
        encode(messages, tokenizer, WHOLE)
    with pytest.raises(TemplateError, match=reason):
        prompt(messages[:-1], tokenizer, WHOLE)


def test_qwen3s_empty_block_of_thoughts_is_written_by_the_template_and_not_trained_on():
    tokenizer = KINDS["qwen3"][0]()
    prepare(tokenizer)
    encoded = encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE)
    assert text_of(encoded.input_ids, tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nNo.<|im_end|>\n")
    assert_mask(encoded, tokenizer, (21, "Yo<|im_end|>"), (47 + 19, "No.<|im_end|>"))
    asked = prompt(turns("Hi", "Yo", "So?"), tokenizer, WHOLE)
    assert text_of(asked, tokenizer).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert encoded.input_ids[:66] == asked


@pytest.mark.parametrize("answers", [("<think>Hm.</think>Yo", "No."), ("Yo", "<think>\nHm.\n</think>\n\nNo.")])
def test_qwen3_answers_with_thoughts_are_refused_as_the_template_rewrites_them(answers):
    with pytest.raises(TemplateError, match="turn [24]"):
        encode(turns("Hi", answers[0], "So?", answers[1]), KINDS["qwen3"][0](), WHOLE)


# ------------------------------------------------------------------------------------------------- masks, by dialogue


def test_system_turn_is_not_trained_on():
    encoded = encode(turns("Hi", "Yo", system="Be kind."), chatml(), WHOLE)
    assert text_of(encoded.input_ids, chatml()).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi")
    assert_mask(encoded, chatml(), (39, "Yo<|im_end|>"))


def test_chinese_answers_include_each_token_inside_a_character():
    tokenizer = chatml()
    encoded = encode(turns("在吗", "好的😊", "谢", "嗯"), tokenizer, WHOLE)
    # 3 bytes a character, 4 for the emoji: 6 + 6 + 2 tokens, 11 of the opening, then 3 + 3 + 4 and the end of the turn
    assert_mask(encoded, tokenizer, (25, "好的😊<|im_end|>"), (37 + 6 + 3 + 2 + 11, "嗯<|im_end|>"))
    assert [label != IGNORE for label in encoded.labels[25:37]] == [True] * 11 + [False]


def test_chinese_with_merges_that_do_not_stop_at_characters():
    byte = chatml().convert_ids_to_tokens(ids_of("谢", chatml()))
    tokenizer = chatml(merges=[(byte[1], byte[2]), (byte[1] + byte[2], byte[0])])  # the second spans two characters
    assert len(ids_of("谢谢", tokenizer)) == 3
    encoded = encode(turns("谢谢", "谢谢"), tokenizer, WHOLE)
    assert_mask(encoded, tokenizer, (6 + 3 + 2 + 11, "谢谢<|im_end|>"))
    assert len(supervised(encoded)) == 4


def test_train_false_leaves_a_turn_out_and_keeps_it_as_context():
    tokenizer, messages = chatml(), turns("Hi", "Yo", "So?", "No.")
    messages[1]["train"] = False
    encoded = encode(messages, tokenizer, WHOLE)
    assert encoded.input_ids == encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE).input_ids
    assert_mask(encoded, tokenizer, (47, "No.<|im_end|>"))
    messages[1]["train"], messages[3]["train"] = True, False
    assert_mask(encode(messages, tokenizer, WHOLE), tokenizer, (21, "Yo<|im_end|>"))


def test_train_true_on_a_user_turn_trains_nothing():
    messages = turns("Hi", "Yo")
    messages[0]["train"] = True
    assert_mask(encode(messages, chatml(), WHOLE), chatml(), (21, "Yo<|im_end|>"))


def test_no_turn_to_train_on_is_none():
    messages = turns("Hi", "Yo")
    messages[1]["train"] = False
    assert encode(messages, chatml(), WHOLE) is None
    assert encode(turns("Hi"), chatml(), WHOLE) is None


def test_end_of_turn_is_trained_on_when_it_is_also_the_padding():
    tokenizer = plain()
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    encoded = encode(turns("Hi", "Yo"), tokenizer, WHOLE)
    assert_mask(encoded, tokenizer, (20, " Yo<eos>"))
    rows = [{"input_ids": encoded.input_ids, "labels": encoded.labels}, {"input_ids": [5], "labels": [IGNORE]}]
    batch = pad(rows, tokenizer.pad_token_id)
    assert batch["labels"][0].tolist() == encoded.labels and batch["labels"][0, 23] == tokenizer.eos_token_id


def test_two_user_turns_in_a_row():
    encoded = encode([*turns("Hi"), *turns("So?", "No.")], chatml(), WHOLE)
    assert_mask(encoded, chatml(), (10 + 11 + 11, "No.<|im_end|>"))


@pytest.mark.parametrize("kind, first, second", [
    ("plain", (10, " Yo<eos>"), (16 + 10 + 10, " No.<eos>")),
    ("chatml", (11, "Yo<|im_end|>"), (15 + 10 + 11, "No.<|im_end|>")),
    ("llama3", (1 + 13, "Yo<|eot_id|>"), (1 + 16 + 11 + 13, "No.<|eot_id|>")),
])
def test_an_assistant_that_speaks_first_is_trained_on(kind, first, second):
    tokenizer, messages = KINDS[kind][0](), turns("Yo", "Hi", "No.", start="assistant")
    encoded = encode(messages, tokenizer, WHOLE)
    assert_mask(encoded, tokenizer, first, second)
    assert prompt([], tokenizer, WHOLE) == encoded.input_ids[: first[0]]
    assert prompt(messages[:2], tokenizer, WHOLE) == encoded.input_ids[: second[0]]


def test_an_assistant_that_speaks_first_is_refused_where_its_opening_is_unknown():
    with pytest.raises(TemplateError, match="roles must alternate"):
        encode(turns("Yo", "Hi", "No.", start="assistant"), KINDS["gemma"][0](), WHOLE)
    llama2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
              "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}")
    tokenizer = byte_tokenizer(llama2)
    prepare(tokenizer)
    assert_mask(encode(turns("Hi", "Yo"), tokenizer, WHOLE), tokenizer, (17, " Yo <eos>"))
    with pytest.raises(TemplateError, match="how the assistant opens a dialogue"):
        encode(turns("Yo", "Hi", "No.", start="assistant"), tokenizer, WHOLE)


def test_two_assistant_turns_in_a_row_are_both_trained_on():
    messages = [*turns("Hi", "Yo"), {"role": "assistant", "content": "No."}]
    assert_mask(encode(messages, chatml(), WHOLE), chatml(), (21, "Yo<|im_end|>"), (36, "No.<|im_end|>"))


def test_a_turn_with_the_text_of_another_is_told_apart_by_its_place():
    encoded = encode(turns("Yo", "Yo", "Yo", "Yo", system="Yo"), chatml(), WHOLE)
    assert_mask(encoded, chatml(), (12 + 10 + 11, "Yo<|im_end|>"), (12 + 10 + 15 + 10 + 11, "Yo<|im_end|>"))


def test_end_of_turn_that_swallows_the_line_break_is_trained_on():  # Phi-3's <|end|> is such a token
    swallowing = AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True)
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", swallowing])
    prepare(tokenizer)
    encoded = encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE)
    assert_mask(encoded, tokenizer, (20, "Yo<|im_end|>"), (44, "No.<|im_end|>"))


@pytest.mark.parametrize("template, position", [(CHATML, 21), (None, 20)])
def test_blanks_inside_an_answer_are_trained_on_where_the_tokenizer_trims_offsets(template, position):  # Pythia's, OLMo's
    tokenizer = byte_tokenizer(template, CHATML_TOKENS, post_processor=processors.ByteLevel(trim_offsets=True))
    prepare(tokenizer)
    assert tokenizer("a  b", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 2), (3, 3), (3, 4)]
    answer, end = ("a  b ", "<|im_end|>") if template else (" a  b ", "<eos>")
    assert_mask(encode(turns("Hi", "a  b "), tokenizer, WHOLE), tokenizer, (position, answer + end))


def test_a_blank_at_the_end_of_the_prompt_is_not_trained_on_where_the_tokenizer_trims_offsets():
    template = chat.PLAIN_TEMPLATE.replace("'Assistant:'", "'Assistant: '")
    tokenizer = byte_tokenizer(template, post_processor=processors.ByteLevel(trim_offsets=True))
    prepare(tokenizer)  # there the blank's offsets are the place where the answer starts
    assert_mask(encode(turns("Hi", "Yo"), tokenizer, WHOLE), tokenizer, (21, "Yo<eos>"))


def test_bos_is_written_once():
    tokenizer = llama3()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # the tokenizer alone would write one more
    encoded = encode(turns("Hi", "Yo"), tokenizer, WHOLE)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1 and encoded.input_ids[0] == tokenizer.bos_token_id
    assert prompt(turns("Hi"), tokenizer, WHOLE).count(tokenizer.bos_token_id) == 1
    assert encoded == encode(turns("Hi", "Yo"), llama3(bos_in_post_processor=False), WHOLE)


# ------------------------------------------------------------------------------ the assertion itself rejects bad masks


def every_token(encoded):
    return replace(encoded, labels=list(encoded.input_ids))


def user_turn_too(encoded):
    return replace(encoded, labels=encoded.labels[:6] + encoded.input_ids[6:9] + encoded.labels[9:])


def without_end_of_turn(encoded, end):
    return replace(encoded, labels=[IGNORE if label == end else label for label in encoded.labels])


def one_too_early(encoded):
    return replace(encoded, labels=encoded.labels[1:] + [IGNORE])


def line_break_after_the_end(encoded):
    return replace(encoded, labels=encoded.labels[:-1] + encoded.input_ids[-1:])


def last_turn_only(encoded):
    return replace(encoded, labels=[IGNORE] * 30 + encoded.labels[30:])


@pytest.mark.parametrize("broken", [
    every_token, user_turn_too, without_end_of_turn, one_too_early, line_break_after_the_end, last_turn_only])
def test_a_broken_mask_fails_the_assertion(broken):
    tokenizer = chatml()
    right = encode(turns("Hi", "Yo", "So?", "No."), tokenizer, WHOLE)
    expected = (21, "Yo<|im_end|>"), (47, "No.<|im_end|>")
    assert_mask(right, tokenizer, *expected)
    wrong = broken(right, end_of_turn_id(tokenizer)) if broken is without_end_of_turn else broken(right)
    with pytest.raises(AssertionError):
        assert_mask(wrong, tokenizer, *expected)


@pytest.mark.parametrize("name, broken", [
    ("spans", lambda messages, tokenizer: (tokenizer.apply_chat_template(messages, tokenize=False), [(0, 99)])),  # finds all of it
    ("_end_of_turn", lambda rest, tokenizer: 0),  # forgets the token that ends a turn
])
def test_a_broken_search_for_the_turns_is_noticed(monkeypatch, name, broken):
    tokenizer = chatml()
    monkeypatch.setattr(chat, name, broken)
    with pytest.raises(AssertionError):
        assert_mask(encode(turns("Hi", "Yo"), tokenizer, WHOLE), tokenizer, (21, "Yo<|im_end|>"))


# --------------------------------------------------------------------------------------------------------- truncation

LONG = turns("Hi", "Yo", "So?", "No.", "Why", "Eh", system="Be kind.")  # ChatML: 18 + (10 + 15) + (11 + 16) + (11 + 15) tokens
LONG_LENGTHS = {0: 96, 2: 71, 4: 44}  # dropped turns: tokens that are left


@pytest.mark.parametrize("max_length, dropped", [(96, 0), (95, 2), (71, 2), (70, 4), (44, 4)])
def test_a_long_dialogue_loses_its_oldest_exchanges_and_nothing_else(max_length, dropped):
    tokenizer = chatml()
    encoded = encode(LONG, tokenizer, max_length)
    assert encoded.dropped_turns == dropped
    assert len(encoded.input_ids) == LONG_LENGTHS[dropped]
    assert encoded == replace(encode(LONG[:1] + LONG[1 + dropped :], tokenizer, WHOLE), dropped_turns=dropped)
    expected = [(18 + 21, "Yo<|im_end|>"), (18 + 25 + 22, "No.<|im_end|>"), (18 + 25 + 27 + 22, "Eh<|im_end|>")][dropped // 2 :]
    shift = LONG_LENGTHS[0] - LONG_LENGTHS[dropped]
    assert_mask(encoded, tokenizer, *[(position - shift, text) for position, text in expected])
    text = text_of(encoded.input_ids, tokenizer)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n") and text.endswith("assistant\nEh<|im_end|>\n")


def test_none_when_the_last_exchange_does_not_fit():
    assert encode(LONG, chatml(), 44) is not None
    assert encode(LONG, chatml(), 43) is None


def test_none_when_shortening_leaves_no_turn_to_train_on():
    messages = [dict(m) for m in LONG]
    messages[-1]["train"] = False
    assert encode(messages, chatml(), 71).dropped_turns == 2
    assert encode(messages, chatml(), 70) is None


def test_user_turns_in_a_row_are_dropped_or_kept_together():
    tokenizer = chatml()
    messages = [*turns("A", "B"), *turns("C"), *turns("D", "E")]  # 9 + 14, 9, 9 + 14
    encoded = encode(messages, tokenizer, 54)
    assert encoded.dropped_turns == 2 and len(encoded.input_ids) == 32
    assert encode(messages, tokenizer, 31) is None  # never the second of the two user turns alone


def test_an_opening_assistant_turn_is_dropped_alone():
    encoded = encode(turns("Yo", "Hi", "No.", start="assistant"), chatml(), 30)
    assert encoded.dropped_turns == 1
    assert_mask(encoded, chatml(), (21, "No.<|im_end|>"))


def test_what_follows_the_last_answer_is_kept():
    messages = turns("A", "B", "C", "D", "E")
    encoded = encode(messages, chatml(), 40)
    assert encoded.dropped_turns == 2
    assert text_of(encoded.input_ids, chatml()).endswith("assistant\nD<|im_end|>\n<|im_start|>user\nE<|im_end|>\n")


# ------------------------------------------------------------------------------------------------------------- prompts


def span_starts(encoded):
    """Positions where a run of trained tokens begins."""
    return [t for t, label in enumerate(encoded.labels) if label != IGNORE and (t == 0 or encoded.labels[t - 1] == IGNORE)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_stands_before_the_answer_in_training(kind):
    tokenizer = KINDS[kind][0]()
    prepare(tokenizer)
    for messages in (turns("Hi", "Yo"), turns("Hi", "Yo", "So?", "No.", "在吗", "在的")):
        encoded = encode(messages, tokenizer, WHOLE)
        starts = span_starts(encoded)
        assert len(starts) == len(messages) // 2
        for i, start in enumerate(starts):
            # Qwen3 drops the thinking block from history: a turn is asked for with it, and stands in later history without it.
            block = ids_of("<think>\n\n</think>\n\n", tokenizer) if kind == "qwen3" and start != starts[-1] else []
            assert prompt(messages[: 2 * i + 1], tokenizer, WHOLE) == encoded.input_ids[:start] + block


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_never_in_the_prompt(kind):
    tokenizer = KINDS[kind][0]()
    prepare(tokenizer)
    messages = turns("Hi", "ZQ1", "So?", "ZQ2", "Why?", "ZQ3")
    for i in (1, 3, 5):
        text = text_of(prompt(messages[:i], tokenizer, WHOLE), tokenizer)
        assert [f"ZQ{n}" in text for n in (1, 2, 3)] == [i > 1, i > 3, False]


def test_a_long_prompt_is_shortened_like_training_rows():
    tokenizer, messages = chatml(), LONG[:-1]  # 85 - 4 + 11 - 11 tokens: see LONG
    whole = prompt(messages, tokenizer, WHOLE)
    assert len(whole) == 96 - 4  # all but the last answer's "Eh", its end and the line break
    assert prompt(messages, tokenizer, 92) == whole
    assert prompt(messages, tokenizer, 91) == prompt(LONG[:1] + LONG[3:-1], tokenizer, WHOLE)
    assert prompt(messages, tokenizer, 40) == prompt(LONG[:1] + LONG[5:-1], tokenizer, WHOLE)
    assert prompt(messages, tokenizer, 39) is None


def test_a_prompt_after_two_user_turns_keeps_both():
    tokenizer = chatml()
    messages = [*turns("A", "B"), *turns("C"), *turns("D")]
    assert prompt(messages, tokenizer, 35) == prompt(messages[2:], tokenizer, WHOLE)
    assert prompt(messages, tokenizer, 28) is None


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_turn_id(kind):
    tokenizer = KINDS[kind][0]()
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(KINDS[kind][3])


# ----------------------------------------------------------------------------------------------------------------- pad


def test_pad_fills_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = pad(rows, pad_id=0)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORE, 6, 7], [8, IGNORE, IGNORE]],
    }
    assert all(value.dtype == torch.long for value in batch.values())


def test_pad_masks_by_length_not_by_token():
    batch = pad([{"input_ids": [5, 0], "labels": [5, 0]}, {"input_ids": [5, 0, 9], "labels": [IGNORE, IGNORE, 9]}], pad_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 0, IGNORE], [IGNORE, IGNORE, 9]]


# ------------------------------------------------------------------------------------------------------------- prepare


def test_prepare_gives_the_plain_template_and_a_padding_token_only_where_they_are_missing():
    bare = byte_tokenizer()
    assert "no chat template" in prepare(bare)
    assert bare.chat_template == chat.PLAIN_TEMPLATE and bare.pad_token == "<eos>"
    own = chatml(pad_token="<pad>")
    assert prepare(own) is None
    assert own.chat_template == CHATML and own.pad_token == "<pad>"


def test_prepare_adds_no_token():
    bare = byte_tokenizer()
    size = len(bare)
    prepare(bare)
    assert len(bare) == size


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_accepts(kind):
    prepare(KINDS[kind][0]())


def test_the_plain_template_is_saved_with_the_tokenizer(tmp_path):
    plain().save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.chat_template == chat.PLAIN_TEMPLATE
    assert prepare(again) is None
    assert encode(LONG, again, WHOLE) == encode(LONG, plain(), WHOLE)


BODY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
REFUSED = {
    "no special token ends a turn": (
        BODY + "{{ m.content + '\n' }}{% endfor %}" + ASK, "does not end an assistant turn with a special token"),
    "only the last turn is ended": (
        BODY + "{{ m.content }}{% if m.role == 'user' or loop.last %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + ASK,
        "not every assistant turn"),
    "plain words end a turn": (
        BODY + "{{ m.content + ' END\n' }}{% endfor %}" + ASK, "does not end an assistant turn with a special token"),
    "the answer stands there twice": (
        BODY + "{{ m.content + '<|im_end|>\n' + m.content }}{% endfor %}" + ASK, "exactly once"),
    "the answer is left out": (
        BODY + "{{ '<|im_end|>\n' if m.role == 'assistant' else m.content + '<|im_end|>\n' }}{% endfor %}" + ASK, "exactly once"),
    "the answer is altered": (
        BODY + "{{ m.content | upper + '<|im_end|>\n' }}{% endfor %}" + ASK, "changes the text|exactly once"),
    "the answer's sentences are altered": (
        BODY + "{{ m.content | replace('.', '!') + '<|im_end|>\n' }}{% endfor %}" + ASK, "changes the text"),
    "the answer's length stands before it": (
        BODY + "{{ m.content | length }}{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK, "precedes turn 2 differently"),
    "the answer's length stands at the end": (
        BODY + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ messages[-1].content | length if messages[-1].role == 'assistant' }}" + ASK, "end of the dialogue differently"),
    "the answer's first letter stands at the end": (
        BODY + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ messages[-1].content[0] if messages[-1].role == 'assistant' }}" + ASK, "end of the dialogue differently"),
    "the prompt opens thoughts that history lacks": (
        BODY + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK.replace("assistant\n", "assistant\n<think>\n"),
        "is not what the template writes when a reply is asked for"),
    "the prompt counts the turns": (
        "{{ messages | length }}" + BODY + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK,
        "is not what the template writes when a reply is asked for"),
    "only the last question is shown": (
        "{% set messages = messages[-2:] %}" + BODY + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK,
        "is not what the template writes|exactly once"),
    "the template raises": ("{{ raise_exception('not for chat') }}", "not for chat"),
    "the template is no Jinja": ("{% for m in messages %}{{ m.content }}", "can't render"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_template_whose_answers_cannot_be_proved_is_refused(why):
    template, reason = REFUSED[why]
    with pytest.raises(UserError, match=reason) as caught:
        prepare(byte_tokenizer(template, CHATML_TOKENS))
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_whose_last_blank_merges_with_the_answer_is_refused():
    template = chat.PLAIN_TEMPLATE.replace("'Assistant:'", "'Assistant: '")
    prepare(byte_tokenizer(template))  # no merges: "Assistant: " stays what it is
    with pytest.raises(UserError, match="first token is not the one that follows the prompt"):
        prepare(byte_tokenizer(template, merges=[("Ġ", "Y")]))  # " Y" is one token, so the prompt's blank is not in the row
    prepare(byte_tokenizer(merges=[("Ġ", "Y")]))  # our template leaves the blank to the answer


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(UserError, match="ByT5Tokenizer.*fast tokenizer"):
        prepare(ByT5Tokenizer())


def test_a_tokenizer_without_end_of_text_is_refused():
    with pytest.raises(UserError, match="no end-of-text token"):
        prepare(byte_tokenizer(CHATML, CHATML_TOKENS, eos=None))


# ----------------------------------------------------------------------------------------------------- random dialogues

FRAGMENTS = [
    "Yes.", "no", "MW204518", "User:", "Assistant:", "assistant", "model", "a  b", "line\nbreak", "\n\n", "请问", "好的，马上。", "😊",
    "naïve", "e\u0301", "“quoted”", "{{ m }}", "{% raw %}", "[INST]", "\t", "1.", "www.example.com/?a=b", "！？", "\u3000", "한국어",
]


def random_dialogue(rng, any_roles):
    """2 to 10 turns of a few fragments each; where `any_roles`, with system turns and two user turns in a row."""
    def say():
        text = "".join(rng.choice(FRAGMENTS) + rng.choice(["", " ", "  "]) for _ in range(rng.randint(1, 6))).strip()
        return text or "ok"

    messages = [{"role": "system", "content": say()}] if any_roles and rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 4)):
        messages += [{"role": "user", "content": say()} for _ in range(1 + (any_roles and rng.random() < 0.2))]
        messages.append({"role": "assistant", "content": say()})
        if rng.random() < 0.2:
            messages[-1]["train"] = False
    return messages


@pytest.mark.parametrize("kind", KINDS)
def test_random_dialogues_train_on_the_answers_and_their_ends(kind):
    build, before, before_last, end, any_roles = KINDS[kind]
    tokenizer, rng = build(), random.Random(kind)
    prepare(tokenizer)
    for _ in range(60):
        messages = random_dialogue(rng, any_roles)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        expected = [(before_last if i == answers[-1] else before) + messages[i]["content"] + end
                    for i in answers if messages[i].get("train", True)]
        encoded = encode(messages, tokenizer, WHOLE)
        if not expected:
            assert encoded is None
            continue
        assert text_of(supervised(encoded), tokenizer) == "".join(expected), messages
        assert encoded.input_ids == ids_of(tokenizer.apply_chat_template(messages, tokenize=False), tokenizer)
        shorter = encode(messages, tokenizer, len(encoded.input_ids) - 1)
        if shorter is not None:
            assert 0 < shorter.dropped_turns < len(messages) and len(shorter.input_ids) < len(encoded.input_ids)
            assert "".join(expected).endswith(text_of(supervised(shorter), tokenizer))
