"""Small alterations of what a user says: words, order, typing slips, script. Pure functions from text to text.

None of them touches numbers, ids, addresses, placeholders, number words, days and months, what a number counts in Chinese (50元), a
negation with the word that follows it, or the words that the user protects. `facts` lists all but the counted, so that any rewriting, a
model's too, can be checked for having kept them. An English word and a single Chinese character are the units. After EDA (Wei and Zou,
2019, arXiv:1901.11196) and synthetic noise (Belinkov and Bisk, 2018, arXiv:1711.02173).
"""

import random
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from recipes.common.errors import UserError

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[^\W\d_{HAN}]+(?:['’-][^\W\d_{HAN}]+)*|[{HAN}]")

_NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
            "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million first second third half twice")
_DATES = ("monday tuesday wednesday thursday friday saturday sunday january february march april may june july august september october "
          "november december")
_NEGATIONS = ("no not never none nothing nobody nowhere neither nor without cannot cant dont wont didnt doesnt isnt wasnt couldnt "
              "wouldnt shouldnt havent hasnt aint")
_LETTERS = "A-Za-zＡ-Ｚａ-ｚ"  # of ids, in both widths


def _any_of(words: str) -> str:
    # Not \b: a Chinese character is a letter to it, so it would miss "iPhone" in "iPhone手机".
    return rf"(?<![A-Za-z])(?:{'|'.join(words.split())})(?![A-Za-z])"


FACT = re.compile("|".join((
    r"\{\{.*?\}\}", r"<[^<>\s]+>", r"[A-Za-z][A-Za-z ]*\[[^\]]*\]",  # {{name}}, <name>, food[Thai]
    rf"https?://[^\s{HAN}]+", r"[A-Za-z0-9_.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+",
    rf"(?:[{_LETTERS}\d]+[-_/.:])*[{_LETTERS}]*\d[{_LETTERS}\d]*(?:[-_/.,:][{_LETTERS}\d]+)*%?",  # 49, 10:30, MW204518, A-17/3
    "[¹²³¼½¾\u2070-\u2079\u2150-\u218b\u2460-\u249b\u24ea-\u24ff\u2776-\u2793\u3220-\u3229\u3280-\u3289]+",  # ①, ½, ²
    _any_of(f"{_NUMBERS} {_DATES}"), "[零〇一二两兩三四五六七八九十百千万萬亿億半]+")), re.I)
NEGATION = re.compile(rf"{_any_of(_NEGATIONS)}|(?<![A-Za-z])[A-Za-z]+n['’]t(?![A-Za-z])|[不没沒無无别別莫勿未非否甭]", re.I)
# What a number counts in Chinese: 50元 is no amount any more where a slip makes 50远 of it.
UNIT = re.compile("(?:分钟|小时|点钟|公里|千米|公斤|英寸|星期|美元|[元块角分毛折点号月日年天岁时秒周人位个件张间晚米斤克寸楼层])+")
_SAME_NUMBER = str.maketrans("兩萬億", "两万亿")

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Only what a change of input method changes: a full-width dollar sign or digit would be an altered fact.
_HALF = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,!?:;()"
_FULL = "".join(chr(ord(character) + 0xFEE0) for character in _HALF)


def protection(words: list[str]) -> re.Pattern:
    """A pattern of the words and phrases that must stay as they are, whatever their case. Without any, it matches nothing."""
    parts = [(r"(?<![A-Za-z0-9])" if word[0].isascii() else "") + re.escape(word) + (r"(?![A-Za-z0-9])" if word[-1].isascii() else "")
             for word in sorted(words, key=len, reverse=True)]
    return re.compile("|".join(parts) or "(?!)", re.I)


def facts(text: str, protect: re.Pattern) -> Counter:
    """What a rewriting must keep: numbers, ids and protected words, each with its count, and the number of negations."""
    found = [match[0].lower().translate(_SAME_NUMBER) for pattern in (FACT, protect) for match in pattern.finditer(text)]
    return Counter(found) + Counter({"a negation": len(NEGATION.findall(text))})


def free_words(text: str, protect: re.Pattern) -> list[re.Match]:
    """The words of `text` that may be altered."""
    spans = [match.span() for match in FACT.finditer(text)]
    spans += [unit.span() for _, end in spans if (unit := UNIT.match(text, end))]
    spans += [match.span() for match in protect.finditer(text)]
    for match in NEGATION.finditer(text):
        scope = WORD.search(text, match.end())
        spans.append((match.start(), scope.end() if scope and not text[match.end():scope.start()].strip() else match.end()))
    return [word for word in WORD.finditer(text) if not any(start < word.end() and word.start() < end for start, end in spans)]


def synonym(text: str, protect: re.Pattern, rng: random.Random, share: float, lexicon: dict[str, list[str]]) -> str:
    """Replace `share` of the words by synonyms. Chinese words are found in the text by the longest match."""
    free, edits, at = free_words(text, protect), [], 0
    longest = max(map(len, lexicon), default=0)
    while at < len(free):
        run = at  # Chinese characters that follow each other without a gap
        while _is_han(free[at]) and run + 1 < len(free) and _is_han(free[run + 1]) and free[run].end() == free[run + 1].start():
            run += 1
        ends = [free[i].end() for i in range(min(run, at + longest - 1), at - 1, -1)] if longest else []
        end = next((end for end in ends if text[free[at].start():end].lower() in lexicon), None)
        if end is not None:
            old = text[free[at].start():end]
            new = rng.choice(lexicon[old.lower()])
            edits.append((free[at].start(), end, new[0].upper() + new[1:] if old[0].isupper() else new))
        at = next((i for i in range(at + 1, len(free)) if end is None or free[i].start() >= end), len(free))
    return _edit(text, rng.sample(edits, min(len(edits), _count(free, share))))


def swap(text: str, protect: re.Pattern, rng: random.Random, share: float) -> str:
    """Exchange neighbouring words, `share` of them; a protected word is never moved or passed."""
    free = free_words(text, protect)
    pairs = [i for i in range(len(free) - 1) if text[free[i].end():free[i + 1].start()] == ("" if _is_han(free[i]) else " ")
             and _is_han(free[i]) == _is_han(free[i + 1])]
    rng.shuffle(pairs)
    edits, taken = [], set()
    for i in pairs[:_count(free, share)]:
        if not taken & {i, i + 1}:
            taken |= {i, i + 1}
            edits += [(*free[i].span(), free[i + 1][0]), (*free[i + 1].span(), free[i][0])]
    return _edit(text, edits)


def delete(text: str, protect: re.Pattern, rng: random.Random, share: float) -> str:
    """Leave out `share` of the words; at least three words stay."""
    free = free_words(text, protect)
    count = min(len(free), _count(free, share), len(WORD.findall(text)) - 3)
    shorter = _edit(text, [(*word.span(), "") for word in rng.sample(free, max(0, count))])
    shorter = re.sub(r" +([,.!?])", r"\1", re.sub(r" {2,}", " ", shorter)).strip()
    return shorter if count > 0 and facts(shorter, protect) == facts(text, protect) else text  # a word may keep two numbers apart


def noise(text: str, protect: re.Pattern, rng: random.Random, share: float) -> str:
    """Typing slips in `share` of the words: in English words of four letters or more a neighbouring key, two letters exchanged, one
    missing or doubled; in Chinese another common character of the same pinyin."""
    free = free_words(text, protect)
    chosen = [word for word in free if len(word[0]) >= 4 or (_is_han(word) and homophones(word[0]))]
    chosen = rng.sample(chosen, min(len(chosen), _count(free, share)))
    return _edit(text, [(*word.span(), rng.choice(homophones(word[0])) if _is_han(word) else _slip(word[0], rng)) for word in chosen])


def variant(texts: list[str], protect: re.Pattern, rng: random.Random) -> list[str]:
    """Chinese texts in the other script (OpenCC), or with their letters and punctuation in the other width: one of those that change
    them, the same for all, as nobody changes script in the middle of a dialogue."""
    if not re.search(f"[{HAN}]", "".join(texts)):
        return texts
    outside_facts = re.compile(f"{FACT.pattern}|{NEGATION.pattern}|{protect.pattern}", re.I)
    found = [[_outside(protect, text, converter(name).convert) for text in texts] for name in ("s2t", "t2s")]
    found += [[_outside(outside_facts, text, lambda piece, table=table: piece.translate(table)) for text in texts]
              for table in (str.maketrans(_HALF, _FULL), str.maketrans(_FULL, _HALF))]
    return rng.choice([others for others in found if others != texts] or [texts])


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """A file with a word and its synonyms a line, separated by tabs. Raises `UserError`."""
    lexicon = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--synonyms {path} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    for number, line in enumerate(lines, start=1):
        word, *others = [part.strip() for part in line.split("\t")]
        if not line.strip():
            continue
        if not others or not all(others) or not re.fullmatch(rf"{WORD.pattern}|[{HAN}]+", word):
            raise UserError(f"--synonyms {path}, row {number}: expected a word, a tab and its synonyms, separated by tabs; an English "
                            f"word stands alone: {line[:60]!r}")
        lexicon.setdefault(word.lower(), []).extend(others)
    return lexicon


@lru_cache
def converter(name: str):
    """OpenCC's converter "s2t" (to traditional) or "t2s" (to simplified characters)."""
    import opencc

    return opencc.OpenCC(name)


@lru_cache
def homophones(character: str) -> list[str]:
    """Other common characters (level 1 of GB 2312, 3,755 of them) with the same pinyin, tones aside: what an input method offers.
    None that is a number or a negation."""
    return [other for other in _by_sound().get(_sound(character), [])
            if other != character and not FACT.match(other) and not NEGATION.match(other)]


@lru_cache
def _by_sound() -> dict[str, list[str]]:
    found = {}
    for row in range(0xB0, 0xD8):
        for character in bytes(b for cell in range(0xA1, 0xFF) for b in (row, cell) if (row, cell) < (0xD7, 0xFA)).decode("gb2312"):
            found.setdefault(_sound(character), []).append(character)
    return found


def _sound(character: str) -> str:
    from pypinyin import lazy_pinyin

    return lazy_pinyin(character)[0]


def _slip(word: str, rng: random.Random) -> str:
    at, kind = rng.randrange(1, len(word) - 1), rng.choice(("neighbour", "exchange", "missing", "double"))  # the ends carry the word
    if kind == "neighbour":
        return word[:at] + rng.choice(_neighbours(word[at].lower()) or word[at]) + word[at + 1:]
    if kind == "exchange":
        return word[:at - 1] + word[at] + word[at - 1] + word[at + 1:]
    return word[:at] + (word[at] * 2 if kind == "double" else "") + word[at + 1:]


def _neighbours(letter: str) -> str:
    places = [(row, keys.index(letter)) for row, keys in enumerate(KEYBOARD) if letter in keys]
    return "".join(key for row, column in places for i, keys in enumerate(KEYBOARD) for j, key in enumerate(keys)
                   if key != letter and abs(i - row) <= 1 and abs(j - column) <= 1)


def _is_han(word: re.Match) -> bool:
    return bool(re.match(f"[{HAN}]", word[0]))


def _count(free: list, share: float) -> int:
    return max(1, round(len(free) * share))


def _edit(text: str, edits: list[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _outside(pattern: re.Pattern, text: str, change) -> str:
    """`change` applied to the pieces of `text` that `pattern` does not match."""
    pieces, at = [], 0
    for match in pattern.finditer(text):
        pieces += [change(text[at:match.start()]), match[0]]
        at = match.end()
    return "".join(pieces) + change(text[at:])
