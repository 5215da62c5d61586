"""The dialogues in data/customer_service keep what their data card promises.

    python -m pytest tests/test_customer_service.py
"""

import json
import random
import re
from collections import Counter, defaultdict

import pytest
from conftest import ROOT

from recipes.common.data import check_dialogue
from recipes.common.metrics import detect_language

FOLDER = ROOT / "data" / "customer_service"

SHOP_INTENTS = {
    "order_status", "cancel_order", "return_item", "refund_status", "exchange_item", "request_invoice", "change_address", "coupon_problem",
    "damaged_goods", "wrong_item", "missing_item", "delivery_delay", "product_question", "stock_question", "payment_problem",
    "warranty_claim", "price_protection", "change_order",
}
BANK_INTENTS = {
    "lost_card", "disputed_charge", "transfer_limit", "transfer_failed", "card_activation", "reset_password", "report_fraud",
    "fee_question", "loan_question", "credit_limit", "close_account", "open_account", "update_contact", "travel_notice",
    "statement_request", "branch_appointment", "direct_debit", "card_declined",
}
COMMON_INTENTS = {
    "complaint", "request_human", "inform", "confirm", "decline", "ask_followup", "thank", "greet", "out_of_scope",
}
SENTIMENTS = {"angry", "neutral", "happy"}
ACTIONS = {
    "greet", "ask_order_number", "ask_identity", "ask_photo", "ask_details", "ask_choice", "inform_status", "inform_policy",
    "offer_solution", "confirm_done", "admit_limit", "apologise", "warn_security", "hand_over", "close",
}

SPLITS = {split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]
          for split in ("train", "dev", "test")}
ROWS = [row for rows in SPLITS.values() for row in rows]


def turns(row, role=None):
    """The turns of a dialogue without its system turn; those of one role, if given."""
    return [turn for turn in row["messages"] if turn["role"] == role or (role is None and turn["role"] != "system")]


def text(row):
    return " ".join(turn["content"] for turn in turns(row))


def of(language):
    return [row for row in ROWS if row["language"] == language]


# ------------------------------------------------------------------------------------------------------ size and shape


def test_size():
    assert all(len(of(language)) >= 120 for language in ("en", "zh"))


def test_columns():
    for row in ROWS:
        assert list(row) == ["id", "language", "domain", "messages"], row["id"]
        assert check_dialogue(row) is None, row["id"]
        for turn in row["messages"]:
            wanted = {"user": {"intent", "sentiment"}, "assistant": {"action"}, "system": set()}[turn["role"]]
            assert turn.keys() == {"role", "content"} | wanted, row["id"]
            assert turn["content"] == turn["content"].strip() and "\n" not in turn["content"], row["id"]


def test_turns():
    for row in ROWS:
        roles = [turn["role"] for turn in turns(row)]
        assert 4 <= len(roles) <= 12, row["id"]
        assert (roles[0], roles[-1]) == ("user", "assistant"), row["id"]
        assert not any(pair == ("assistant", "assistant") for pair in zip(roles, roles[1:], strict=False)), row["id"]
    assert len({len(turns(row)) for row in ROWS}) >= 5, "dialogues of different lengths"


def test_one_system_turn_for_each_side_of_the_counter():
    systems = defaultdict(set)
    for row in ROWS:
        assert row["messages"][0]["role"] == "system", row["id"]
        systems[row["language"], row["domain"]].add(row["messages"][0]["content"])
    assert all(len(texts) == 1 for texts in systems.values()) and len(systems) == 4


def test_ids_are_unique_across_splits_and_say_where_a_dialogue_belongs():
    assert [name for name, n in Counter(row["id"] for row in ROWS).items() if n > 1] == []
    for row in ROWS:
        assert re.fullmatch(rf"{row['language']}-{row['domain']}-\d{{3}}", row["id"])


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_has_both_languages_and_both_domains(split):
    counts = Counter((row["language"], row["domain"]) for row in SPLITS[split])
    assert counts.keys() == {(language, domain) for language in ("en", "zh") for domain in ("shop", "bank")}
    assert min(counts.values()) >= 5 and max(counts.values()) <= 1.5 * min(counts.values())


def test_the_language_is_what_it_says():
    for row in ROWS:
        assert detect_language(text(row)) == row["language"], row["id"]
        for turn in turns(row):
            assert len(turn["content"]) < 25 or detect_language(turn["content"]) == row["language"], (row["id"], turn["content"])


# --------------------------------------------------------------------------------------------------------- annotations


