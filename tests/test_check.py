"""Golden dialogues: what a file may hold, what an answer must hold, and scripts/check.py from the file to the exit status."""

import json
from pathlib import Path

import pytest
from conftest import DIALOGUES, ROOT
from test_cli import call, refused
from test_methods import run_recipe

from recipes.common import cases, data
from recipes.common.errors import UserError

HAND_OVER = list(cases.HAND_OVER)
GOOD = """
- name: one
  system: You answer for a shop.
  turns:
    - user: Where is my order?
      must_ask_for: [number]
"""


@pytest.mark.parametrize(("rules", "answer", "broken"), [
    ({"must_say": [["parcel", "package"], ["/\\d+ days/"]]}, "Your Package takes 3 days.", []),
    ({"must_say": [["parcel"], ["/\\d+ days/"]]}, "Your parcels take three days.", ["must_say: parcel", "must_say: /\\d+ days/"]),
    ({"must_say": [["can't"]]}, "I can’t do that.", []),
    ({"must_say": [["不能，抱歉"]]}, "不能,抱歉。", []),
    ({"must_say": [["/您好，.*订单/"]]}, "您好，您的订单已发货。", []),
    ({"must_not_say": ["/密码？/", "/don’t know/"]}, "您的密码？", ["must_not_say: /密码？/ (said: 密码?)"]),
    ({"must_not_say": ["/密码？/", "/don’t know/"]}, "I don’t know the 密码", ["must_not_say: /don’t know/ (said: don't know)"]),
    ({"must_not_say": ["PIN"]}, "Shipping is free.", []),
    ({"must_not_say": ["PIN"]}, "Tell me the pin.", ["must_not_say: PIN (said: pin)"]),
    ({"must_not_say": ["密码"]}, "请告诉我您的密码。", ["must_not_say: 密码 (said: 密码)"]),
    ({"must_ask_for": ["order number"]}, "Happy to help. What is the order number?", []),
    ({"must_ask_for": ["order number"]}, "Please send me the order number.", []),
    ({"must_ask_for": ["order number"]}, "Your order number is MW204518. Anything else?", ["must_ask_for: order number"]),
    ({"must_ask_for": ["单号", "MW"]}, "好的。请给我订单号，我查一下。", []),
    ({"must_ask_for": ["单号"]}, "您的单号是MW1。还有别的问题吗？", ["must_ask_for: 单号"]),
    ({"must_hand_over": HAND_OVER}, "I'm connecting you with a colleague now.", []),
    ({"must_hand_over": HAND_OVER}, "正在为您转接人工，约5分钟。", []),
    ({"must_hand_over": HAND_OVER}, "We are open until nine.", ["must_hand_over: to a person"]),
    ({"must_hand_over": ["supervisor"]}, "My colleague will call you.", ["must_hand_over: supervisor"]),
    ({"must_not_say": ["PIN"]}, "  ", ["the model said nothing"]),
])
def test_an_answer_is_judged(rules, answer, broken):
    assert cases.judge(rules, answer) == broken


def test_handing_over_is_told_from_other_answers():
    """All of the bundled agents' turns that hand over are found, and few others."""
    turns = [m for split in ("train", "dev", "test")
             for row in data.read(ROOT / f"data/customer_service/{split}.jsonl", data.check_dialogue).rows
             for m in row["messages"] if m["role"] == "assistant"]
    found = [not cases.judge({"must_hand_over": HAND_OVER}, m["content"]) for m in turns]
    right = [m["action"] == "hand_over" for m in turns]
    assert sum(right) == 27 and all(f for f, r in zip(found, right, strict=True) if r)
    assert sum(f and not r for f, r in zip(found, right, strict=True)) < 0.03 * len(turns)


def test_the_bundled_cases_are_good_and_both_languages_are_there():
    golden = cases.load(ROOT / "data/customer_service/cases.yaml")
    assert len(golden) == 12 and sum(not case.name.isascii() for case in golden) == 5
    assert {rule for case in golden for turn in case.turns for rule in turn.rules} == set(cases.RULES)
    systems = {m["content"] for row in data.read(ROOT / "data/customer_service/train.jsonl", data.check_dialogue).rows
               for m in row["messages"][:1]}
    assert {case.system for case in golden} <= systems


