"""Personal data: what must be found and what must not, in both languages; placeholders that keep a dialogue coherent.

The numbers are samples of standards and payment providers, numbers reserved for fiction, or made up; none belongs to a person.
"""

import json
import random
import re
import time

import pytest

from recipes.common.pii import KINDS, find, id_card, left_as_they_are, luhn, mask_row, mask_texts

# Numbers that payment providers publish for testing, which makes them an oracle for the check digit that is not ours.
CARDS = ["4111111111111111", "4012888888881881", "4222222222222", "5555555555554444", "2223003122003222", "378282246310005",
         "371449635398431", "3530111333300000", "3566002020360505", "36227206271667", "30569309025904", "6011111111111117",
         "6200000000000005", "6205500000000000004", "6759649826438453"]


def kinds(text: str) -> list[tuple[str, str]]:
    """(kind, text as it stands) of all that is found."""
    return [(found.kind, text[found.start:found.end]) for found in find(text)]


# What must be found


@pytest.mark.parametrize("text, kind, expected", [
    # e-mail
    ("Write to jo.smith+shop@mail.example.co.uk.", "EMAIL", "jo.smith+shop@mail.example.co.uk"),
    ("请发到zhouxiao@example.com谢谢", "EMAIL", "zhouxiao@example.com"),
    ("邮箱：13812345678@163.com，抬头写周晓", "EMAIL", "13812345678@163.com"),
    ("<A_B@EXAMPLE.ORG>", "EMAIL", "A_B@EXAMPLE.ORG"),
    ("邮箱ａ＠ｂ．ｃｏｍ", "EMAIL", "ａ＠ｂ．ｃｏｍ"),
    ("联系zhang+shop@qq.com谢谢", "EMAIL", "zhang+shop@qq.com"),
    ("Mail josé@example.com", "EMAIL", "josé@example.com"),
    ("müller@bücher.de is mine", "EMAIL", "müller@bücher.de"),
    ("иван.петров@пример.рф", "EMAIL", "иван.петров@пример.рф"),
    ("jo@xn--fsqu00a.xn--0zwm56d", "EMAIL", "jo@xn--fsqu00a.xn--0zwm56d"),
    ("请发到jo.smith@例子.中国谢谢", "EMAIL", "jo.smith@例子.中国"),
    ("邮箱：用户@例子.公司。", "EMAIL", "用户@例子.公司"),
    # 手机号 and landlines of the mainland
    ("我的手机是13812345678请联系", "PHONE", "13812345678"),
    ("手机号138-1234-5678。", "PHONE", "138-1234-5678"),
    ("打138 1234 5678吧", "PHONE", "138 1234 5678"),
    ("+86 138 1234 5678", "PHONE", "+86 138 1234 5678"),
    ("电话+8613812345678在吗", "PHONE", "+8613812345678"),
    ("0086 13812345678", "PHONE", "0086 13812345678"),
    ("8613812345678", "PHONE", "8613812345678"),
    ("电话１３８１２３４５６７８。", "PHONE", "１３８１２３４５６７８"),
    ("家里座机010-62345678没人接", "PHONE", "010-62345678"),
    ("请拨0755-86013388", "PHONE", "0755-86013388"),
    ("客服400-820-8820", "PHONE", "400-820-8820"),
    ("打+86 138-0013-8000吧", "PHONE", "+86 138-0013-8000"),
    ("(+86)13800138000", "PHONE", "(+86)13800138000"),
    ("138—0013—8000", "PHONE", "138—0013—8000"),
    ("138.0013.8000", "PHONE", "138.0013.8000"),
    ("座机(020) 1234-5678", "PHONE", "(020) 1234-5678"),
    ("（020）12345678", "PHONE", "（020）12345678"),
    ("４００－８２０－８８２０", "PHONE", "４００－８２０－８８２０"),
    ("+852 2345 6789", "PHONE", "+852 2345 6789"),
    # the United States, the United Kingdom, the world
    ("Call me at (650) 253-0000, please", "PHONE", "(650) 253-0000"),
    ("650-253-0000", "PHONE", "650-253-0000"),
    ("415.555.2671 after six", "PHONE", "415.555.2671"),
    ("My number is 6502530000.", "PHONE", "6502530000"),
    ("1-800-555-0199", "PHONE", "1-800-555-0199"),
    ("It's 020 7946 0958", "PHONE", "020 7946 0958"),
    ("07911 123456 is my mobile", "PHONE", "07911 123456"),
    ("+44 20 7946 0958", "PHONE", "+44 20 7946 0958"),
    ("+44 (0)20 7946 0958", "PHONE", "+44 (0)20 7946 0958"),
    ("+49 30 123456", "PHONE", "+49 30 123456"),
    ("我在巴黎，电话+33 1 42 68 53 00", "PHONE", "+33 1 42 68 53 00"),
    # 身份证: the samples of GB 11643 and others that circulate
    ("身份证11010519491231002X尾号", "ID_CARD", "11010519491231002X"),
    ("身份证号：11010519491231002x", "ID_CARD", "11010519491231002x"),
    ("110105 19491231 002X", "ID_CARD", "110105 19491231 002X"),
    ("１１０１０５１９４９１２３１００２ｘ", "ID_CARD", "１１０１０５１９４９１２３１００２ｘ"),
    ("53010219200508011X", "ID_CARD", "53010219200508011X"),
    # bank cards
    ("卡号6205500000000000004，户名王", "BANK_CARD", "6205500000000000004"),
    ("卡号是6205 5000 0000 0000 004", "BANK_CARD", "6205 5000 0000 0000 004"),
    ("620550 0000000000004", "BANK_CARD", "620550 0000000000004"),
    ("Card 4111 1111 1111 1111.", "BANK_CARD", "4111 1111 1111 1111"),
    ("4111-1111-1111-1111", "BANK_CARD", "4111-1111-1111-1111"),
    ("Amex 3782 822463 10005", "BANK_CARD", "3782 822463 10005"),
    ("4111 1111 1111 1111 123 with the security code", "BANK_CARD", "4111 1111 1111 1111"),
    ("since 2024 4111 1111 1111 1111", "BANK_CARD", "4111 1111 1111 1111"),
    ("4111–1111–1111–1111", "BANK_CARD", "4111–1111–1111–1111"),
    ("卡号６２０５５０００００００００００００４。", "BANK_CARD", "６２０５５０００００００００００００４"),
    # accounts: the samples of the registry
    ("我的IBAN是GB29 NWBK 6016 1331 9268 19", "IBAN", "GB29 NWBK 6016 1331 9268 19"),
    ("GB29NWBK60161331926819", "IBAN", "GB29NWBK60161331926819"),
    ("DE89370400440532013000 THANKS", "IBAN", "DE89370400440532013000"),
    ("NO93 8601 1117 947 AND MORE", "IBAN", "NO93 8601 1117 947"),
    # order numbers
    ("订单号:204518", "ORDER", "204518"),
    ("订单号　２０４５１８", "ORDER", "２０４５１８"),
    ("订单号4111111111111111", "ORDER", "4111111111111111"),  # the word decides against a card
    ("快递单号：SF1234567890123", "ORDER", "SF1234567890123"),
    ("order 112-3456789-1234567", "ORDER", "112-3456789-1234567"),
    ("cancel purchase 113542617735902", "ORDER", "113542617735902"),
    ("MW204518", "ORDER", "MW204518"),
    ("我的订单MW204518到哪了", "ORDER", "MW204518"),
    ("it's mw-204518, thanks", "ORDER", "mw-204518"),
    ("订单号20240115123456，麻烦查下", "ORDER", "20240115123456"),
    ("订单编号：20450", "ORDER", "20450"),
    ("订单号是20450", "ORDER", "20450"),
    ("订单204518", "ORDER", "204518"),
    ("My order number is 12-3456", "ORDER", "12-3456"),
    ("order no. 98765", "ORDER", "98765"),
    ("Order #98765", "ORDER", "98765"),
    ("my order 204518 is late", "ORDER", "204518"),
    ("订单号13812345678", "ORDER", "13812345678"),  # the word decides against a mobile number
])
def test_personal_data_is_found(text, kind, expected):
    assert kinds(text) == [(kind, expected)]


