"""CrossWOZ: Chinese dialogues between two people about hotels, restaurants, sights and traffic in Beijing (Zhu et al., 2020,
arXiv:2002.11893).

    python data/prepare/crosswoz.py

Task chat, with the split of the authors. `type` is the kind of goal that the user was given.
"""

import io
import json

from common import dialogue, member, prepare

LICENCE = "Apache-2.0"
SOURCE = "https://github.com/thu-coai/CrossWOZ/archive/HEAD.zip"
ROLES = {"usr": "user", "sys": "assistant"}


def convert(path):
    return {ours: [row(number, item) for number, item in load(path, theirs).items()]
            for ours, theirs in (("train", "train"), ("dev", "val"), ("test", "test"))}


def load(path, name):
    return json.loads(member(io.BytesIO(member(path, f"*/data/crosswoz/{name}.json.zip")), f"*{name}.json"))


def row(number, item):
    return dialogue([(ROLES[turn["role"]], turn["content"]) for turn in item["messages"]],
                    id=f"crosswoz-{number}", language="zh", type=item["type"])


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
