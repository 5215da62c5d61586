"""E2E NLG: English descriptions of restaurants from attribute lists (Novikova et al., 2017, arXiv:1706.09254).

    python data/prepare/e2e_nlg.py

Task translate: `source` is the meaning representation, `target` a description. A row of train has one description; a row of dev and
test has all descriptions of its meaning representation in `refs`, the first of them as `target`.
"""

from common import member, prepare, table

LICENCE = "CC BY-SA 4.0"
SOURCE = "https://github.com/tuetschek/e2e-dataset/archive/v1.0.0.zip"


def convert(path):
    splits = {"train": [{"source": row["mr"], "target": row["ref"]} for row in table(member(path, "*/trainset.csv"))]}
    for name, file in (("dev", "devset.csv"), ("test", "testset_w_refs.csv")):
        refs = {}
        for row in table(member(path, f"*/{file}")):
            refs.setdefault(row["mr"], []).append(row["ref"])
        splits[name] = [{"source": mr, "target": texts[0], "refs": texts} for mr, texts in refs.items()]
    return splits


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
