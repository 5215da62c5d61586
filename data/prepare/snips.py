"""SNIPS: English commands to a voice assistant with 39 kinds of slots and 7 intents (Coucke et al., 2018, arXiv:1805.10190).

    python data/prepare/snips.py

Task tag, with the split of Goo et al. (2018). `intent` is the intent of the command.
"""

from common import member, prepare

LICENCE = "CC0 1.0 (the original set)"
SOURCE = "https://github.com/MiuLab/SlotGated-SLU/archive/HEAD.zip"


def convert(path):
    return {ours: [{"tokens": tokens.split(), "tags": tags.split(), "intent": intent.strip()}
                   for tokens, tags, intent in zip(*(lines(path, theirs, name) for name in ("seq.in", "seq.out", "label")), strict=True)]
            for ours, theirs in (("train", "train"), ("dev", "valid"), ("test", "test"))}


def lines(path, split, name):
    return member(path, f"*/data/snips/{split}/{name}").decode("utf-8").rstrip("\n").split("\n")


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