def test_annotations_use_exactly_the_vocabulary():
    assert {turn["intent"] for row in ROWS for turn in turns(row, "user")} == SHOP_INTENTS | BANK_INTENTS | COMMON_INTENTS
    assert {turn["sentiment"] for row in ROWS for turn in turns(row, "user")} == SENTIMENTS
    assert {turn["action"] for row in ROWS for turn in turns(row, "assistant")} == ACTIONS
    assert len(SHOP_INTENTS | BANK_INTENTS) >= 24


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("domain, intents", [("shop", SHOP_INTENTS), ("bank", BANK_INTENTS)])
def test_each_intent_occurs_in_each_language_and_only_in_its_domain(language, domain, intents):
    found = Counter(turn["intent"] for row in of(language) if row["domain"] == domain for turn in turns(row, "user"))
    assert intents <= found.keys() <= intents | COMMON_INTENTS
    assert min(found[intent] for intent in ("complaint", "request_human", "out_of_scope")) >= 3


def test_what_an_agent_asks_for_fits_the_domain():
    actions = {domain: {turn["action"] for row in ROWS if row["domain"] == domain for turn in turns(row, "assistant")}
               for domain in ("shop", "bank")}
    assert "ask_identity" not in actions["shop"] and "ask_order_number" not in actions["bank"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_customers_have_moods(language):
    moods = Counter(turn["sentiment"] for row in of(language) for turn in turns(row, "user"))
    assert all(moods[sentiment] >= 0.08 * moods.total() for sentiment in SENTIMENTS)


# ------------------------------------------------------------------------------------------------------ near-duplicates

GRAM = {"en": 5, "zh": 3}  # characters; three Chinese characters say as much as five Latin letters and more
# Jaccard similarity from which two texts count as near-duplicates, and the highest one among the dialogues as they were written:
DIALOGUE_LIMIT = 0.25  # 0.14
OPENING_LIMIT = 0.40  # 0.33, two greetings of three and five characters; the others 0.14
TURN_LIMIT = 0.60  # 0.51, an agent who gives the opening hours; turns of fewer than 12 grams ("Thank you!") are not compared


def grams(text, language):
    """The text's character n-grams, without case and punctuation."""
    text = re.sub(r"[\W_]+", " ", text.lower()).strip()
    n = GRAM[language]
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def near_duplicates(texts, language, limit, shortest=1):
    """Pairs (similarity, text, earlier text) whose n-grams overlap by `limit` or more (intersection over union)."""
    found, kept, holders = [], [], defaultdict(list)
    for text in texts:
        own = grams(text, language)
        if len(own) < shortest:
            continue
        for i, shared in Counter(i for gram in own for i in holders[gram]).items():
            similarity = shared / (len(own) + len(kept[i][1]) - shared)
            if similarity >= limit:
                found.append((round(similarity, 2), text, kept[i][0]))
        for gram in own:
            holders[gram].append(len(kept))
        kept.append((text, own))
    return found


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_two_dialogues_openings_or_turns_are_near_duplicates(language):
    rows = of(language)
    assert near_duplicates(map(text, rows), language, DIALOGUE_LIMIT) == []
    assert near_duplicates([turns(row)[0]["content"] for row in rows], language, OPENING_LIMIT) == []
    for role in ("user", "assistant"):
        said = [turn["content"] for row in rows for turn in turns(row, role)]
        assert near_duplicates(said, language, TURN_LIMIT, shortest=12) == []
        assert max(Counter(said).values()) == 1, "not even a short turn is repeated word for word"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_slot_filled_copy_is_rejected(language):
    """Other numbers, another product, another closing line: still a copy, whichever dialogue it is made of."""
    slots = {
        "en": [(r"\b(order|card|account|parcel|delivery|transfer)\b", "umbrella"), (r"\b(today|tomorrow|morning)\b", "last Sunday")],
        "zh": [("订单|卡|账户|快递|转账", "雨伞"), ("今天|明天|昨天|早上", "上周日")],
    }[language]
    rng = random.Random(0)
    for row in of(language):
        said = [turn["content"] for turn in turns(row)]
        copy = [re.sub(r"\d", lambda _: str(rng.randint(0, 9)), content) for content in said]
        for pattern, filling in slots:
            copy = [re.sub(pattern, filling, content) for content in copy]
        copy[-1] = {"en": "Is there anything else?", "zh": "还有什么可以帮您？"}[language]
        assert near_duplicates([" ".join(said), " ".join(copy)], language, DIALOGUE_LIMIT), row["id"]


@pytest.mark.parametrize("language, opening, copy", [
    ("en", "Hi, my blue kettle arrived with a broken lid yesterday, what now?",
     "Hi, my red toaster arrived with a broken lid yesterday, what now?"),
    ("zh", "你好，我昨天收到的蓝色水壶盖子是坏的，怎么办？", "你好，我昨天收到的红色水壶盖子是坏的，怎么处理？"),
])
def test_a_slot_filled_opening_is_rejected(language, opening, copy):
    others = [turns(row)[0]["content"] for row in of(language)]
    assert len(near_duplicates([*others, opening], language, OPENING_LIMIT)) == 0
    assert len(near_duplicates([*others, opening, copy], language, OPENING_LIMIT)) == 1


# ------------------------------------------------------------------------------------------------- privacy and security

EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*)")
EXAMPLE_DOMAIN = re.compile(r"(.+\.)?(example|example\.(com|net|org))", re.IGNORECASE)  # reserved by RFC 2606