@pytest.mark.parametrize("card", CARDS)
def test_test_cards_of_payment_providers(card):
    assert luhn(card)
    assert kinds(f"我的卡{card}被吞了") == [("BANK_CARD", card)]
    for digit in set("0123456789") - {card[-1]}:
        assert not luhn(card[:-1] + digit)
        assert ("BANK_CARD", card[:-1] + digit) not in kinds(card[:-1] + digit)


def test_luhn_notices_every_changed_digit():
    for position in range(16):
        for shift in range(1, 10):
            digits = list("4012888888881881")
            digits[position] = str((int(digits[position]) + shift) % 10)
            assert not luhn("".join(digits))


# What must not be found


@pytest.mark.parametrize("text", [
    # dates and times
    "2024-01-15 12:30:00", "15/01/2024 - 20/01/2024", "2024年10月12日13点30分", "20240115", "202401151234", "10.15.2023", "06:30-22:30",
    "the years 2021 2022 2023 2024", "2023-2024学年", "周一到周五9:00-17:00", "1700000000", "1700000000000", "1700000000123",
    # prices and quantities
    "$1,234.50", "$2125551234", "$ 2125551234", "￥13812345678", "￥ 13812345678", "总价12345678元", "13812345678元",
    "约13812345678块", "2,125,551,234", "3 to 5 working days", "boxes of 200 450 7000", "1 2 3 4 5 6 7 8 9 10", "3.14159265358979",
    "¥4111111111111111", "4111111111111111元", "order 20240115", "订单20240115", "订单1234567元", "订单金额：123456元", "价格：12800元",
    "订单共3件", "order total 123456", "订单时间2024-01-15 12:30", "2024-01-15T12:30:45Z", "20240115123456789", "1700000000123456",
    "v10.0.19045.3803", "1920x1080", "8848米", "100000000", "２０２４年１月１５日", "１２：３０：４５", "１９９．００元",
    "0.13812345678", "0.4111111111111111", "12.5%", "USD250000", "rmb100000", "第123456789名", "价格 2999 5999 8999",
    "I would like to order 2 of 350 ml", "订单有3件", "in order 12 of them", "满199减20",
    # rooms and Windows' patches, seen in hotel and computer reviews
    "07系列房间（如1607 1107）有很大改观", "声卡驱动安装需先安装KB888111补丁",
    # tracking and other numbers
    "9400111899223197428490", "1Z999AA10123456784", "税号91510104MA6CX2K81P", "GB29NWBK60161331926818", "XX29NWBK60161331926819",
    "ISBN 9781861972712",
    "192.168.100.200", "10.0.0.254:8080", "version 10.12.4567", "v2.0.1", "Python 3.11.9", "GB18030", "ISO9001", "iPhone15",
    "RTX4090", "3x1080p", "卡尾号4518", "the last four digits, 1111", "验证码204518", "PIN 1234", "95588", "12306", "邮编100080",
    "90210-1234", "a3f813812345678bc", "wx13812345678x", "1234567890", "87654321",
    # e-mail addresses that are none
    "用户@例子", "我@你.好", "@例子.中国",
    "@jo_smith", "root@localhost", "2 @ 3.50", "5kg@1.5元", "a@b", "me at example dot com",
    # broken check digits, dates, provinces, prefixes and lengths
    "110105194912310021", "11010519490231002X", "99010519491231002X", "440524188001010014", "11010519491231002", "110105194912310021X",
    "4111111111111112", "4111 1111 1111 1112", "9111111111111116", "41111111111111111", "411111111111", "4111 11111111 1111",
    "11012345678", "+8612812345678", "1381234567", "138123456789", "(150) 253-0000", "+99 123456789", "555-0123",
    "MW20451", "ABCDE204518", "M204518", "订单号12", "order #12",
])
def test_other_numbers_are_left_alone(text):
    assert kinds(text) == []


