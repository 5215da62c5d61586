"""Replies written in batches against replies written one at a time, and what the model is shown when it is asked for one."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES, tiny_config, tiny_tokenizer
from test_methods import run_recipe
from transformers import AutoModelForCausalLM, set_seed

from recipes import adapter, lora, prefix
from recipes.common import chat, generation, models

TASK = SimpleNamespace(peft_type="CAUSAL_LM", new_modules=lambda: None, window=256, max_length=128, train=[{"input_ids": [5, 6, 7]}])
METHODS = {
    "base": lambda model: model,
    "lora": lambda model: lora.adapt(model, TASK, lora.MethodArguments(), None)[0],
    "adapter": lambda model: adapter.adapt(model, TASK, adapter.MethodArguments(), None)[0],
    "prefix": lambda model: prefix.adapt(model, TASK, prefix.MethodArguments(), None)[0],
    "prefix-projection": lambda model: prefix.adapt(model, TASK, prefix.MethodArguments(prefix_projection=True), None)[0],
}


def make(kind, method="base"):
    """(model, tokenizer): random weights so large that every prompt leads somewhere else and no two tokens are nearly as likely."""
    tokenizer = tiny_tokenizer(kind)
    chat.prepare(tokenizer)
    set_seed(7)
    config = tiny_config(kind, len(tokenizer))
    config.initializer_range = 0.3
    model = METHODS[method](AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and method != "base":
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config = models.generation_config(tokenizer)
    return model.eval(), tokenizer


def make_prompts(tokenizer):
    """The prompts of every assistant turn, in an order that is not that of their lengths; one of them twice."""
    found = [ids for _, _, ids in generation.prompts_for(DIALOGUES, tokenizer, 128)]
    return [*found[::-1], found[0]]


def one_by_one(model, tokenizer, prompts, max_new_tokens):
    """The plain way: `generate` on each prompt alone, without padding."""
    texts = []
    for ids in prompts:
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                 do_sample=False, max_new_tokens=max_new_tokens)[0, len(ids):].tolist()
        end = next((t for t, token in enumerate(out) if token in model.generation_config.eos_token_id), None)
        text = tokenizer.decode(out[:end], skip_special_tokens=True)
        texts.append((text.removesuffix("\N{REPLACEMENT CHARACTER}") if end is None else text).strip())
    return texts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_batched_replies_equal_single_ones_in_the_order_of_the_prompts(kind, method):
    model, tokenizer = make(kind, method)
    prompts = make_prompts(tokenizer)
    expected = one_by_one(model, tokenizer, prompts, 10)
    assert len(set(expected)) > len(prompts) // 2, "the prompts must lead to different replies, or their order is not tested"
    for batch_size in (1, 3, 16):
        texts, _ = generation.replies(model, tokenizer, prompts, max_new_tokens=10, batch_size=batch_size)
        assert texts == expected


def test_padding_on_the_right_would_be_caught(monkeypatch):
    model, tokenizer = make("gpt2")
    prompts = make_prompts(tokenizer)

    def right_pad(prompts, pad_id):
        ids, mask = left_pad(prompts, pad_id)
        shifts = [int((row == 0).sum()) for row in mask]
        return (torch.stack([row.roll(-n) for row, n in zip(part, shifts, strict=True)]) for part in (ids, mask))

    left_pad = generation.left_pad
    monkeypatch.setattr(generation, "left_pad", right_pad)
    texts, _ = generation.replies(model, tokenizer, prompts, max_new_tokens=10)
    assert texts != one_by_one(model, tokenizer, prompts, 10)


def test_left_pad():
    ids, mask = generation.left_pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.fixture(scope="module")
def taught(tiny, tmp_path_factory):
    """A run that knows DIALOGUES by heart."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    (folder / "dev.jsonl").write_text(json.dumps(DIALOGUES[0], ensure_ascii=False) + "\n", encoding="utf-8")
    run_recipe("full", tiny("llama"), folder, folder / "run", "--max_steps", "150", "--per_device_train_batch_size", "4",
               "--learning_rate", "0.01", "--eval_strategy", "no", "--save_strategy", "no")
    return models.load_run(folder / "run"), models.load_run_tokenizer(folder / "run")


