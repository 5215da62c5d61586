"""Add altered copies of train rows, which keep their labels:

    python scripts/augment.py --data data/customer_service/train.jsonl --out data/augmented/train.jsonl
    python scripts/augment.py --data mydata/train.jsonl --out more/train.jsonl --methods paraphrase --paraphrase Qwen/Qwen3-0.6B --per_row 2

Methods, each giving --per_row copies of a row:

- synonym: words replaced by synonyms of your own file, --synonyms FILE, a line `word<TAB>synonym<TAB>...`, English or Chinese. No
  thesaurus comes along: those that are free to use, such as WordNet, are not Python packages but downloads of their own.
- swap: neighbouring words exchanged; in Chinese, neighbouring characters.
- delete: words left out; in Chinese, characters.
- noise: typing slips, of keys and letters in English, of characters with the same pinyin in Chinese.
- variant: Chinese only; simplified <-> traditional (OpenCC), half <-> full width of letters and punctuation.
- backtranslate: there and back through two translation models, each for one direction: --backtranslate MODEL_THERE MODEL_BACK.
- paraphrase: said in other words by a chat model, --paraphrase MODEL; further copies more politely, more casually, more briefly. Read
  the copies: a model as small as smollm2 often answers the text where it should rephrase it.

A model is a folder, a bundled name (paraphrase), or a Hub id, for which the Hub must be in reach; its weights must be safetensors.

Only what users say is altered: user turns of dialogues, `text` beside a `label`, `source` of translations, and in tag rows words outside
of entities, one for one (synonym, noise, variant). Assistant turns never. Numbers, ids, negations and --protect words stay; a copy that
lost one is dropped and counted, as is one too close to its row or to another copy. OUT holds the rows of DATA and then the copies, each
with "augmented": {"from": id or row number, "method": ...}. Train files only: set dev rows aside first, and lay them beside OUT as
dev.jsonl, as the training draws none from rows that have copies.
"""

import argparse
import difflib
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, augment, data, errors
from recipes.common.errors import UserError
from recipes.common.wording import counted

WORDS = {"swap": augment.swap, "delete": augment.delete, "noise": augment.noise}
METHODS = ("synonym", *WORDS, "variant", "backtranslate", "paraphrase")
ONE_FOR_ONE = ("synonym", "noise", "variant")  # what tag rows can take
HELD_OUT = {name for split in ("dev", "test") for name in data.SPLITS[split]}
STYLES = (("in other words", "换一种说法"), ("politely", "更礼貌地"), ("casually", "更口语化地"), ("briefly", "更简短地"))
MAX_NEW_TOKENS = 256


def main():
    errors.install()
    options = parse()
    rows = data.read(Path(options.data), check, options.on_bad_row)
    for sentence in rows.skipped:
        print(f"skipped {sentence}")
    sources = {rows.rows.number(at): row for at, row in enumerate(rows.rows)
               if "augmented" not in row and spoken(row, options.language)}
    if not sources:
        raise UserError(f"{options.data}: no row to alter (--language {options.language}; copies are not copied again)")
    impossible = [method for method in options.methods if method not in ONE_FOR_ONE]
    if impossible and any("tokens" in row for row in sources.values()):
        raise UserError(f"--methods {impossible[0]} would break the pairs of tokens and tags in {options.data}: use some of "
                        f"{','.join(ONE_FOR_ONE)}")
    print(f"{len(sources)} of {len(rows.rows)} rows are altered ({options.data})")
    copies, dropped = [], Counter()
    seen = {json.dumps(said(row), ensure_ascii=False) for row in rows.rows}
    kept = {number: [said(row)] for number, row in sources.items()}
    for method in options.methods:
        for copy in range(1, options.per_row + 1):
            before = len(copies)
            for number, texts in altered(sources, method, copy, options).items():
                if reason := objection(texts, kept[number], seen, options):
                    dropped[method, reason] += 1
                    continue
                kept[number].append(texts)
                seen.add(json.dumps(texts, ensure_ascii=False))
                copies.append(copy_of(sources[number], texts, number, f"{method}-{copy}", method))
            print(f"{method}, copy {copy}: {counted(len(copies) - before, 'rows')} added")
    for (method, reason), count in sorted(dropped.items()):
        print(f"{method}: {counted(count, 'copy|copies')} dropped: {reason}")
    write(Path(options.out), [*rows.rows, *copies])
    print(f"wrote {options.out}: {counted(len(rows.rows), 'rows')} and {counted(len(copies), 'copy|copies')}")
    folder = Path(options.out).absolute().parent
    if copies and not any(path.name.lower().startswith(data.SPLITS["dev"]) for path in folder.iterdir()):
        print(f"note: to train on it, lay a dev file of other rows beside it, such as {Path(options.out).parent / 'dev.jsonl'}")