def test_identity_numbers_of_the_future_are_none():
    assert id_card("11010519491231002X") and id_card("11010519491231002x")
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # as GB 11643 prints them
    unborn = "11010529991231002"
    unborn += "10X98765432"[sum(int(d) * w for d, w in zip(unborn, weights, strict=True)) % 11]
    assert not id_card(unborn)


def test_the_check_character_is_that_of_the_standards_table():
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    rng = random.Random(0)
    for _ in range(200):
        born = f"{rng.randint(1900, 2019)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
        number = f"{rng.choice([11, 31, 44, 65])}0101{born}{rng.randint(0, 999):03}"
        right = "10X98765432"[sum(int(d) * w for d, w in zip(number, weights, strict=True)) % 11]
        assert [c for c in "0123456789X" if id_card(number + c)] == [right]


# Several at once


def test_all_kinds_in_one_text_stand_in_order_without_overlap():
    text = "订单MW204518，手机13812345678，邮箱jo@example.com，身份证11010519491231002X，卡号6200000000000005，GB29NWBK60161331926819。"
    assert [kind for kind, _ in kinds(text)] == ["ORDER", "PHONE", "EMAIL", "ID_CARD", "BANK_CARD", "IBAN"]
    found = find(text)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False)) and {f.kind for f in found} == set(KINDS)


