"""Tatoeba: English sentences and their Chinese translations, collected by volunteers.

    python data/prepare/tatoeba.py

Task translate. A row of train is one pair; a row of dev and test is an English sentence with all its translations in `refs`, the first
of them as `target`. `attribution` names the sentences' authors and must travel with them. Simplified and traditional characters mix.
Split here, by English sentence. The file is that of manythings.org, which exports Tatoeba's pairs.
"""

from common import member, prepare, split

LICENCE = "CC BY 2.0 FR"
SOURCE = "https://www.manythings.org/anki/cmn-eng.zip"


def convert(path):
    pairs = [dict(zip(("source", "target", "attribution"), line.split("\t"), strict=True))
             for line in member(path, "cmn.txt").decode("utf-8").splitlines() if line.strip()]
    for pair in pairs:
        pair["attribution"] = pair["attribution"].removeprefix("CC-BY 2.0 (France) Attribution: ")
    splits = split(pairs, lambda row: row["source"])
    return {"train": splits["train"], "dev": grouped(splits["dev"]), "test": grouped(splits["test"])}


def grouped(pairs):
    rows = {}
    for pair in pairs:
        row = rows.setdefault(pair["source"], {"source": pair["source"], "target": pair["target"], "refs": [], "attribution": []})
        row["refs"].append(pair["target"])
        row["attribution"].append(pair["attribution"])
    return [{**row, "attribution": "; ".join(row["attribution"])} for row in rows.values()]


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