SENTENCE = re.compile(r"[^.!?;。！？；]+")
# What an agent may never ask for: the whole card number (its last digits are fine), a PIN, a password, a code that was sent.
SECRET = re.compile(
    r"\bPINs?\b(?! letter)|\bpass(word|code)s?\b|\bCVV2?\b|\b(security|sms|one-time|verification) codes?\b|\bcard numbers?\b|\b16 digits\b"
    r"|密码(?!函)|验证码|安全码|卡号", re.IGNORECASE)
LAST_DIGITS = re.compile(r"\blast\b|\bfinal\b|\bend(s|ing)?\b|后四|后4|最后|末四|尾号", re.IGNORECASE)
ASKS = re.compile(
    r"\b(send|give|tell|share|provide|confirm|message|text|post|read|need|require)\b|\blet me have\b|\b(may|can|could) I (have|get|see)\b"
    r"|\bwhat( is|'s|’s| are)\b|发(给|我|一下|过来)|给我|告诉|告知|提供|报一?下|报给|说一?下|念|需要您|是多少", re.IGNORECASE)
DENIES = re.compile(r"\b(not|no|never|nobody|without|unable|cannot|please stop)\b|n['’]t\b|不|别|勿|没|无需|谁", re.IGNORECASE)


def asks_for_a_secret(said):
    """The sentence in which somebody asks for what only the customer may know; None if there is none."""
    for sentence in SENTENCE.findall(said):
        for secret in SECRET.finditer(sentence):
            last_digits = secret.group().lower().startswith(("card number", "卡号")) and LAST_DIGITS.search(sentence)
            if ASKS.search(sentence) and not DENIES.search(sentence) and not last_digits:
                return sentence.strip()
    return None


def real_addresses(said):
    return [match.group() for match in EMAIL.finditer(said) if not EXAMPLE_DOMAIN.fullmatch(match.group(1))]


def test_email_addresses_are_in_reserved_domains():
    for row in ROWS:
        assert real_addresses(text(row)) == [], row["id"]


@pytest.mark.parametrize("said, found", [
    ("Write to ann@example.com, or bob@post.example.", []),
    ("邮箱zhouxiao@example.com抬头写周晓", []),
    ("Mine is ann.lee@gmail.com, thanks", ["ann.lee@gmail.com"]),
    ("邮箱是wang88@qq.com。", ["wang88@qq.com"]),
    ("ann@notexample.com or ann@example.com.cn", ["ann@notexample.com", "ann@example.com.cn"]),
])
def test_the_search_for_real_addresses_finds_them(said, found):
    assert real_addresses(said) == found


def test_agents_never_ask_for_secrets():
    for row in ROWS:
        for turn in turns(row, "assistant"):
            assert asks_for_a_secret(turn["content"]) is None, row["id"]


@pytest.mark.parametrize("said", [
    "Happy to help. Could you send me your full card number?", "Please confirm your PIN and date of birth.", "What's your password?",
    "I'll need the 16 digits on the front.", "Can I have the SMS code that you just got?", "Sure! Tell me the card number, please.",
    "请提供您的完整卡号。", "麻烦把验证码发我一下。", "好的，您的密码是多少？", "请告诉我卡号和生日。",
])
def test_the_search_for_secrets_finds_them(said):
    assert asks_for_a_secret(said)


@pytest.mark.parametrize("said", [
    "Please send the last four digits of your card number.", "Never share your PIN with anyone.", "Please don't send me the card number.",
    "Tap \"Forgot password\" on the login page.", "You can activate it with the PIN from the letter.", "Shall I send a new PIN letter?",
    "请给我卡号后四位和出生日期。", "验证码谁要都不能给。", "别把密码发在聊天里。", "点“忘记密码”就能重设。",
])
def test_the_search_for_secrets_lets_good_advice_pass(said):
    assert asks_for_a_secret(said) is None
