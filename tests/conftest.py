"""Tiny models and tokenizers, built here: no test needs the Hub, a GPU or anything left on the machine."""

import json
import os
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads of processes that tests start beside each other don't spin while they wait
CACHE = tempfile.TemporaryDirectory()  # of rows and features; gone when the tests end
os.environ["HF_DATASETS_CACHE"] = CACHE.name

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    set_seed,
)

from recipes.common import plots

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
    """A byte-level BPE tokenizer of 400 tokens. "gpt2": one special token and no chat template; "bert" and "t5": their own below; else
    ChatML with its own end of turn."""
    if kind in ("bert", "t5"):
        return tiny_encoder_tokenizer() if kind == "bert" else tiny_seq2seq_tokenizer()
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


def tiny_seq2seq_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that ends every text with </s>, as T5's does."""
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [m["content"] for d in DIALOGUES for m in d["messages"]]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=350, special_tokens=specials, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_input_names=["input_ids", "attention_mask"])


def tiny_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]; each Chinese character alone."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = [m["content"] for d in DIALOGUES for m in d["messages"]]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(s, specials.index(s)) for s in ("[CLS]", "[SEP]")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                   mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def tiny_config(kind: str, vocab_size: int = 400):
    """Two layers of width 32: GPT-2, Llama with grouped queries, Qwen3, BERT, or T5 (two on either side)."""
    if kind == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    if kind == "bert":
        return BertConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=256)
    if kind == "t5":
        return T5Config(vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
                        pad_token_id=0, eos_token_id=1)
    common = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2)
    return LlamaConfig(**common) if kind == "llama" else Qwen3Config(**common, head_dim=8)


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """Reports without pictures, which take longer than a tiny training, but in the modules that look at them (PICTURES = True)."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "PICTURES", False):
            without_pictures(patch)
        yield


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plots, "svg", lambda figure, label: "<svg></svg>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("gpt2" | "llama" | "qwen3" | "bert" | "t5") -> folder of a tiny model with random weights and its tokenizer."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            tokenizer = tiny_tokenizer(kind)
            set_seed(0)
            auto_class = AutoModelForPreTraining if kind in ("bert", "t5") else AutoModelForCausalLM
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
