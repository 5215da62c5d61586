"""ChnSentiCorp: Chinese hotel reviews, positive or negative (Tan Songbo).

    python data/prepare/chnsenticorp.py

Task classify. Split here, each review on one side only.
"""

from common import prepare, split, table

LICENCE = "none stated; the reviews are those of a travel site, for research"
SOURCE = ("https://raw.githubusercontent.com/SophonPlus/ChineseNlpCorpus/HEAD/datasets/ChnSentiCorp_htl_all/"
          "ChnSentiCorp_htl_all.csv")
LABELS = {"1": "positive", "0": "negative"}


def convert(path):
    return split([{"text": row["review"].strip(), "label": LABELS[row["label"]]} for row in table(path.read_bytes())],
                 lambda row: row["text"])


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