def parse():
    """The command line. Raises `UserError` for what can't be obeyed, before anything is read."""
    parser = args.Parser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", required=True, metavar="FILE",
                        help="the train file, in any format of data/README.md, of any task but pretrain")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write; must not exist")
    parser.add_argument("--methods", default="swap,delete,noise", metavar="A,B", help="see above (default: %(default)s)")
    parser.add_argument("--per_row", type=args.positive, default=1, metavar="N", help="copies of a row by each method (default: 1)")
    parser.add_argument("--share", type=args.not_negative, default=0.1, metavar="S",
                        help="share of the words that swap, delete, noise and synonym alter, at least one (default: 0.1)")
    parser.add_argument("--seed", type=args.whole, default=0, metavar="N", help="the same seed gives the same copies (default: 0)")
    parser.add_argument("--language", choices=("en", "zh"), help="alter rows of this language only, such as a translation model's")
    parser.add_argument("--protect", nargs="+", default=[], metavar="W", help="words that must stay, or files with one a line")
    parser.add_argument("--max_similarity", type=args.not_negative, default=0.99, metavar="S",
                        help="drop a copy that is more similar than this to its row or another copy of it; 1: identical (default: 0.99)")
    parser.add_argument("--synonyms", metavar="FILE", help="the synonyms: a word and its synonyms a line, separated by tabs")
    parser.add_argument("--backtranslate", nargs=2, metavar=("THERE", "BACK"), help="two models, each for one direction (Marian, T5)")
    parser.add_argument("--paraphrase", metavar="MODEL", help="a chat model")
    parser.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="stop at a bad row, or leave it out and list it")
    options = parser.parse_args()
    options.methods = [method.strip() for method in options.methods.split(",")]
    if unknown := [method for method in options.methods if method not in METHODS]:
        raise UserError(f"--methods {unknown[0]} is unknown: use some of {','.join(METHODS)}")
    for flag in ("synonyms", "backtranslate", "paraphrase"):
        method = flag.removesuffix("s")
        if (method in options.methods) != bool(getattr(options, flag)):
            raise UserError(f"--methods {method} and --{flag} go together: give both or neither")
    for flag in ("share", "max_similarity"):
        if not 0 < getattr(options, flag) <= 1:
            raise UserError(f"--{flag} {getattr(options, flag):g} is no share: use a number above 0 and up to 1")
    if Path(options.data).is_dir():
        raise UserError(f"--data {options.data} is a folder: name its train.jsonl")
    for flag in ("data", "out"):
        path = Path(getattr(options, flag))
        if any(is_held_out(one) for one in (path, path.resolve())):
            raise UserError(f"--{flag} {path} is a dev or test file by its name: scores on altered rows would not measure the task, and "
                            "copies of them in train would give the answers away; name the train file")
    if not options.out.endswith(".jsonl"):
        raise UserError(f"--out {options.out}: the rows are written as JSON Lines, whatever the format of --data, so name a .jsonl file")
    if Path(options.out).exists():
        raise UserError(f"--out {options.out} exists already: name another file")
    options.protect = augment.protection([word for given in options.protect for word in words_of(given)])
    options.lexicon = augment.read_synonyms(Path(options.synonyms)) if options.synonyms else {}
    return options


def is_held_out(path: Path) -> bool:
    """Whether a file is of a dev or test split by its name, or lies in the folder of such a split, beside one of train."""
    if HELD_OUT & set(re.split(r"[^a-z]+", path.stem.lower())):
        return True
    return path.parent.name.lower() in HELD_OUT and any(path.parent.parent.glob("[tT]rain*"))


def words_of(given: str) -> list[str]:
    """The words of a file, one a line; or what was given, if there is no such file."""
    if not Path(given).is_file():
        return [given] if given.strip() else []
    try:
        return [line.strip() for line in Path(given).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"--protect {given} is not UTF-8: save it as UTF-8") from error


