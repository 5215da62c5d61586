"""MultiWOZ 2.2: English dialogues between a tourist and an information desk (Zang et al., 2020, arXiv:2007.12720).

    python data/prepare/multiwoz.py

Task chat, with the split of the authors.
"""

import json

from common import dialogue, members, prepare

LICENCE = "MIT"
SOURCE = "https://github.com/budzianowski/multiwoz/archive/HEAD.zip"
ROLES = {"USER": "user", "SYSTEM": "assistant"}


def convert(path):
    return {split: [row(item) for raw in members(path, f"*/MultiWOZ_2.2/{split}/dialogues_*.json").values() for item in json.loads(raw)]
            for split in ("train", "dev", "test")}


def row(item):
    turns = [(ROLES[turn["speaker"]], turn["utterance"]) for turn in item["turns"]]
    return dialogue(turns, id=f"multiwoz-{item['dialogue_id'].removesuffix('.json')}", domains=sorted(item["services"]))


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
