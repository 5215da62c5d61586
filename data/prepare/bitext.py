"""Bitext customer support: English requests with intent, category and an answer, made by a text generator.

    python data/prepare/bitext.py

Tasks classify (`text`, `label`) and chat (`messages`), in the same rows. `tags` are letters for the style: Q colloquial, W offensive,
Z with typos and so on. Answers hold placeholders such as {{Order Number}}. Split here, each request on one side only.
"""

from common import dialogue, prepare, split, table

LICENCE = "CDLA-Sharing-1.0"
SOURCE = ("https://raw.githubusercontent.com/bitext/customer-support-llm-chatbot-training-dataset/HEAD/data/train/"
          "Bitext_Sample_Customer_Support_Training_Dataset.csv")


def convert(path):
    return split([dialogue([("user", row["instruction"]), ("assistant", row["response"])], text=row["instruction"].strip(),
                           label=row["intent"], category=row["category"], tags=row["tags"])
                  for row in table(path.read_bytes())], lambda row: row["text"].lower())


if __name__ == "__main__":
    prepare(__doc__, LICENCE, SOURCE, convert)
