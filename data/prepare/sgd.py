"""Schema-Guided Dialogue: English dialogues with a virtual assistant over 20 domains (Rastogi et al., 2019, arXiv:1909.05855).

    python data/prepare/sgd.py

Task chat. `domains` are the services without their version. The archive is large, as it holds annotations that are not kept here.
"""

import json

from common import dialogue, members, prepare

LICENCE = "CC BY-SA 4.0"
SOURCE = "https://github.com/google-research-datasets/dstc8-schema-guided-dialogue/archive/HEAD.zip"
ROLES = {"USER": "user", "SYSTEM": "assistant"}


def convert(path):
    return {split: [row(split, item) for raw in members(path, f"*/{split}/dialogues_*.json").values() for item in json.loads(raw)]
            for split in ("train", "dev", "test")}


def row(split, item):
    domains = sorted({service.rsplit("_", 1)[0] for service in item["services"]})
    return dialogue([(ROLES[turn["speaker"]], turn["utterance"]) for turn in item["turns"]],
                    id=f"sgd-{split}-{item['dialogue_id']}", domains=domains)


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
