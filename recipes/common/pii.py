"""Personal data in English and Chinese text: where it stands, and the same text with stable placeholders in its place.

Kinds: EMAIL; PHONE (international with a plus sign; national forms of mainland China, the United States and the United Kingdom);
ID_CARD (the mainland's 18-digit 身份证, GB 11643); BANK_CARD (13 to 19 digits, ISO/IEC 7812); IBAN (account numbers, ISO 13616); ORDER
(order numbers).

Patterns alone would flag every long number, so whatever has a check digit or a numbering plan is held against it: the ISO 7064
MOD 11-2 digit and the birth date of an identity card, the Luhn digit and the issuer's prefix of a bank card, the check digits and the
length of an IBAN, Google's libphonenumber metadata for telephones. What is left uncertain is flagged: a number masked for nothing costs
less than one that a model learns.

Not found: names, postal addresses, dates of birth, addresses of computers (192.168.1.20 may be a version), short numbers (95588,
12306), a number glued to Latin letters (wx13812345678), and numbers spelt in words.
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from typing import NamedTuple

import phonenumbers
from phonenumbers import Leniency, PhoneNumberMatcher

# Most specific first: the order decides between two findings of the same length.
KINDS = ("EMAIL", "ID_CARD", "IBAN", "ORDER", "BANK_CARD", "PHONE")

STAY = ("role", "id", "label", "tags", "intent", "sentiment", "action", "language")  # columns and keys that are not masked

# An order number is the last group of a pattern, or all of it. With a word that says so, any number of four digits or more; after a
# plain "order", "purchase" or 订单, of six, unless it is a date; without a word, two to four letters and six digits (MW204518), unless the
# letters are a currency or those of Windows' patches (KB888111), or digits as Amazon groups them.
# What stands between the word and the number is bounded, so that no text is slow to search.
ORDER_PATTERNS = (
    r"(?i)(?:订单编?号码?|订单id|\border\s{0,3}(?:number|no\b\.?|id\b|#))[\s:：#]{0,4}(?:is\s|是|为)?[\s:：#]{0,4}"
    r"([a-z]{0,4}-?[0-9](?:-?[0-9]){3,})(?![0-9a-z])",
    r"(?i)(?:订单|\border|\bpurchase)[\s:：#]{0,4}(?!(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?![0-9]))"
    r"([0-9]{6,})(?![0-9a-z]|[.,][0-9]|元)",
    r"(?i)(?<![0-9a-z])(?!(?:usd|eur|gbp|cny|rmb|hkd|jpy|kb)[0-9])[a-z]{2,4}-?[0-9]{6,}(?![0-9a-z])",
    r"(?<![0-9A-Za-z-])[0-9]{3}-[0-9]{7}-[0-9]{7}(?![0-9A-Za-z-])",
)

# Chinese text goes on without a blank before and behind an address, so letters of an address are those of other scripts. In a domain of
# Chinese, what ends it must be known; a name of Chinese before it begins after a blank or a sign.
_LETTER = r"[^\W\u2e80-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
_EMAIL = re.compile(
    rf"(?<![%+-])(?<!{_LETTER})(?![.])(?:{_LETTER}|[.%+-]){{1,64}}@"
    rf"(?:(?:(?!_){_LETTER}|-){{1,63}}\.){{1,8}}(?:xn--[a-z0-9-]{{2,59}}|(?:(?![0-9_]){_LETTER}){{2,24}})(?!(?!_){_LETTER}|-)"
    rf"|(?:(?<![%+-])(?<!{_LETTER})(?:{_LETTER}|[.%+-]){{1,64}}|(?<!\w)\w{{1,64}})@(?:(?:\w|-){{1,63}}\.){{1,8}}"
    r"(?:中国|中國|公司|网络|網絡|网址|網址|网站|中文网|集团|商城|在线|在線|我爱你|香港|台湾|台灣|政务|公益)", re.I)
_IBAN = re.compile(r"(?<![0-9A-Za-z])([A-Z]{2})[0-9]{2}(?: ?[0-9A-Z]){11,30}")
# The length of an account number by country: the SWIFT registry, release 99.
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 "
    "FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 "
    "MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 "
    "SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30").split()}
_ID_CARD = re.compile(r"(?<![0-9A-Za-z])[1-8][0-9]{5}[ -]?[0-9]{8}[ -]?[0-9]{3}[0-9Xx](?![0-9A-Za-z])")
_PROVINCES = {11, 12, 13, 14, 15, 21, 22, 23, 31, 32, 33, 34, 35, 36, 37, 41, 42, 43, 44, 45, 46, 50, 51, 52, 53, 54, 61, 62, 63, 64, 65,
              71, 81, 82, 83}
# As printed on cards: without gaps, in fours, 4-6-4 and 4-6-5 (Diners, American Express), 6-13 (UnionPay). A lookahead, so that a
# number that begins inside a longer one is tried as well: "2024 4111 1111 1111 1111".
_CARD_SHAPES = [re.compile(rf"(?<![0-9A-Za-z_])(?<![0-9]\.)(?=({shape})(?![0-9A-Za-z_]|\.[0-9]))") for shape in (
    r"[0-9]{13,19}",
    r"[0-9]{4}([ -])[0-9]{4}\2[0-9]{4}\2[0-9]{1,4}",
    r"[0-9]{4}([ -])[0-9]{4}\2[0-9]{4}\2[0-9]{4}\2[0-9]{1,3}",
    r"[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5}",
    r"[0-9]{6}[ -][0-9]{13}",
)]
_ISSUERS = re.compile(
    r"4[0-9]{12}(?:[0-9]{3}){0,2}"                                                              # Visa
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"       # Mastercard
    r"|3[47][0-9]{13}"                                                                          # American Express
    r"|3(?:0[0-5]|[689][0-9])[0-9]{11}"                                                         # Diners Club
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12,15}"                                                      # JCB
    r"|6(?:[025][0-9]{2}|4[4-9][0-9])[0-9]{12,15}"                                              # UnionPay, Discover
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])[0-9]{9,15}"                                   # Maestro
    r"|9558[0-9]{15}"                                                                           # ICBC
)

# US numbers must be grouped as numbers are, else "1 2 3 4 5 6 7 8 9 10" is one: ten digits carry no trunk prefix to know them by.
_REGIONS = (("CN", Leniency.VALID), ("GB", Leniency.VALID), ("US", Leniency.STRICT_GROUPING))
# Libphonenumber accepts landlines of the mainland without the 0 of the trunk, and so any ten digits that begin with an area code, and
# short numbers: two rooms (1607 1107). A mobile number has eleven digits.
_DIALLED_IN_CHINA = re.compile(r"[^0-9+]*(?:\+|0|86|1[3-9](?:[^0-9]*[0-9]){9}|[48]00)")
_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")
_CURRENCY_BEFORE = re.compile(r"[$€£¥]\s?\Z")
_UNIT_AFTER = re.compile(r"\s?(?:元|块|美元|%)")
_SEVEN_DIGITS = re.compile(r"(?:[0-9][^0-9]*){7}")
# What every finding has, but those of other order patterns. Most turns lack it, and looking for it takes a hundredth of the time.
_LIKELY = re.compile("[@\uff20]|(?:[0-9\uff10-\uff19][^0-9\uff10-\uff19]*){4}")

_PLACEHOLDER = re.compile(rf"\[(?:{'|'.join(KINDS)})_[0-9]{{1,9}}\]")
# JSON in a text (the arguments of a tool call) writes line ends and Chinese like this: they are no letters before a number.
_ESCAPES = re.compile(r"\\(?:[nrtbf]|u[0-9a-fA-F]{4})")
# Full-width forms and unusual blanks and dashes, one character for one, so that positions stay. Not the comma and the colon: beside
# digits, the narrow ones mean a thousand and an hour.
_NARROW = {0xFEE0 + ord(c): c for c in string.ascii_letters + string.digits + "@._-+()#%"}
_NARROW |= dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2009\u202f\u3000"), " ")
_NARROW |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
_NARROW |= {0xFFE5: "¥"}


class Found(NamedTuple):
    """Characters [start, end) of the text. `value` is what two spellings of the same thing have in common: no separators, one case,
    and a telephone number without its country code."""

    start: int
    end: int
    kind: str
    value: str


def find(text: str, orders: Sequence[str] = ORDER_PATTERNS) -> list[Found]:
    """The personal data in `text`, in order and without overlaps; where two findings overlap, the longer one stays.

    `orders`: regular expressions of order numbers, see `ORDER_PATTERNS`. Raises `re.error` when one of them is broken.
    """
    if orders == ORDER_PATTERNS and not _LIKELY.search(text):
        return []
    narrow = _ESCAPES.sub(lambda match: " " * len(match[0]), text.translate(_NARROW))
    candidates = [Found(*match.span(), "EMAIL", match[0].lower()) for match in _EMAIL.finditer(narrow)]
    for pattern in orders:
        for match in re.finditer(pattern, narrow):
            group = match.lastindex or 0
            candidates.append(Found(*match.span(group), "ORDER", match[group].replace("-", "").upper()))
    candidates += [*_id_cards(narrow), *_ibans(narrow), *_bank_cards(narrow), *_phones(narrow)]
    candidates.sort(key=lambda found: (found.start - found.end, KINDS.index(found.kind), found.start))
    kept, taken = [], bytearray(len(text))
    for found in candidates:
        if found.start < found.end and not any(taken[found.start:found.end]):
            taken[found.start:found.end] = b"\1" * (found.end - found.start)
            kept.append(found)
    return sorted(kept)


def mask_texts(texts: Iterable[str], orders: Sequence[str] = ORDER_PATTERNS) -> tuple[list[str], dict[str, int]]:
    """`texts` that belong together, such as the turns of a dialogue, with [PHONE_1], [EMAIL_1], [EMAIL_2], ... for personal data.

    The same value has the same placeholder in all of them, however it is spelt. Also returns how many places were masked, by kind.
    Placeholders that stand there already keep their meaning: new numbers begin after them, and masked text is masked no further.
    """
    texts = list(texts)
    numbers, counts, masked = {}, {}, []
    taken = {kind: max((int(n) for text in texts for n in re.findall(rf"\[{kind}_([0-9]{{1,9}})\]", text)), default=0) for kind in KINDS}
    for text in texts:
        while places := _unmasked(text, orders):  # what stood glued to another may be found when that is gone
            pieces, end = [], 0
            for found in places:
                if (found.kind, found.value) not in numbers:
                    taken[found.kind] += 1
                    numbers[found.kind, found.value] = taken[found.kind]
                pieces += [text[end:found.start], f"[{found.kind}_{numbers[found.kind, found.value]}]"]
                counts[found.kind] = counts.get(found.kind, 0) + 1
                end = found.end
            text = "".join([*pieces, text[end:]])
        masked.append(text)
    return masked, counts


def _unmasked(text: str, orders: Sequence[str]) -> list[Found]:
    held = [match.span() for match in _PLACEHOLDER.finditer(text)]
    return [found for found in find(text, orders) if not any(found.start < end and start < found.end for start, end in held)]


def mask_row(row: dict, orders: Sequence[str] = ORDER_PATTERNS, stay: Iterable[str] = STAY) -> tuple[dict, dict[str, int]]:
    """`mask_texts` over every string of a row of any task (data/README.md), at whatever depth, but for the keys and columns of `stay`:
    others of a data set are told apart by these, so they must not depend on what else stands in the row. Names of columns stay too.

    A value that is spread over several of a row's `tokens` is not found, as each of them has its own tag.
    """
    texts = []
    _changed(row, texts.append, stay)
    masked, counts = mask_texts(texts, orders)
    masked = iter(masked)
    return _changed(row, lambda text: next(masked), stay), counts


def left_as_they_are(row: dict, stay: Iterable[str] = STAY) -> Iterator[tuple[str, str]]:
    """(column, text) of what `mask_row` leaves alone: columns of `stay`, numbers, and names."""
    def look(name: str, value, stays: bool):
        if isinstance(value, dict):
            for key, entry in value.items():
                yield name or key, str(key)
                yield from look(name or key, entry, stays or key in stay)
        elif isinstance(value, list):
            for entry in value:
                yield from look(name, entry, stays)
        elif value is not None and (stays or not isinstance(value, str)):
            yield name, str(value)

    return look("", row, False)


def _changed(value, change: Callable[[str], str], stay: Iterable[str]):
    """`value` with each string in it replaced by what `change` makes of it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: entry if key in stay else _changed(entry, change, stay) for key, entry in value.items()}
    return [_changed(entry, change, stay) for entry in value] if isinstance(value, list) else value