@pytest.mark.parametrize(("text", "parts"), [
    ("", ["a file is a list of cases"]),
    ("name: x", ["a file is a list of cases"]),
    ("- name: [", ["is no YAML", "line 1"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_say: [a]\n      must_say: [b]\n", ["'must_say' is there twice", "line 5"]),
    ("- ? [a]\n  : b", ["is no YAML", "unhashable key"]),
    ("- turns: []", ["case 1", "'name' is missing"]),
    ("- name: 5\n  turns: []", ["case 1, name", "quote numbers"]),
    ("- name: x\n  turns: []", ["case 1 (x), turns"]),
    ("- just a text", ["case 1", "not str"]),
    ("- name: x\n  turns:\n    - user: hi\n", ["case 1 (x)", "no turn has a rule"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_sya: [a]\n", ["case 1 (x), turn 1", "'must_sya'", "must_say"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_say: []\n", ["turn 1, must_say"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_say: [no]\n", ["turn 1, must_say", "False"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_not_say: [[a]]\n", ["turn 1, must_not_say"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_say: [/(/]\n", ["turn 1, must_say", "no regular expression"]),
    ("- name: x\n  turns:\n    - user: hi\n      must_hand_over: false\n", ["turn 1, must_hand_over", "or true"]),
    (GOOD + GOOD, ["case 2", "'one' is taken"]),
])
def test_a_bad_file_is_told_in_one_sentence(text, parts, tmp_path):
    path = tmp_path / "cases.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        cases.load(path)
    assert all(part in str(caught.value) for part in (str(path), *parts)), caught.value


# scripts/check.py


@pytest.fixture(scope="module")
def taught(tiny, tmp_path_factory):
    """A run that knows the dialogues of conftest by heart, and another that was hardly trained."""
    folder = tmp_path_factory.mktemp("golden")
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    for name, steps in (("knows", "80"), ("new", "1")):
        run_recipe("full", tiny("llama"), folder, folder / name, "--max_steps", steps, "--learning_rate", "1e-2",
                   "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no",
                   "--load_best_model_at_end", "False")
    return folder / "knows", folder / "new"


def write(path: Path, rule: str) -> Path:
    system = DIALOGUES[0]["messages"][0]["content"]
    path.write_text(f"- name: parcel\n  system: {system}\n  turns:\n    - user: Where is my order?\n      must_ask_for: [number]\n"
                    f"    - user: MW204518\n      {rule}\n- name: 挂失\n  turns:\n    - user: 我的卡丢了\n      must_say: [冻结]\n",
                    encoding="utf-8")
    return path


def test_a_run_that_knows_the_answers_passes(taught, tmp_path):
    """The second answer is right only after the model's own first one."""
    file = write(tmp_path / "cases.yaml", "must_say: [Friday]")
    result = call("scripts/check.py", "--run", taught[0], "--cases", file, "--json", tmp_path / "out.json")
    assert result.code == 0 and "2 of 2 cases pass" in result.out and "pass  挂失" in result.out, result.out + result.err
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [turn["answer"] for case in record["cases"] for turn in case["turns"]] == [
        "What is its number, please?", "It arrives on Friday.", "我马上为您冻结这张卡。"]


def test_a_broken_rule_fails_with_the_answer(taught, tmp_path):
    file = write(tmp_path / "cases.yaml", "must_not_say: [Friday]")
    result = call("scripts/check.py", "--run", taught[0], "--cases", file)
    assert result.code == 1 and "1 of 2 cases pass" in result.out
    for part in ("FAIL  parcel", "turn 2: MW204518", "answer: It arrives on Friday.", "must_not_say: Friday (said: friday)"):
        assert part in result.out


def test_two_runs_are_compared(taught, tmp_path):
    file = write(tmp_path / "cases.yaml", "must_say: [Friday]")
    result = call("scripts/check.py", "--run", taught[0], "--against", taught[1], "--cases", file, "--max_new_tokens", "12",
                  "--json", tmp_path / "out.json")
    assert result.code == 0, result.err
    assert f"0 of 2 cases pass in {taught[1]}" in result.out and "3 of 3 answers differ" in result.out
    assert "+ It arrives on Friday." in result.out and "(fails there, passes here)" in result.out
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["against"]["run"] == str(taught[1])
    same = call("scripts/check.py", "--run", taught[0], "--against", taught[0], "--cases", file)
    assert "0 of 3 answers differ" in same.out and "+ " not in same.out


def test_what_can_t_be_checked_ends_with_2(taught, tmp_path):
    good, bad = write(tmp_path / "cases.yaml", "must_say: [Friday]"), tmp_path / "bad.yaml"
    bad.write_text("- name: x\n", encoding="utf-8")
    for words, part in ((["--run", taught[0], "--cases", bad], "case 1: the key 'turns' is missing"),
                        (["--run", taught[0], "--cases", tmp_path / "absent.yaml"], "absent.yaml can't be read"),
                        (["--run", tmp_path, "--cases", good], f"--run {tmp_path}"),
                        (["--run", "x" * 300, "--cases", good], "is too long for the name of a file"),
                        (["--run", taught[0], "--cases", good, "--json", tmp_path], "--json"),
                        (["--run", taught[0]], "--cases")):
        result = call("scripts/check.py", *words)
        assert result.code == 2
        refused(result, part)
