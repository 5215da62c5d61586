"""Banking77: English questions to a bank with 77 intents (Casanueva et al., 2020, arXiv:2003.04807).

    python data/prepare/banking77.py

Task classify, with the authors' train and test. They give no dev set: a training holds a share of train out by itself.
"""

from common import member, prepare, table

LICENCE = "CC BY 4.0"
SOURCE = "https://github.com/PolyAI-LDN/task-specific-datasets/archive/HEAD.zip"


def convert(path):
    return {split: [{"text": row["text"].strip(), "label": row["category"]} for row in table(member(path, f"*/banking_data/{split}.csv"))]
            for split in ("train", "test")}


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
