"""E2E NLG as in the papers of LoRA (table 3) and prefix-tuning (table 2): data, hyper-parameters, beam search and the official scores:

    pip install -r requirements-bench.txt
    python benchmarks/e2e.py rows
    python benchmarks/e2e.py train lora --data data/e2e_nlg
    python benchmarks/e2e.py score runs/e2e-lora/predictions-test.jsonl
    python benchmarks/e2e.py score outputs.txt --data data/e2e_nlg --split test
    python benchmarks/e2e.py table runs/full runs/lora

`rows` shows the papers' rows with the command for each, and what differs from the papers. `train` runs one of them, on GPT-2 medium unless
--model says otherwise: it writes the data in the papers' form beside the run, trains with scripts/train.py, writes the descriptions with
scripts/evaluate.py and shows the official scores beside the papers'. Flags that are not this script's go to the recipe. `data` only writes
that data. `score` scores a predictions file of a run, or a text with an output a line against the rows of a folder. `table` shows
finished runs of --task translate side by side.

The scores are those of the challenge's scripts (github.com/tuetschek/e2e-metrics): BLEU and NIST as mteval-v13a has them, in lower case;
METEOR 1.5, ROUGE-L and CIDEr as the COCO caption evaluation has them, whose Java programs cut the texts. Without Java these three are
left out, and a line says so. BLEU, METEOR and ROUGE-L run from 0 to 100. In brackets stands the 95 % interval over the choice of items, as
the bootstrap gives it; METEOR has none, as its program tells no sums to draw from.
"""

import argparse
import importlib.util
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from recipes.common import errors
from recipes.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 1000
DIGITS = {"BLEU": 2, "NIST": 4, "METEOR": 2, "ROUGE-L": 2, "CIDEr": 4}
ORDERS = 5  # NIST counts n-grams of up to so many words

# How the papers write an attribute where the data set writes it otherwise.
NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
ATTRIBUTE = r"([^,\[\]]+)\[([^\[\]]*)\]"
LORA, PREFIX = "LoRA, table 3", "prefix-tuning, table 2"


@dataclass(frozen=True)
class Row:
    """A row of the papers: its recipe and flags, how it is decoded, and what the papers print for GPT-2 medium."""

    recipe: str
    flags: str
    search: str
    published: dict[str, tuple]  # table -> trained parameters as printed, BLEU, NIST, METEOR, ROUGE-L, CIDEr
    trained: int  # parameters trained here
    differs: str


# Prefix-tuning, table 6 (linear schedule without warm-up, 5 beams); LoRA, table 11 (length penalty 0.9; its repository decodes with 0.8).
_LINEAR = "--lr_scheduler_type linear --warmup_steps 0 --weight_decay 0"
_BEAMS = "--num_beams 5"
ROWS = {
    "full": Row("full", f"--learning_rate 5e-5 --num_train_epochs 5 --per_device_train_batch_size 10 {_LINEAR}", _BEAMS,
                {LORA: ("354.92M", 68.2, 8.62, 46.2, 71.0, 2.47), PREFIX: ("100%", 68.8, 8.71, 46.1, 71.1, 2.43)}, 354_823_168,
                "the papers count some 0.1M more"),
    "top2": Row("full", f"--train_top_layers 2 --learning_rate 5e-5 --num_train_epochs 5 --per_device_train_batch_size 10 {_LINEAR}",
                _BEAMS, {LORA: ("25.19M", 68.1, 8.59, 46.0, 70.8, 2.41), PREFIX: ("top 2", 68.1, 8.59, 46.0, 70.8, 2.41)}, 76_657_664,
                "the head is trained too, and with it the embedding, whose weights GPT-2 shares with it"),
    "adapter-small": Row("adapter", "--placement pfeiffer --bottleneck_size 7 --learning_rate 8e-5 --num_train_epochs 10 "
                         f"--per_device_train_batch_size 5 {_LINEAR}", _BEAMS,
                         {LORA: ("0.37M", 66.3, 8.41, 45.0, 69.8, 2.40), PREFIX: ("0.1%", 66.3, 8.41, 45.0, 69.8, 2.40)}, 368_808,
                         "one adapter a block after the feed-forward part, GELU, without a layer norm of its own"),
    "adapter": Row("adapter", "--placement pfeiffer --bottleneck_size 225 --learning_rate 5e-5 --num_train_epochs 5 "
                   f"--per_device_train_batch_size 5 {_LINEAR}", _BEAMS,
                   {LORA: ("11.09M", 68.9, 8.71, 46.1, 71.3, 2.47), PREFIX: ("3%", 68.9, 8.71, 46.1, 71.3, 2.47)}, 11_089_176,
                   "as adapter-small"),
    "prefix": Row("prefix", "--num_virtual_tokens 5 --prefix_projection --projection_hidden_size 512 --start random "
                  f"--learning_rate 8e-5 --num_train_epochs 5 --per_device_train_batch_size 10 {_LINEAR}", _BEAMS,
                  {LORA: ("0.35M", 69.7, 8.81, 46.1, 71.4, 2.49), PREFIX: ("0.1%", 70.3, 8.82, 46.3, 72.1, 2.46)}, 25_744_896,
                  "trained is the network that computes the prefix; kept are the prefix's 245,760 numbers, the papers' 250K"),
    "lora": Row("lora", "--rank 4 --alpha 32 --dropout 0.1 --target_modules c_attn --learning_rate 2e-4 --num_train_epochs 5 "
                "--per_device_train_batch_size 8 --lr_scheduler_type linear --warmup_steps 500 --weight_decay 0.01 "
                "--label_smoothing_factor 0.1 --max_grad_norm 0",
                "--num_beams 10 --length_penalty 0.9 --no_repeat_ngram_size 4 --max_new_tokens 64",
                {LORA: ("0.35M", 70.4, 8.85, 46.8, 71.8, 2.53)}, 393_216,
                "GPT-2 holds q, k and v in one matrix, c_attn: its update has rank 4 and one A for all three, where the paper has one of "
                "rank 4 each for q and v; the numbers trained are as many. Llama-like models: --target_modules q_proj,v_proj"),
}
DIFFERS = """All rows differ from the papers in this:
- A description is asked for by the project's plain question and answer, where the papers put the end-of-text token between.
- Descriptions are learned and scored as the data set has them. The papers use a copy with tokenised descriptions, which gives about
  one BLEU more: compare rows measured here with each other first.
- Kept is the checkpoint with the lowest loss on dev; the LoRA paper prints the mean of three seeds (--seed 1, 2, 3)."""


