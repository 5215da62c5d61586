"""MultiWOZ in Chinese: the 250 validation dialogues whose translation people corrected (Zhu et al., 2020, arXiv:2002.04793).

    python data/prepare/multiwoz_zh.py

Task chat. The other Chinese dialogues of that project are raw machine translation and not taken. These are split by dialogue.
"""

import json

from common import dialogue, member, prepare, split

LICENCE = "MIT (MultiWOZ), Apache-2.0 (translation)"
SOURCE = "https://raw.githubusercontent.com/thu-coai/ConvLab-2/HEAD/data/multiwoz_zh/human_val.json.zip"


def convert(path):
    rows = []
    for name, item in json.loads(member(path, "*.json")).items():  # the log alternates and begins with the user
        turns = [("user" if i % 2 == 0 else "assistant", turn["text"]) for i, turn in enumerate(item["log"])]
        rows.append(dialogue(turns, id=f"multiwoz-zh-{name.removesuffix('.json')}", language="zh"))
    return split(rows, lambda row: row["id"])


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
