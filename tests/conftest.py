"""Tiny models and tokenizers, built here: no test needs the Hub, a GPU or anything left on the machine."""

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # tiny matrices: a second thread only costs, and one thread makes sums repeatable

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

DIALOGUES = [
    {"messages": [{"role": "system", "content": "You are the assistant of a shop."},
                  {"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "What is its number, please?"},
                  {"role": "user", "content": "MW204518"}, {"role": "assistant", "content": "It arrives on Friday."}]},
    {"messages": [{"role": "user", "content": "我想退货。"}, {"role": "assistant", "content": "好的，请告诉我订单号。"}]},
    {"messages": [{"role": "user", "content": "Are you open?"}, {"role": "assistant", "content": "Yes, until nine."},
                  {"role": "user", "content": "Thank you!"}, {"role": "assistant", "content": "You are welcome."}]},
    {"messages": [{"role": "user", "content": "我的卡丢了"}, {"role": "assistant", "content": "我马上为您冻结这张卡。"},
                  {"role": "user", "content": "谢谢"}, {"role": "assistant", "content": "不客气，还有别的问题吗？"}]},
]


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens. "gpt2": one special token and no chat template; "bert": WordPiece, each
    Chinese character a word, no chat template; else ChatML with its own end of turn."""
    if kind == "bert":
        return _tiny_wordpiece()
    specials = ["<|endoftext|>"] if kind == "gpt2" else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [m["content"] for d in DIALOGUES for m in d["messages"]]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def _tiny_wordpiece() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator([m["content"] for d in DIALOGUES for m in d["messages"]],
                                  trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(s, specials.index(s)) for s in ("[CLS]", "[SEP]")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                   mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def tiny_config(kind: str, vocab_size: int = 400):
    """Two layers of width 32: GPT-2, BERT, Llama with grouped queries, or Qwen3."""
    if kind == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    if kind == "bert":
        return BertConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=256)
    common = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2)
    return LlamaConfig(**common) if kind == "llama" else Qwen3Config(**common, head_dim=8)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("gpt2" | "bert" | "llama" | "qwen3") -> folder of a tiny model with random weights and its tokenizer."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            tokenizer = tiny_tokenizer(kind)
            set_seed(0)
            auto_class = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
            auto_class.from_config(tiny_config(kind, len(tokenizer))).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows, "train.jsonl") -> path of a file with these rows (dicts, or raw lines as str) in a fresh folder."""
    def write(rows, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