@pytest.mark.parametrize("separator", ["，", "、", "/", ",", "; ", "\n", "或"])
def test_neighbours_are_told_apart(separator):
    text = separator.join(["13812345678", "13912345678", "6200000000000005"])
    assert kinds(text) == [("PHONE", "13812345678"), ("PHONE", "13912345678"), ("BANK_CARD", "6200000000000005")]


def test_the_patterns_of_order_numbers_can_be_chosen():
    assert [f.value for f in find("Bestellung B-77 und MW204518", [r"\bB-[0-9]{2}\b"])] == ["B77"]
    assert [f.value for f in find("case=77x", [r"case=([0-9]+)"])] == ["77"]
    assert find("MW204518", []) == [] and find("MW204518", [r"(?:)"]) == []
    with pytest.raises(re.error):
        find("MW204518", ["("])


def test_random_text_gives_findings_within_bounds_that_never_overlap():
    rng = random.Random(1)
    pieces = ["13812345678", "4111 1111 1111 1111", "a@b.com", "MW204518", "11010519491231002X", "订单号", "1", " ", "-", "。", "x", "+86",
              "２", "\n"]
    seen = 0
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        end = 0
        for found in find(text):
            assert end <= found.start < found.end <= len(text) and found.kind in KINDS
            end, seen = found.end, seen + 1
    assert seen > 150


@pytest.mark.parametrize("text", [
    "1" * 50_000, "a." * 25_000, "a@" + "b." * 25_000, "订单号" + "#: " * 15_000, "order" + " " * 50_000 + "x", "4111 " * 5_000,
    "-" * 50_000 + "1234567",
    "好" * 50_000 + "@", "好@" + "好." * 25_000, "é" * 50_000 + "@1", "GB29 " * 10_000, "9" * 50_000 + "@",
], ids=lambda text: text[:8])
def test_no_text_is_slow_to_search(text):
    started = time.process_time()
    assert find(text) == []
    assert time.process_time() - started < 5  # quadratic patterns took minutes


# Masking


def test_the_same_value_has_the_same_placeholder_throughout_a_dialogue():
    messages = [
        {"role": "user", "content": "我是13812345678，订单mw-204518。另一个号码是139 1234 5678", "intent": "inform"},
        {"role": "assistant", "content": "+86 139-1234-5678对吗？MW204518已发货，通知已发到138 1234 5678和Jo@Example.com", "train": False},
        {"role": "user", "content": "对，jo@example.com"},
    ]
    before = [dict(message) for message in messages]
    row, counts = mask_row({"messages": messages})
    masked = row["messages"]
    assert [m["content"] for m in masked] == [
        "我是[PHONE_1]，订单[ORDER_1]。另一个号码是[PHONE_2]",
        "[PHONE_2]对吗？[ORDER_1]已发货，通知已发到[PHONE_1]和[EMAIL_1]",
        "对，[EMAIL_1]",
    ]
    assert counts == {"PHONE": 4, "ORDER": 2, "EMAIL": 2}
    assert messages == before, "the input is left as it was"
    assert masked[0]["intent"] == "inform" and masked[1]["train"] is False and list(masked[2]) == ["role", "content"]


@pytest.mark.parametrize("spellings", [
    ["020 7946 0958", "+44 20 7946 0958", "(020) 7946 0958", "+44 (0)20 7946 0958", "02079460958"],
    ["(650) 253-0000", "+1 650 253 0000", "6502530000", "1-650-253-0000"],
    ["13812345678", "+86 138 1234 5678", "0086-138-1234-5678", "１３８１２３４５６７８"],
    ["4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111"],
    ["11010519491231002X", "110105-19491231-002x"],
    ["MW204518", "mw-204518"],
])
def test_another_spelling_is_the_same_value(spellings):
    masked, counts = mask_texts(spellings)
    assert len(set(masked)) == 1 and re.fullmatch(r"\[[A-Z_]+_1\]", masked[0])
    assert list(counts.values()) == [len(spellings)]


def test_numbers_begin_anew_in_the_next_dialogue_and_depend_on_nothing_else():
    assert mask_texts(["a@b.com c@d.com"]) == mask_texts(["a@b.com c@d.com"]) == (["[EMAIL_1] [EMAIL_2]"], {"EMAIL": 2})
    assert mask_texts(["c@d.com"]) == (["[EMAIL_1]"], {"EMAIL": 1})