def luhn(digits: str) -> bool:
    """Whether the last of the `digits` is their Luhn check digit (ISO/IEC 7812-1, annex B)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def id_card(number: str) -> bool:
    """Whether 18 characters are a resident identity number: province, date of birth not in the future, check character (GB 11643)."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17]))
    return int(number[:2]) in _PROVINCES and date(1900, 1, 1) <= born <= date.today() and "10X98765432"[total % 11] == number[17].upper()


def iban(number: str) -> bool:
    """Whether the check digits of an account number are right (ISO 13616: modulo 97 with letters as 10 to 35)."""
    return int("".join(str(int(character, 36)) for character in number[4:] + number[:4])) % 97 == 1


def _id_cards(text: str) -> Iterable[Found]:
    for match in _ID_CARD.finditer(text):
        number = re.sub("[ -]", "", match[0]).upper()
        if id_card(number):
            yield Found(*match.span(), "ID_CARD", number)


def _bank_cards(text: str) -> Iterable[Found]:
    for shape in _CARD_SHAPES:
        for match in shape.finditer(text):
            number = re.sub("[ -]", "", match[1])
            if _ISSUERS.fullmatch(number) and luhn(number) and not _is_price(text, *match.span(1)):
                yield Found(*match.span(1), "BANK_CARD", number)


def _ibans(text: str) -> Iterable[Found]:
    for match in _IBAN.finditer(text):
        number, end, length = "", match.start(), _IBAN_LENGTHS.get(match[1], 99)
        while len(number) < length and end < match.end():  # what follows may be a word in capitals
            number, end = number + text[end].strip(), end + 1
        if len(number) == length and iban(number) and not re.match("[0-9A-Za-z]", text[end:end + 1]):
            yield Found(match.start(), end, "IBAN", number)


def _is_price(text: str, start: int, end: int) -> bool:
    return bool(_CURRENCY_BEFORE.search(text[max(0, start - 2):start]) or _UNIT_AFTER.match(text, end))


def _phones(text: str) -> Iterable[Found]:
    if not _SEVEN_DIGITS.search(text):  # the matcher is slow, and most turns hold no number at all
        return
    for region, leniency in _REGIONS:
        for match in PhoneNumberMatcher(text, region, leniency=leniency):
            if region == "CN" and not _DIALLED_IN_CHINA.match(match.raw_string):
                continue
            if _is_price(text, match.start, match.end) or _DECIMAL.fullmatch(match.raw_string):
                continue
            yield Found(match.start, match.end, "PHONE", phonenumbers.national_significant_number(match.number))
