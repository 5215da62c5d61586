"""ChatterBot corpus: small talk and facts in English and Chinese.

    python data/prepare/chatterbot.py

Task chat; `language` tells the two apart, `domain` is the topic. The package is downloaded and read, not installed. Turns alternate,
beginning with the user; some files list further answers as further turns. A last turn of the user, which nobody answers, is cut. Split
here, each first question on one side only. Quality is mixed.
"""

import yaml
from common import dialogue, members, prepare, split

LICENCE = "BSD-3-Clause"
SOURCE = "chatterbot-corpus==1.3.3"
FOLDERS = {"en": "english", "zh": "chinese"}


def convert(path):
    rows, cut = [], 0
    for language, folder in FOLDERS.items():
        for name, raw in members(path, f"*/data/{folder}/*.yml").items():
            topic = name.rsplit("/", 1)[1].removesuffix(".yml")
            for number, texts in enumerate(yaml.safe_load(raw)["conversations"]):
                even = len(texts) // 2 * 2
                cut += even < len(texts)
                turns = [("user" if i % 2 == 0 else "assistant", str(text)) for i, text in enumerate(texts[:even])]
                rows.append(dialogue(turns, id=f"chatterbot-{language}-{topic}-{number}", language=language, domain=topic))
    print(f"{cut} conversations lost their last turn, which nobody answers")
    return split(rows, lambda row: row["messages"][0]["content"].lower() if row["messages"] else "")


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