def test_placeholders_that_stand_there_already_are_not_given_to_others():
    assert mask_texts(["Is [EMAIL_2] yours?", "No, a@b.com"])[0] == ["Is [EMAIL_2] yours?", "No, [EMAIL_3]"]


def test_masked_text_is_masked_no_further():
    texts = ["MW204518, 13812345678, jo@example.com", "6200000000000005 11010519491231002X GB29 NWBK 6016 1331 9268 19"]
    masked, counts = mask_texts(texts)
    assert set(counts) == set(KINDS) and mask_texts(masked) == (masked, {})


def test_masking_again_changes_nothing_however_things_are_glued_together():
    rng = random.Random(3)
    pieces = ["13812345678", "4111 1111 1111 1111", "a@b.com", "MW204518", "11010519491231002X", "订单号", "order #", "1", " ", "-", "。",
              "x", "+86", "２", "\n", ".", "@", "GB29 NWBK 6016 1331 9268 19", "用户@例子.公司", "0", "号码是", "\\n"]
    for _ in range(200):
        masked, counts = mask_texts(["".join(rng.choices(pieces, k=rng.randint(1, 12)))])
        assert mask_texts(masked) == (masked, {}) and sum(counts.values()) == masked[0].count("[")
    assert mask_texts(["case 77, 13812345678"], [r"[0-9]+"])[0] == ["case [ORDER_1], [ORDER_2]"], "a placeholder holds a number too"


def test_escapes_of_json_are_no_letters():
    text = json.dumps({"note": "打\n13812345678", "to": "\tjo@example.com"})
    masked, counts = mask_texts([text, json.dumps({"a": "电话13912345678"})])
    assert counts == {"PHONE": 2, "EMAIL": 1} and json.loads(masked[0]) == {"note": "打\n[PHONE_1]", "to": "\t[EMAIL_1]"}


def test_every_string_of_a_row_is_masked_and_what_stays_is_known():
    row = {"id": "13812345678", "text": "Hi", "label": "jo@example.com", "meta": {"jo@example.com": ["13812345678", {"id": "a@b.com"}]},
           "phone": 13812345678, "none": None}
    masked, counts = mask_row(row)
    assert masked == row | {"meta": {"jo@example.com": ["[PHONE_1]", {"id": "a@b.com"}]}} and counts == {"PHONE": 1}
    assert {column for column, text in left_as_they_are(row) if find(text)} == {"id", "label", "meta", "phone"}
    assert not [text for _, text in left_as_they_are({"text": "jo@example.com", "meta": ["13812345678"]}) if find(text)]


def test_text_without_personal_data_is_unchanged():
    texts = ["Hello 世界", "", "共2件，199元"]
    assert mask_texts(iter(texts)) == (texts, {})


@pytest.mark.parametrize("row, expected", [
    ({"text": "jo@example.com", "text_pair": "Not al@example.com, jo@example.com", "label": "a@example.com", "id": "jo@example.com"},
     {"text": "[EMAIL_1]", "text_pair": "Not [EMAIL_2], [EMAIL_1]", "label": "a@example.com", "id": "jo@example.com"}),
    ({"text": "Hi jo@example.com", "text_pair": None}, {"text": "Hi [EMAIL_1]", "text_pair": None}),
    ({"source": "Mail jo@example.com", "refs": ["发给jo@example.com", "写信给 JO@example.com"]},
     {"source": "Mail [EMAIL_1]", "refs": ["发给[EMAIL_1]", "写信给 [EMAIL_1]"]}),
    ({"tokens": ["Mail", "jo@example.com"], "tags": ["O", "B-mail"]}, {"tokens": ["Mail", "[EMAIL_1]"], "tags": ["O", "B-mail"]}),
    ({"messages": [{"role": "user", "content": "jo@example.com", "intent": "inform"}], "id": 3},
     {"messages": [{"role": "user", "content": "[EMAIL_1]", "intent": "inform"}], "id": 3}),
])
def test_rows_of_every_task_are_masked(row, expected):
    before = repr(row)
    masked, counts = mask_row(row)
    assert masked == expected and list(masked) == list(row) and repr(row) == before
    assert counts["EMAIL"] == repr(expected).count("[EMAIL_")


def test_text_without_digits_is_searched_for_patterns_of_ones_own():
    assert find("ticket ABC") == [] and find("ticket ABC", orders=[r"ticket ([A-Z]+)"])[0].value == "ABC"
