"""CLINC150: English requests to an assistant, 150 intents and requests outside of them (Larson et al., 2019, arXiv:1909.02027).

    python data/prepare/clinc150.py

Task classify. Requests outside of the 150 intents have the label `oos`; leave them out for figures on the intents alone.
"""

import json

from common import prepare

LICENCE = "CC BY 3.0"
SOURCE = "https://raw.githubusercontent.com/clinc/oos-eval/HEAD/data/data_full.json"


def convert(path):
    data = json.loads(path.read_bytes())
    return {ours: [{"text": text, "label": label} for text, label in data[theirs] + data[f"oos_{theirs}"]]
            for ours, theirs in (("train", "train"), ("dev", "val"), ("test", "test"))}


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