def test_replies_stop_at_the_end_of_the_turn_and_the_cut_ones_are_counted(taught):
    model, tokenizer = taught
    asked = generation.prompts_for(DIALOGUES, tokenizer, 160)
    prompts, references = [ids for _, _, ids in asked], [DIALOGUES[r]["messages"][t]["content"] for r, t, _ in asked]
    assert generation.replies(model, tokenizer, prompts, max_new_tokens=60) == (references, 0)

    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
    limit = sorted(lengths)[len(lengths) // 2]
    texts, cut = generation.replies(model, tokenizer, prompts, max_new_tokens=limit)
    assert cut == sum(length + 1 > limit for length in lengths)  # the token that ends the turn counts as well
    assert 0 < cut < len(prompts)
    for text, reference, length in zip(texts, references, lengths, strict=True):
        assert text == reference if length <= limit else reference.startswith(text)


def test_a_reply_cut_within_a_character_ends_before_it(taught):
    model, tokenizer = taught
    tokens = tokenizer("退款", add_special_tokens=False)["input_ids"]  # several tokens a character
    texts = [generation.text(tokens[:n], model, tokenizer)[0] for n in range(len(tokens) + 1)]
    assert sorted(set(texts)) == ["", "退", "退款"] and texts == sorted(texts) and len(tokens) > 2
    assert generation.text([tokens[0], model.generation_config.eos_token_id[0]], model, tokenizer)[0]  # not cut: the model wrote it


def test_no_prompts_no_replies(taught):
    model, tokenizer = taught
    assert generation.replies(model, tokenizer, []) == ([], 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_room_leaves_space_for_the_reply_and_for_a_prefix(kind):
    assert generation.room(make(kind)[0], 30) == 256 - 30
    assert generation.room(make(kind, "lora")[0], 30) == 256 - 30
    assert generation.room(make(kind, "prefix")[0], 30) == 256 - 30 - 100


@pytest.mark.parametrize("method", ["base", "prefix"])
def test_a_prompt_that_fills_the_room_can_be_answered_and_a_longer_one_can_not(method):
    model, tokenizer = make("gpt2", method)  # 256 learned positions: there is no 257th
    model.generation_config.eos_token_id = [len(tokenizer) + 1]  # never ends by itself
    room = generation.room(model, 6)
    _, cut = generation.replies(model, tokenizer, [[11] * room], max_new_tokens=6)
    assert cut == 1
    with pytest.raises((IndexError, RuntimeError)):
        generation.replies(model, tokenizer, [[11] * (room + 2)], max_new_tokens=6)


ROWS = [
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "one"}, {"role": "assistant", "content": "FIRST"},
                  {"role": "user", "content": "two"}, {"role": "assistant", "content": "SECOND", "train": False},
                  {"role": "user", "content": "three"}, {"role": "assistant", "content": "THIRD"}]},
    {"messages": [{"role": "user", "content": "四"}, {"role": "assistant", "content": "第四"}, {"role": "user", "content": "bye"}]},
]


def test_turns_to_answer_are_the_assistant_s_that_are_trained_on():
    assert [generation.turns_to_answer(row["messages"]) for row in ROWS] == [[2, 6], [1]]


def leaks(ids, tokenizer, row, turn):
    """Whether a prompt shows the answer, or anything of what follows it."""
    text = tokenizer.decode(ids)
    return any(m["content"] in text for m in ROWS[row]["messages"][turn:])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_hold_the_true_history_and_never_the_answer(kind):
    tokenizer = make(kind)[1]
    asked = generation.prompts_for(ROWS, tokenizer, 160)
    assert [(row, turn) for row, turn, _ in asked] == [(0, 2), (0, 6), (1, 1)]
    for row, turn, ids in asked:
        messages = ROWS[row]["messages"]
        assert not leaks(ids, tokenizer, row, turn)
        assert all(m["content"] in tokenizer.decode(ids) for m in messages[:turn])
        trained = chat.encode(messages[: turn + 1], tokenizer, 160)
        assert trained.input_ids[: len(ids)] == ids and trained.labels[len(ids)] != chat.IGNORE  # what training showed, exactly
        assert leaks(chat.prompt(messages[: turn + 1], tokenizer, 160), tokenizer, row, turn)  # off by one: would be caught


def test_a_history_without_room_is_shortened_then_given_up():
    tokenizer = make("llama")[1]
    whole = [ids for _, _, ids in generation.prompts_for(ROWS, tokenizer, 160)]
    short = [ids for _, _, ids in generation.prompts_for(ROWS, tokenizer, len(whole[1]) - 1)]
    text = tokenizer.decode(short[1])
    assert "FIRST" not in text and "Be brief." in text and "three" in text and len(short[1]) < len(whole[1])
    assert [ids for _, _, ids in generation.prompts_for(ROWS, tokenizer, 3)] == [None, None, None]