def main():
    errors.install()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rows", help="the papers' rows, and the command for each")
    train_parser = commands.add_parser("train", help="one of these rows; further flags go to the recipe", allow_abbrev=False)
    train_parser.add_argument("row", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    train_parser.add_argument("--data", required=True, help="the folder that data/prepare/e2e_nlg.py wrote")
    train_parser.add_argument("--model", default="gpt2-medium", help="Hub id, folder or bundled name (default: gpt2-medium)")
    train_parser.add_argument("--output_dir", help="the run folder (default: runs/e2e-ROW)")
    train_parser.add_argument("--limit", type=int, help="describe only the first N items of test")
    data_parser = commands.add_parser("data", help="write the data in the papers' form")
    data_parser.add_argument("data", metavar="FOLDER", help="the folder that data/prepare/e2e_nlg.py wrote")
    data_parser.add_argument("output_dir", metavar="OUT", help="the folder to write")
    score_parser = commands.add_parser("score", help="the official scores of outputs")
    score_parser.add_argument("file", help="predictions-SPLIT.jsonl of a run, or a text with an output a line")
    score_parser.add_argument("--data", help="for a text: the folder with the references")
    score_parser.add_argument("--split", choices=["dev", "test"], help="for a text: which of them (default: test)")
    table_parser = commands.add_parser("table", help="finished runs side by side")
    table_parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders that scripts/evaluate.py has scored")
    table_parser.add_argument("--split", help="which predictions-SPLIT.jsonl of each run (needed if it has several)")
    options, flags = parser.parse_known_args()
    if flags and options.command != "train":
        parser.error(f"unknown flag {flags[0]}")
    if options.command == "rows":
        show_rows()
    elif options.command == "train":
        train(options, flags)
    elif options.command == "data":
        print("\n".join(linearise(Path(options.data), Path(options.output_dir))))
    elif options.command == "score":
        show([(name, "", measure(outputs, references)) for name, outputs, references in read_outputs(options)])
    else:
        show(runs_table([Path(run) for run in options.runs], options.split))


def show_rows() -> None:
    """The papers' rows for GPT-2 medium, the parameters trained there and here, and the command for each."""
    print("| row | table | trained there | trained here | BLEU | NIST | METEOR | ROUGE-L | CIDEr |\n" + "|---" * 9 + "|")
    for name, row in ROWS.items():
        for table, (trained, *figures) in row.published.items():
            print(f"| {name} | {table} | {trained} | {row.trained:,} | " + " | ".join(map(str, figures)) + " |")
    print(f"\n{DIFFERS}\n")
    for name, row in ROWS.items():
        print(f"{name}: {row.differs}\n  python benchmarks/e2e.py train {name} --data data/e2e_nlg\n"
              f"  = recipes/{row.recipe}.py {row.flags}\n  + scripts/evaluate.py {row.search}")


def train(options, flags: list[str]) -> None:
    """Write the data, train a row, describe the held-out items, and show their scores beside the papers'. Ends where a script fails."""
    row, run = ROWS[options.row], Path(options.output_dir or f"runs/e2e-{options.row}")
    folder = run.with_name(f"{run.name}-data")
    if (run / "run.json").exists():
        raise UserError(f"--output_dir {run} holds another run: name another folder")
    for sentence in linearise(Path(options.data), folder):
        print(sentence)
    call("scripts/train.py", "--recipe", row.recipe, "--task", "translate", "--model", options.model, "--data", str(folder),
         "--output_dir", str(run), "--gradient_accumulation_steps", "1", *row.flags.split(), *flags)
    call("scripts/evaluate.py", "--run", str(run), *row.search.split(), *(["--limit", str(options.limit)] if options.limit else []))
    print(f"\n{DIFFERS}\n{options.row}: {row.differs}\n")
    show(runs_table([run], None) + [
        (f"{table}, GPT-2 medium", trained, {name: (value,) for name, value in zip(DIGITS, figures, strict=True)})
        for table, (trained, *figures) in row.published.items()])


def call(script: str, *words: str) -> None:
    """Run a script of this project, and end as it does if it fails: it has said why."""
    print(f"$ python {script} {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / script), *words]).returncode
    if code:
        sys.exit(code)


# The data


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, as `source`, `target`, `refs`; the set's own names of these columns (mr, ref) are known. Raises `UserError`."""
    from recipes.common import data

    rows, own = [], {"mr": "source", "ref": "target"}
    for number, row in enumerate(data.read(path, lambda row: None).rows, 1):
        row = {own.get(name, name): value for name, value in row.items()}
        if wrong := data.check_translate(row):
            raise UserError(f"{path}, row {number}: {wrong}")
        rows.append(row)
    return rows


def papers_form(meaning: str) -> str:
    """`name[The Vaults], eatType[pub]` -> `name : The Vaults | Type : pub`. Raises ValueError for what is no meaning representation."""
    if not re.fullmatch(rf"{ATTRIBUTE}(, *{ATTRIBUTE})*", meaning):
        raise ValueError(f"{meaning!r} is no meaning representation, such as name[The Vaults], eatType[pub]")
    return " | ".join(f"{NAMES.get(name.strip(), name.strip())} : {value}" for name, value in re.findall(ATTRIBUTE, meaning))


def linearise(source: Path, out: Path) -> list[str]:
    """Write the files of the folder `source` into the folder `out`, with sources in the papers' form; a sentence for each file.

    Raises `UserError` for an `out` that holds anything but these files.
    """
    from recipes.common import data

    if not source.is_dir():
        raise UserError(f"{source} is no folder: name the one that data/prepare/e2e_nlg.py wrote")
    written, sentences = {}, []
    for split, path in data.find(str(source)).items():
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            try:
                row["source"] = papers_form(row["source"])
            except ValueError as error:
                raise UserError(f"{path}, row {number}: {error}") from None
        written[out / f"{split}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        sentences.append(f"{out / f'{split}.jsonl'}: {len(rows)} rows of {path}; the first source: {rows[0]['source']}")
    if out.exists() and {path: path.read_text(encoding="utf-8") for path in out.iterdir()} != written:
        raise UserError(f"{out} holds something else: remove it, or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return sentences


def read_outputs(options) -> list[tuple[str, list[str], list[list[str]]]]:
    """(name, outputs, references) of each system in the file that is to be scored. Raises `UserError`."""
    path = Path(options.file)
    if path.suffix == ".jsonl":
        if options.data or options.split:
            raise UserError(f"{path} holds its references: leave --data and --split out")
        lines, names = predictions(path)
        return [(name, [line[name] for line in lines], [line["references"] for line in lines]) for name in names]
    if not options.data:
        raise UserError(f"{path} is a text of outputs: --data FOLDER has to say what they describe")
    from recipes.common import data

    split, files = options.split or "test", data.find(options.data)
    if split not in files:
        raise UserError(f"--data {options.data} has no {split} file: it has {', '.join(files)}, see --split")
    rows, text = read_rows(files[split]), read_text(path)
    outputs = text.removesuffix("\n").split("\n") if text else []
    if len(outputs) != len(rows):
        raise UserError(f"{path} has {len(outputs)} outputs, a line each, but {files[split]} {len(rows)} items: they must be as many")
    return [(path.name, outputs, [row["refs"] if "refs" in row else [row["target"]] for row in rows])]


def read_text(path: Path) -> str:
    """What a file holds. Raises `UserError`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None


def predictions(path: Path) -> tuple[list[dict], list[str]]:
    """The lines of a predictions-SPLIT.jsonl of --task translate, and the names of the models that wrote them. Raises `UserError`."""
    from recipes.common import evaluation

    wrong = UserError(f"{path} holds no predictions of --task translate: name a predictions-SPLIT.jsonl that scripts/evaluate.py wrote")
    try:
        lines = evaluation.predictions(read_text(path))
        names = [name for name in lines[0] if name not in evaluation.COLUMNS]
        if not names or not all(line["references"] and isinstance(line[name], str) for line in lines for name in names):
            raise wrong
    except (ValueError, LookupError, TypeError):
        raise wrong from None
    return lines, names


# The scores


def measure(outputs: list[str], references: list[list[str]]) -> dict[str, tuple]:
    """Official score -> (value, low, high): the score of outputs against the references of each, and its 95 % interval.

    METEOR has the value alone. What can't be computed here is missing, and `unavailable` says why.
    """
    import numpy as np

    from recipes.common import item_scores, statistics

    outputs = [" ".join(text.split()) for text in outputs]  # a line break would end an item
    references = [[" ".join(text.split()) for text in refs] for refs in references]
    counts = {"BLEU": (bleu_counts(outputs, references), item_scores.METRICS["bleu"].score),
              "NIST": (nist_counts(outputs, references), nist)}
    alone = {}
    if not unavailable():
        cut, cut_references = coco_tokens([[text] for text in outputs]), coco_tokens(references)
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        for name, scorer, score in (("ROUGE-L", Rouge(), item_scores.percent), ("CIDEr", Cider(), item_scores.ratio)):
            counts[name] = (np.column_stack([scorer.compute_score(cut_references, cut)[1], np.ones(len(outputs))]), score)
        alone["METEOR"] = (meteor(cut, cut_references),)
    drawn = statistics.draws(len(outputs), RESAMPLES, 0)
    found = {name: (float(score(rows.sum(0))), *statistics.interval(statistics.resample([rows], score, drawn)))
             for name, (rows, score) in counts.items()}
    return found | alone


def unavailable() -> str | None:
    """Why METEOR, ROUGE-L and CIDEr can't be computed on this machine; None if they can."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install -r requirements-bench.txt"
    return None if shutil.which("java") else "their programs need Java, and there is no `java` on the path"


def bleu_counts(outputs: list[str], references: list[list[str]]):
    """Counts of each item (items, 10), whose sums give corpus BLEU in lower case, cut as mteval-v13a does."""
    import numpy as np
    import sacrebleu

    from recipes.common import metrics

    mteval = sacrebleu.BLEU(lowercase=True, tokenize="13a", force=True)
    return np.array(mteval._extract_corpus_statistics(outputs, metrics.streams(references)), dtype=float)


def nist_counts(outputs: list[str], references: list[list[str]]):
    """Counts of each item (items, 2 x ORDERS + 2), whose sums give NIST (Doddington, 2002, dl.acm.org/doi/10.5555/1289189.1289273).

    Of each length of n-gram: the information of those that a reference has too, and how many were written. Then the words written, and
    the words of a reference, on average. Information is log2 of how much rarer an n-gram is, in the references of all items, than the same
    without its last word. An n-gram counts as often as the reference that has it most allows, as in mteval-v13a; nltk takes one reference
    for all.
    """
    import numpy as np
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    cut = Tokenizer13a()
    words = [cut(text.lower()).split() for text in outputs]
    reference_words = [[cut(text.lower()).split() for text in refs] for refs in references]
    occurs = Counter(gram for refs in reference_words for ref in refs for n in range(1, ORDERS + 1) for gram in ngrams(ref, n))
    occurs[()] = sum(len(ref) for refs in reference_words for ref in refs)
    rows = np.zeros((len(outputs), 2 * ORDERS + 2))
    for row, own, refs in zip(rows, words, reference_words, strict=True):
        for n in range(1, ORDERS + 1):
            allowed = Counter()
            for ref in refs:
                allowed |= Counter(ngrams(ref, n))
            hits = Counter(ngrams(own, n)) & allowed
            row[n - 1] = sum(count * math.log2(occurs[gram[:-1]] / occurs[gram]) for gram, count in hits.items())
            row[ORDERS + n - 1] = max(0, len(own) - n + 1)
        row[-2:] = len(own), sum(map(len, refs)) / len(refs)
    return rows


def ngrams(words: list[str], n: int) -> list[tuple]:
    """All runs of n words."""
    return [tuple(words[i: i + n]) for i in range(len(words) - n + 1)]


def nist(sums):
    """NIST from summed counts (..., 2 x ORDERS + 2); outputs of two thirds of the references' length earn half."""
    import numpy as np

    gained, written = sums[..., :ORDERS], sums[..., ORDERS: 2 * ORDERS]
    with np.errstate(divide="ignore"):  # no words at all: log 0, and a brevity of 0
        shortness = np.log(np.minimum(1, sums[..., -2] / sums[..., -1]))
    return (gained / np.maximum(written, 1)).sum(-1) * np.exp(math.log(0.5) / math.log(1.5) ** 2 * shortness**2)


def coco_tokens(texts: list[list[str]]) -> dict[int, list[str]]:
    """Texts as the COCO caption evaluation cuts them: by Stanford's tokenizer, in lower case, without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({i: [{"caption": text} for text in item] for i, item in enumerate(texts)})


def meteor(outputs: dict[int, list[str]], references: dict[int, list[str]]) -> float:
    """METEOR, 0-100, of what `coco_tokens` cut. Its program takes some 20 s to start."""
    from pycocoevalcap.meteor.meteor import Meteor

    return 100 * Meteor().compute_score(references, outputs)[0]


# Tables


def runs_table(runs: list[Path], split: str | None) -> list[tuple]:
    """The rows that `show` takes: each run, and each untuned model once. Raises `UserError` for runs scored on different items."""
    from recipes.common import evaluation, models

    rows, first = {}, None
    for run in runs:
        record, path = models.read_record(run), predictions_of(run, split)
        lines, names = predictions(path)
        losses = json.loads(read_text(path.with_name(path.name.replace("predictions-", "losses-")).with_suffix(".json")))
        items = [(line["source"], line["references"]) for line in lines]
        first = first or (run, items)
        if items != first[1]:
            raise UserError(f"{run} and {first[0]} were scored on different items: give them the same --data, --split and --limit")
        for name in names:
            outputs, own = [line[name] for line in lines], name == evaluation.own_name(record)
            key = (run,) if own else (name, *outputs)
            if key in rows:
                continue
            scores = measure(outputs, [references for _, references in items])
            scores["loss"] = loss(losses.get(name, {}))
            title, trained = (run.name, f"{record['trainable_parameters']:,}") if own else (name, "0")
            rows[key] = (title, trained, scores)
    return list(rows.values())


def loss(sums: dict[str, list[float]]) -> tuple:
    """(nats a token, low, high) of row -> [nats, tokens]."""
    import numpy as np

    from recipes.common import item_scores, statistics

    if not sums:
        return (math.nan,)
    counts = np.array(list(sums.values()))
    resampled = statistics.resample([counts], item_scores.ratio, statistics.draws(len(counts), RESAMPLES, 0))
    return float(item_scores.ratio(counts.sum(0))), *statistics.interval(resampled)


def predictions_of(run: Path, split: str | None) -> Path:
    """The predictions of a run that are to be shown. Raises `UserError` if there are none, or several."""
    found = [run / f"predictions-{split}.jsonl"] if split else sorted(run.glob("predictions-*.jsonl"))
    if not found or not found[0].is_file():
        raise UserError(f"{run} has no predictions{f' of {split}' if split else ''}: python scripts/evaluate.py --run {run}")
    if len(found) > 1:
        names = ", ".join(path.stem.removeprefix("predictions-") for path in found)
        raise UserError(f"{run} has several predictions ({names}): name one with --split")
    return found[0]


def show(rows: list[tuple[str, str, dict]]) -> None:
    """A Markdown table of (name, trained parameters, score -> (value, low, high) or (value,)), and what is missing from it."""
    columns = [name for name in (*DIGITS, "loss") if any(name in scores for _, _, scores in rows)]
    print("| | trained | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for title, trained, scores in rows:
        cells = [shown(scores.get(name, (math.nan,)), DIGITS.get(name, 3)) for name in columns]
        print(" | ".join([f"| {title} | {trained}", *cells]) + " |")
    if reason := unavailable():
        print(f"note: METEOR, ROUGE-L and CIDEr are left out: {reason}")


def shown(score: tuple, digits: int) -> str:
    """A value and its interval; a dash where there is none."""
    value, *ends = score
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" + (f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else "")


if __name__ == "__main__":
    main()