def check(row: dict) -> str | None:
    """What is wrong with a row of any task that can be altered, in one sentence; None if nothing is."""
    if "messages" in row:
        return data.check_dialogue(row)
    if {"tokens", "tags"} <= row.keys():
        lists = row["tokens"], row["tags"]
        sound = all(isinstance(words, list) and all(isinstance(word, str) and word for word in words) for words in lists)
        return None if sound and len(lists[0]) == len(lists[1]) else '"tokens" and "tags" must be lists of strings of one length'
    name = "source" if {"source", "target"} <= row.keys() else "text" if {"text", "label"} <= row.keys() else None
    if name is None:
        return "expected messages, text and label, tokens and tags, or source and target; text alone is trained on as it is, so not altered"
    return None if isinstance(row[name], str) and row[name].strip() else f'"{name}" must be a string with text'


def said(row: dict) -> list[str]:
    """What the user says in a row: the texts that may be altered."""
    if "messages" in row:
        return [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    return list(row["tokens"]) if "tokens" in row else [row["source"] if "source" in row else row["text"]]


def spoken(row: dict, language: str | None) -> bool:
    """Whether the row has anything to alter and is in `language`."""
    from recipes.common.metrics import detect_language

    return bool(said(row)) and language in (None, row.get("language") or detect_language(" ".join(said(row))))


def altered(sources: dict[int, dict], method: str, copy: int, options) -> dict[int, list[str] | None]:
    """Row number -> the altered texts of `said`; None where a model gave nothing that can be used."""
    if method not in ("backtranslate", "paraphrase"):
        return {number: alter(row, method, random.Random(f"{options.seed} {number} {method} {copy}"), options)
                for number, row in sources.items()}
    texts = list(dict.fromkeys(text for row in sources.values() for text in said(row)))
    if method == "paraphrase":
        new = dict(zip(texts, paraphrase(texts, options.paraphrase, copy), strict=True))
    else:
        there = translate(texts, options.backtranslate[0], options.seed + copy)
        back = iter(translate([text for text in there if text], options.backtranslate[1], options.seed + copy))
        new = {text: next(back) if foreign else None for text, foreign in zip(texts, there, strict=True)}
    found = {number: [new[text] for text in said(row)] for number, row in sources.items()}
    return {number: texts if all(texts) else None for number, texts in found.items()}


def alter(row: dict, method: str, rng: random.Random, options) -> list[str]:
    """The texts of `said`, altered by a method that needs no model."""
    texts = said(row)
    if method == "variant":
        new = augment.variant(texts, options.protect, rng)
    elif method == "synonym":
        new = [augment.synonym(text, options.protect, rng, options.share, options.lexicon) for text in texts]
    else:
        new = [WORDS[method](text, options.protect, rng, options.share) for text in texts]
    if "tokens" not in row:
        return new
    able = [i for i in outside_entities(row, options.protect) if new[i] != texts[i] and len(new[i].split()) == 1]
    count = len(able) if method == "variant" else min(len(able), max(1, round(len(texts) * options.share)))
    chosen = set(rng.sample(able, count))
    return [new[i] if i in chosen else text for i, text in enumerate(texts)]


def outside_entities(row: dict, protect: re.Pattern) -> list[int]:
    """Indices of the tokens of a tag row that may be altered. A negation protects the token after it, so they are read as one line."""
    free = {word.start() for word in augment.free_words(" ".join(row["tokens"]), protect)}
    able, start = [], 0
    for i, (token, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
        words = {start + word.start() for word in augment.WORD.finditer(token)}
        if tag == "O" and words and words <= free:
            able.append(i)
        start += len(token) + 1
    return able


def translate(texts: list[str], name: str, seed: int, batch_size: int = 16) -> list[str | None]:
    """Each text through the sequence-to-sequence model `name`, sampled from the ten likeliest tokens (Edunov et al., 2018,
    arXiv:1808.09381); None where a text is too long for the model or its translation does not end. Raises `UserError`."""
    import torch
    from safetensors import SafetensorError
    from tqdm.auto import tqdm
    from transformers import AutoModelForSeq2SeqLM, set_seed

    from recipes.common import models

    source = models.resolve(name)
    tokenizer = models.load_tokenizer(source)
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(source.folder, use_safetensors=True,
                                                      trust_remote_code=False).to(models.device()).eval()
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{name} can't be loaded as a translation model: {' '.join(str(error).split())[:300]}") from error
    set_seed(seed)
    window, found = models.window(source) or 10**9, dict.fromkeys(texts)
    fitting = sorted((text for text in found if len(tokenizer(text).input_ids) <= window), key=len)
    for start in tqdm(range(0, len(fitting), batch_size), desc=f"Translating with {Path(name).name}", unit="batches"):
        batch = fitting[start: start + batch_size]
        inputs = tokenizer(batch, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=True, top_k=10, num_beams=1, max_new_tokens=min(MAX_NEW_TOKENS, window - 1))
        for text, ids in zip(batch, out, strict=True):
            if tokenizer.eos_token_id in ids[1:]:
                found[text] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [found[text] for text in texts]


def paraphrase(texts: list[str], name: str, copy: int) -> list[str | None]:
    """Each text in other words, in the style number `copy`, from the chat model `name`; None where it doesn't fit. Raises `UserError`."""
    from recipes.common import chat, generation, models
    from recipes.common.metrics import detect_language

    source = models.resolve(name)
    tokenizer = models.load_tokenizer(source)
    chat.prepare(tokenizer)
    model = models.load(source, dtype=models.dtype("auto")).to(models.device()).eval()
    model.generation_config = models.generation_config(tokenizer)
    english, chinese = STYLES[(copy - 1) % len(STYLES)]
    ask = {"en": f"Say the following {english}. Keep its meaning, names and numbers. Answer with the new sentence only.\n\n",
           "zh": f"请{chinese}表达下面这句话，意思、名称和数字不变，只回答改写后的句子。\n\n"}
    limit = generation.room(model, MAX_NEW_TOKENS)
    prompts = [chat.prompt([{"role": "user", "content": ask[detect_language(text)] + text}], tokenizer, limit) for text in texts]
    fitting = [prompt for prompt in prompts if prompt]
    replies, cut = generation.replies(model, tokenizer, fitting, MAX_NEW_TOKENS, description="Paraphrasing")
    if cut:
        print(f"note: {counted(cut, 'paraphrases')} did not end within {MAX_NEW_TOKENS} tokens")
    answers = iter(replies)
    return [next(answers).strip("\"'“”「」 \n") if prompt else None for prompt in prompts]


def objection(texts: list[str] | None, others: list[list[str]], seen: set[str], options) -> str | None:
    """Why a copy is not kept, or None. `others` are the texts of its row, first, and of the row's copies so far."""
    if texts is None or not all(text.strip() for text in texts):
        return "the model gave no text that can be used"
    if texts == others[0]:
        return "nothing in the row could be altered"
    if any(len(new) > 2 * len(old) + 20 for old, new in zip(others[0], texts, strict=True)):
        return "more than twice as long as the row"
    if any(augment.facts(old, options.protect) != augment.facts(new, options.protect) for old, new in zip(others[0], texts, strict=True)):
        return "a number, an id, a negation or a protected word changed"
    if json.dumps(texts, ensure_ascii=False) in seen:
        return "equal to another row"
    if any(difflib.SequenceMatcher(None, "\n".join(other), "\n".join(texts), autojunk=False).ratio() > options.max_similarity
           for other in others):
        return f"more similar than {options.max_similarity:g} to its row or another copy (--max_similarity)"
    return None


def copy_of(row: dict, texts: list[str], number: int, name: str, method: str) -> dict:
    """The row with `texts` in the place of what `said` gives, marked as a copy."""
    new = {**row, "augmented": {"from": row.get("id", number), "method": method}}
    if "id" in row:
        new["id"] = f"{row['id']}-{name}"
    if "messages" in row:
        fresh = iter(texts)
        new["messages"] = [{**turn, "content": next(fresh)} if turn["role"] == "user" else turn for turn in row["messages"]]
    elif "tokens" in row:
        new["tokens"] = texts
    else:
        new["source" if "source" in row else "text"] = texts[0]
    return new


def write(out: Path, rows: list[dict]) -> None:
    """Write the file, all or nothing. Raises `UserError`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".augment-") as work:
            path = Path(work) / "rows"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
            os.replace(path, out)
    except OSError as error:
        raise UserError(f"--out {out} can't be written ({error.strerror})") from error


if __name__ == "__main__":
    main()
