"""A model to train from the beginning: the architecture of a checkpoint, in other sizes if asked, its weights drawn at random, and a
tokenizer of the checkpoint's kind trained on the text at hand.

It is written to `<output_dir>/start`, from where a run, its resume and its evaluation load it as they would any other model.
"""

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import CONFIG_MAPPING, AutoConfig

from recipes.common import checkpoints, models
from recipes.common.checkpoints import ASKED, START
from recipes.common.errors import UserError


def start(shared, training, source: models.Source, tokenizer, auto_class, rows: Callable[[], Sequence[dict]]) -> models.Source:
    """Where the model is that this run starts from; the main process, which comes first, makes it, a resumed run finds it. `rows` gives
    the train rows, and is called only for a new vocabulary. Raises `UserError`."""
    folder = (Path(training.output_dir) / START).absolute()
    if training.resume_from_checkpoint and folder.is_dir():
        _check_same(shared, training.seed, folder)
    elif training.process_index == 0:
        _make(shared, training.seed, source, tokenizer, auto_class, rows, folder)
    return models.Source(shared.model, str(folder), str(folder), from_scratch=True)


def _make(shared, seed: int, source, tokenizer, auto_class, rows, folder: Path) -> None:
    config = models.config(source) if shared.model_type is None else _of_type(shared.model_type, source)
    changes = overrides(shared.config_overrides, config)
    if shared.vocab_size:
        tokenizer = train_tokenizer(tokenizer, lambda: (row["text"] for row in rows()), shared.vocab_size)
    fields = config.to_dict() | changes | {"vocab_size": len(tokenizer)}
    # The ids of special tokens are those of the new tokenizer; which layer attends how is counted out anew for another number of layers.
    fields |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if "num_hidden_layers" in changes and "layer_types" not in changes:
        fields.pop("layer_types", None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class.from_config(type(config)(**fields), dtype=torch.float32)
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]]))
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"--config_overrides {shared.config_overrides} gives no model that works ({' '.join(str(error).split())[:200]}): "
                        f"sizes must divide as those of {shared.model_type or source.used} do") from error
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if shared.max_length and window and shared.max_length > window:
        raise UserError(f"--max_length {shared.max_length} exceeds the {window} tokens that this model can read: lower it, or raise "
                        "max_position_embeddings in --config_overrides")
    made = folder.parent / checkpoints.STAGE / START
    with checkpoints.failure_told(folder, folder.parent):
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / ASKED).write_text(json.dumps(_asked(shared, seed)) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before its first checkpoint
        os.replace(made, folder)
        checkpoints.clear(folder.parent)
    print(f"from scratch: {model.num_parameters():,} parameters drawn at random (seed {seed}), {len(tokenizer):,} tokens"
          + (f", the vocabulary trained on {len(rows()):,} texts" if shared.vocab_size else f", those of {source.used}"))


def _of_type(name: str, source):
    """The config of this architecture at transformers' default sizes. Raises `UserError` if `source` is of another kind."""
    try:
        config = AutoConfig.for_model(name)
    except ValueError:
        near = difflib.get_close_matches(name, CONFIG_MAPPING, n=1)
        raise UserError(f"--model_type {name} is no architecture of transformers: "
                        + (f"did you mean {near[0]}?" if near else "it is what config.json calls model_type, as gpt2 or llama")) from None
    if models.kind_of(config) != models.kind(source):
        raise UserError(f"--model_type {name} ({models.kind_of(config)}) would get the tokenizer of {source.used} ({models.kind(source)}): "
                        "name a --model of the same kind")
    return config


def train_tokenizer(tokenizer, texts: Callable[[], Iterable[str]], size: int):
    """A tokenizer of the same kind, with the same special tokens, and a vocabulary of `size` made of what `texts` gives, the same in each
    run. Raises `UserError`."""
    if isinstance(tokenizer.backend_tokenizer.model, WordPiece):
        new = _train_word_piece(tokenizer, texts, size)
    else:
        new = tokenizer.train_new_from_iterator(texts(), size, show_progress=False)
    if len(new) > size:
        raise UserError(f"--vocab_size {size}: the special tokens and the single characters (or bytes) of this kind of tokenizer are "
                        f"{len(new)} already: raise it")
    if len(new) < size:
        print(f"note: --vocab_size {size}: the train rows give {len(new)} tokens and no more")
    return new


def _train_word_piece(tokenizer, texts: Callable[[], Iterable[str]], size: int):
    """BERT's kind. Its trainer numbers the characters that go on a word in the order of a hash table, another one in each process, and what
    it joins first depends on the numbers. Here they have theirs before it begins."""
    new = tokenizer.train_new_from_iterator([], size, show_progress=False)  # the special tokens alone
    own, specials, backend = new.backend_tokenizer.model, new.get_vocab(), new.backend_tokenizer
    trained = Tokenizer(WordPiece(unk_token=own.unk_token))
    trained.normalizer, trained.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    within = {character for text in texts() for word, _ in backend.pre_tokenizer.pre_tokenize_str(_normal(backend, text))
              for character in word[1:]}
    first = [*sorted(specials, key=specials.get), *(own.continuing_subword_prefix + character for character in sorted(within))]
    trained.train_from_iterator(texts(), WordPieceTrainer(
        vocab_size=size, special_tokens=first, continuing_subword_prefix=own.continuing_subword_prefix, show_progress=False))
    backend.model = WordPiece(trained.get_vocab(), unk_token=own.unk_token, max_input_chars_per_word=own.max_input_chars_per_word,
                              continuing_subword_prefix=own.continuing_subword_prefix)
    return new


def _normal(backend, text: str) -> str:
    return backend.normalizer.normalize_str(text) if backend.normalizer else text


def overrides(text: str | None, config) -> dict:
    """`--config_overrides name=value,...` as changes to a model's `config`; names and types are checked against it. Raises `UserError`."""
    known, changes = config.to_dict(), {}
    for entry in (text or "").split(",") if text else []:
        name, equals, value = (word.strip() for word in entry.partition("="))
        name = config.attribute_map.get(name, name)
        if not equals or not value:
            raise UserError(f"--config_overrides {entry}: write NAME=VALUE, with a comma between two, as in "
                            "num_hidden_layers=4,hidden_size=256")
        if name not in known or name == "vocab_size":
            near = difflib.get_close_matches(name, known, n=1)
            hint = "--vocab_size sets it" if name == "vocab_size" else f"did you mean {near[0]}?" if near else "its config.json lists them"
            raise UserError(f"--config_overrides {entry}: {config.model_type} has no {name} to set: {hint}")
        changes[name] = _value(entry, value, known[name])
    return changes


def _value(entry: str, text: str, current):
    try:
        value = json.loads(text.lower() if text in ("True", "False", "None") else text)
    except json.JSONDecodeError:
        value = text
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if current is not None and type(value) is not type(current):
        raise UserError(f"--config_overrides {entry}: {text} is no {type(current).__name__}, as {current} is")
    return value


def _asked(shared, seed: int) -> dict:
    """The flags that make a start what it is."""
    return {"model": shared.model, "model_type": shared.model_type,
            "config_overrides": shared.config_overrides, "vocab_size": shared.vocab_size, "seed": seed}


def _check_same(shared, seed: int, folder: Path) -> None:
    before = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    for name, value in _asked(shared, seed).items():
        if value != before[name]:
            raise UserError(f"--{name} {value}: the run that is resumed began with {before[name]}: resume with its own flags")
