"""The reports: every section, in both languages, nothing from the network, all text as text, nothing that overflows."""

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import DIALOGUES, ROOT, without_pictures
from test_cli import call, refused
from test_compare import of_means, recorded
from test_methods import run_recipe
from test_scripts import check_page

from recipes.common import comparison, doctor, models, plots, report, runs, statistics
from recipes.common.wording import LANGUAGES, SENTENCES, ZH, counted, name_in, sentence_in, wording

PICTURES = True
HOSTILE = '<script>alert("&amp;")</script>'
LONG = "W" * 300
FEW = "warning: 5 held-out dialogues are few: intervals of so few are too narrow, and small differences can't be seen"
TOO_FEW = "can't tell what more data would bring: 2 amounts of data are too few for a curve"
HAN = re.compile("[\u4e00-\u9fff]")
TEMPLATES = sorted((ROOT / "recipes/common").glob("*.html.jinja"))
RUN_SECTIONS = ("results", "training", "scores", "answers", "data", "configuration", "machine", "repeat")
COMPARISON_SECTIONS = ("advice", "scores", "costs", "training", "learning", "answers", "data", "configuration", "runs", "machine", "repeat")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished and scored run, with markup and a word without end in its data."""
    folder = tmp_path_factory.mktemp("reported")
    hostile = {"messages": [{"role": "user", "content": HOSTILE, "intent": HOSTILE},
                            {"role": "assistant", "content": f"No {LONG[:40]} {HOSTILE}"}]}
    for split, rows in (("train", [*DIALOGUES, hostile]), ("dev", DIALOGUES), ("test", [hostile, *DIALOGUES])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    run_recipe("lora", tiny("llama"), folder, folder / "run", "--max_steps", "4", "--logging_steps", "1", "--learning_rate", "0.05")
    assert call("scripts/evaluate.py", "--run", folder / "run", "--base", "--max_new_tokens", "8").code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def record(run):
    """run.json with what only some runs have: labels that are confused, findings on the data, old rows."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["evaluation"]["test"] |= {
        "confusion_matrix": {"labels": ["a", HOSTILE], "matrix": [[3, 1], [0, 2]]},
        "report": {HOSTILE: {"precision": 0.5, "recall": 1.0, "f1-score": 0.67, "support": 2}, "accuracy": 0.8}}
    record["data"]["doctor"] = {"sentences": [f"2 rows are copies {HOSTILE}"], "details": "python scripts/doctor.py"}
    record["forgetting"] = {"before": {"loss": 3.0}, "after": {"loss": "nan"}}
    record["lineage"] = [{"run": LONG, "recipe": "full", "steps": 7}]
    return record


def system(name: str, base: bool = False) -> dict:
    score = {"mean": 3.2, "low": 3.0, "high": 3.5, "deviation": None, "seeds": [3.2], "against_base": None,
             "against_best": None if name == "lora" else {"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.03, "p_holm": 0.06}}
    one = {"name": f"{name}-seed42", "status": "done", "error": None, "dev": {"dev_loss": 3.1}, "seconds": 12.5, "steps": 10,
           "history": [{"step": step, "loss": 4 - step / 10, "eval_loss": 3.9 - step / 10, "learning_rate": 1e-4, "grad_norm": 1.0,
                        "eval_bleu": step, "eval_runtime": 1.0} for step in (5, 10)]}
    costs = {"trainable_parameters": 1000, "total_parameters": 9000, "seconds": 12.5, "tokens_per_second": 800, "peak_memory_mb": 700,
             "disk_mb": 1.5, "latency": 0.2}
    return {"name": name, "recipe": name, "base": base, "settings": {"rank": 8},
            "configuration": {} if base else {"rank": 8, "weight_decay": 0.01}, "status": "done", "runs": [] if base else [one],
            "scores": {"loss": score} | ({} if base else {"bleu": {**score, "mean": "nan"}}), "costs": {"latency": 0.3} if base else costs}


@pytest.fixture(scope="module")
def compared(record):
    """compare.json as scripts/compare.py describes it: two recipes, the untuned model, and one that failed."""
    broken = {"name": "prefix-seed42", "status": "failed", "error": HOSTILE, "dev": None, "seconds": None, "steps": None}
    failed = system("prefix") | {"status": "failed", "scores": None, "costs": {}, "runs": [broken], "configuration": {}}
    points = [{"rows": n, "value": 4 - n / 100, "low": 3.8 - n / 100, "high": 4.2 - n / 100} for n in (25, 50, 100)]
    return {
        **{key: record[key] for key in ("finished", "model", "hardware", "versions", "command", "task")},
        "data": record["data"]["splits"], "doctor": record["data"]["doctor"], "configuration": record["shared_arguments"],
        "split": "test", "source": "test.jsonl", "items": 5, "unit": "dialogues", "seeds": [42],
        "budget": "steps:10", "flags": [], "main_metric": "loss", "best": {"loss": "lora", "bleu": None},
        "metrics": {"loss": {"title": "loss", "unit": "nats", "higher_is_better": False, "digits": 3},
                    "bleu": {"title": "BLEU", "unit": "0-100", "higher_is_better": True, "digits": 2}},
        "systems": [system("lora"), system("full"), system("tiny (untuned)", base=True), failed],
        "grid": [{"system": "lora", "by": "grid", "metric": "loss", "points": [{"settings": {"rank": 4}, "value": None, "chosen": True}]}],
        "learning_curves": [{"system": "lora", "metric": "loss", "points": points, "fit": None, "sentence": TOO_FEW,
                             "extrapolation": [{"factor": 2, "rows": 200, "value": 2.5, "low": 2.2, "high": "nan"}]}],
        "samples": [{"context": [["system", "an earlier turn"], ["user", HOSTILE]], "reference": ["好的", "行"],
                     "answers": {"lora": LONG, "full": ""}}],
        "advice": ["take lora", FEW, f"lora: {TOO_FEW}", f"warning: prefix-seed42 failed and is left out: {HOSTILE}"], "notes": []}


class Page(HTMLParser):
    """What a page holds: ids of its elements, tags, text."""

    def __init__(self, page: str):
        super().__init__()
        self.ids, self.tags, self.open, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def check(page: str, sections) -> list[str]:
    """What is wrong with the page of a report."""
    read = Page(page)
    wrong = [f"no section {section}" for section in sections if section not in read.ids]
    wrong += [f"no link to {section}" for section in sections if f'href="#{section}"' not in page]
    wrong += [f"a tag {tag}" for tag in ("script", "link", "img", "iframe") if tag in read.tags]
    wrong += [f"{tag} left open" for tag in read.open]
    wrong += check_page(page)
    return wrong + ([] if "<script>alert" in read.text else ["the hostile row is not shown as text"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_report_of_a_run_has_every_section(language, record):
    page = report.render(record, language)
    assert check(page, RUN_SECTIONS) == []
    assert page.count("<svg") >= 3 + 5 + 1  # curves, scores with intervals, the matrix
    text = Page(page).text
    for fact in (record["command"], record["data"]["splits"]["train"]["sha256"][:12], "peft", "ROUGE-L", "2 rows are copies"):
        assert fact in text
    chat, classify = (report.render(record | {"task": task}, language) for task in ("chat", "classify"))
    for flag, read_by in (("dev_fraction", (chat, classify)), ("eval_generate_rows", (chat,)), ("context_turns", (classify,))):
        assert [f">{flag}<" in page for page in (chat, classify)] == [page in read_by for page in (chat, classify)]
    headings = re.findall(r"<h[23][^>]*>(.*?)</h", page)
    assert all(bool(HAN.search(heading)) == (language == "zh") for heading in headings) and len(headings) > 12


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_report_of_a_comparison_has_every_section(language, compared):
    page = report.render_comparison(compared, language)
    assert check(page, COMPARISON_SECTIONS) == []
    # a score (the other is NaN), five costs, what was logged in training, a curve
    assert page.count("<svg") == 1 + 5 + 5 + 1
    names = {"lora", "full"}  # a recipe's configuration stands under its name
    headings = re.findall(r"<h[23][^>]*>(.*?)</h", page)
    assert all(bool(HAN.search(heading)) == (language == "zh") for heading in headings if heading not in names)
    assert names <= set(headings)
    text = html.unescape(page)
    assert (FEW in text, TOO_FEW in text) == ((True, True) if language == "en" else (False, False))
    for fact in ("take lora", "0.060", "prefix-seed42", "an earlier turn", "2 rows are copies", "weight_decay", "dev_fraction"):
        assert fact in page, fact


def test_a_text_to_translate_is_no_source_of_data(compared):
    sample = {"context": [["source", "Drive carefully."]], "reference": ["小心驾驶。", "开车小心。"], "answers": {"lora": "小心。"}}
    page = report.render_comparison(compared | {"samples": [sample]}, "zh")
    assert ">原文</span>Drive carefully." in page and "小心驾驶。 / 开车小心。" in page


def test_a_comparison_of_an_earlier_version_has_a_report(compared, monkeypatch):
    without_pictures(monkeypatch)  # they take the time, and are looked at elsewhere
    old = {key: value for key, value in compared.items() if key not in ("doctor", "configuration")}
    old["systems"] = [{key: value for key, value in one.items() if key != "configuration"} for one in compared["systems"]]
    assert [section for section in COMPARISON_SECTIONS if f'id="{section}"' not in report.render_comparison(old)] == []


def test_more_lines_than_colours_are_all_drawn():
    names = [f"system{i}" for i in range(len(plots.COLOURS) + 2)]
    picture = plots.lines({name: [(1, 2.0), (2, 1.0)] for name in names}, "loss", "step")
    assert [name for name in names if f">{name}<" not in picture] == []


def test_numbers_below_a_picture_are_few_enough_to_be_read():
    picture = plots.intervals([("a", 5.996, 5.991, 6.001), ("b", 6.004, 5.999, 6.009)], "loss")
    assert 2 <= len(re.findall(r">\d\.\d{3,4}<", picture)) <= 6
    for sizes, shown in (((2901, 31701), {"3k", "10k", "30k"}), ((8000, 134_515_008), {"10k", "100k", "1M", "10M", "100M"})):
        picture = plots.scatter([(str(x), x, 1.0, 0.9, 1.1) for x in sizes], "F1, size", "size", "F1")
        assert shown <= set(re.findall(r">([\dkM]+)<", picture)) and "mathdefault" not in picture and "^" not in picture


@pytest.mark.parametrize("label", ["$x^$", "<script>alert(1)</script>", "../../x", "x" * 300])
def test_a_label_is_text_whatever_it_says(label):
    svg = plots.matrix([[1, 2], [3, 4]], [label, "b"], label, "p", "r")
    assert svg.startswith("<svg") and "<script" not in svg


def test_a_comparison_in_which_all_failed_has_a_report(compared):
    nothing = {"metrics": {}, "best": {}, "systems": compared["systems"][-1:], "samples": [], "learning_curves": [], "grid": [],
               "model": {"requested": "gpt2", "used": None}, "hardware": None, "versions": None, "data": {}}
    page = report.render_comparison(compared | nothing)
    assert '<td>prefix</td><td colspan="1">failed</td>' in page and ">失败</td>" in report.render_comparison(compared, "zh")
    assert check(page, COMPARISON_SECTIONS) == [] and "<svg" not in page and "used in its place" not in page


def test_a_broken_page_is_found(record):
    page = report.render(record)
    assert check(page.replace('id="answers"', ""), RUN_SECTIONS) == ["no section answers"]
    assert check(page.replace("<nav", "<script>1</script><nav"), RUN_SECTIONS)
    assert check(page.replace("<nav", '<img src="https://example.org/x.png"><nav'), RUN_SECTIONS)
    assert check(page.replace("&lt;script&gt;alert", "gone"), RUN_SECTIONS) == ["the hostile row is not shown as text"]


def test_a_run_without_evaluation_and_one_that_diverged_have_reports(record):
    bare = copy.deepcopy(record)
    for key in ("evaluation", "forgetting", "lineage"):
        del bare[key]
    del bare["data"]["doctor"]
    bare["metrics"]["dev_loss"] = "nan"
    bare["history"] = [{"step": 1, "loss": "inf"}]
    page = report.render(bare)
    assert all(f'id="{section}"' in page for section in RUN_SECTIONS) and "scripts/evaluate.py --run DIR --base" in page
    assert "<svg" not in page


# Words


def said() -> set[str]:
    """Every sentence that the templates and report.py say."""
    texts = [path.read_text(encoding="utf-8") for path in (*TEMPLATES, ROOT / "recipes/common/report.py")]
    return {sentence for text in texts for sentence in re.findall(r'\bt\("([^"]+)"', text)}


def test_every_sentence_is_there_in_both_languages():
    assert said() - ZH.keys() == set()
    names = {"user", "assistant", "system", "tool", "text", "text pair", "reference", "right", "intent", "sentiment", "turn", "length",
             "reply length", "target length", "all", "en", "zh", "test", "done", "partly", "perplexity", "accuracy", "macro F1", "micro F1",
             "f1 macro", "kept", "OOS recall", "rows", "dialogues", "replies", "texts", "blocks", "pairs", "labels", "words",
             *doctor.PERSONAL.values()}  # of what records hold
    assert ZH.keys() - said() == names
    assert [english for english, chinese in ZH.items() if not HAN.search(chinese)] == []
    for english, chinese in ZH.items():
        assert sorted(re.findall(r"{\w*}", english)) == sorted(re.findall(r"{\w*}", chinese)), english
        assert not HAN.search(english)


def test_what_a_record_says_is_told_in_chinese():
    """Sentences as the code makes them, so that a change of one in English does not leave it English in a Chinese report."""
    told, zh = sentence_in("en"), sentence_in("zh")
    early = recorded({"full": 2.0, "lora": 2.1, "untuned": 3.0})
    failed = recorded({"full": 2.0, "untuned": 1.0}, items=30) | {"split": "dev", "seeds": [1]}
    early["systems"][1]["runs"][0]["still_improving"] = True
    failed["systems"][0]["runs"][0] |= {"status": "failed", "error": "no such thing"}
    unclear = [recorded({"full": 2.0, "lora": 2.0, "untuned": 3.5} | more, spread=1) for more in ({}, {"prefix": 2.6})]
    cases = [line for record in (early, failed, *unclear) for line in comparison.advice(record)]
    drawn, sizes = statistics.draws(400, 500, 0), [100, 200, 400, 800]
    for values in ([1 + 8 * n**-0.5 for n in sizes], [2.0] * 4, [2.0, 2.0]):
        for seeds in (1, comparison.SEEDS):
            points = {n: runs * seeds for n, runs in zip(sizes, of_means(values), strict=False)}
            cases.append("lora: " + comparison.learning_curve("loss", points, drawn)["sentence"])
    right = {n: [{"accuracy": np.ones((400, 2))}] for n in sizes}
    cases += [comparison.learning_curve("accuracy", points, drawn)["sentence"] for points in (right, {100: right[100]})]
    row = {"text": "write to ann@example.com", "label": "x"}
    cases += doctor.brief([row] * 3, [row], {"x": 9, "y": 1})[1]
    assert len(cases) > 12
    assert [sentence for sentence in cases if told(sentence) != sentence] == []
    assert [sentence for sentence in cases if not HAN.search(zh(sentence))] == []
    assert not re.search("[a-z]{3,}", re.sub("full|lora|prefix|untuned|seed42|no such thing|--seeds", "", "".join(map(zh, cases))))
    for three in ("3 questions exceed", "1 question exceeds"):
        assert HAN.search(zh(f"lora: {three} the 96 tokens that the run's --max_length and the model's window leave; the reply counts as "
                         "empty"))
    assert zh("lora: 2 of 9 replies did not end within 8 tokens and were cut") == "lora：9 条回复中有 2 条写满 8 个词元仍未结束，被截断"
    assert zh("nobody knows this: or that") == "nobody knows this: or that"
    still = "warning: a, b and c still improved at the last evaluation: with more training the order may change"
    assert zh(still).startswith("警告：a、b、c ")


def test_one_is_told_as_one():
    assert [counted(n, "rows") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [counted(n, "row exceeds|rows exceed") for n in (1, 3)] == ["1 row exceeds", "3 rows exceed"]
    zh = sentence_in("zh")
    one, many = "1 dialogue exceeds --max_length 96: 1 oldest turn dropped", "1 dialogues exceed --max_length 96: 1 oldest turns dropped"
    assert HAN.search(zh(one)) and zh(one) == zh(many)
    assert zh("1 time a in place of b") == zh("1 times a in place of b") == "1 次把 b 判成 a"


def test_every_part_of_a_sentence_is_in_its_chinese():
    for english, chinese in SENTENCES.items():
        assert sorted(re.findall(r"{\w*}", english)) == sorted(re.findall(r"{\w*}", chinese)), english
        assert HAN.search(chinese) and not HAN.search(english)


def test_no_words_stand_in_the_templates():
    """Text between tags comes from t(), or could not be told in Chinese."""
    for path in TEMPLATES:
        text = re.sub(r"<style>.*?</style>|{[{%].*?[%}]}|<[^>]*>", " ", path.read_text(encoding="utf-8"), flags=re.S)
        assert re.findall(r"[A-Za-z]{3,}", text.replace("SHA", "")) == [], path.name


def test_a_missing_sentence_is_found():
    with pytest.raises(KeyError):
        wording("zh")("Nobody translated this")
    assert wording("en")("Nobody translated this") == "Nobody translated this"
    assert [name_in("zh")(name) for name in ("reply_length", "BLEU")] == ["回复长度", "BLEU"]
    assert name_in("en")("reply_length") == "reply length"


# Differences


@pytest.mark.parametrize(("reference", "answer", "marked"), [
    ("It arrives on Friday.", "It arrives on Monday.", ["Monday"]),
    ("It arrives on Friday.", "It arrives on Friday.", []),
    ("好的，请告诉我订单号。", "好的，请说订单号。", ["说"]),
    ("好的", "", []),
    ("Yes", "No, never", ["No, never"]),
    ("您的订单 MW204518 已发货", "您的订单 MW204519 已发货", ["MW204519 "]),
])
def test_what_differs_is_marked_by_word_or_character(reference, answer, marked):
    pieces = report.differences(reference, answer)
    assert "".join(text for text, _ in pieces) == answer
    assert [text for text, same in pieces if not same] == marked


def test_a_name_that_is_a_path_is_shortened():
    assert plots.short("/models/tiny/llama (untuned)") == "llama (untuned)" and len(plots.short("x" * 99)) == 28
    assert plots.short("HuggingFaceTB/SmolLM2-135M-Instruct (untuned)") == "SmolLM2-135M-Inst… (untuned)"


# scripts/report.py


def test_the_report_is_written_again_in_chinese_and_stays_so(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    result = call("scripts/report.py", "--run", folder, "--language", "zh")
    assert result.code == 0 and "report.html" in result.out, result.err
    assert '<html lang="zh-CN">' in (folder / "report.html").read_text(encoding="utf-8")
    runs.write(folder, models.read_record(folder))  # as a later evaluation does
    assert '<html lang="zh-CN">' in (folder / "report.html").read_text(encoding="utf-8")
    assert call("scripts/report.py", "--run", folder, "--language", "en").code == 0
    assert '<html lang="en">' in (folder / "report.html").read_text(encoding="utf-8")


def test_a_comparison_is_recognised(compared, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    (tmp_path / "compare.json").write_text(json.dumps(compared), encoding="utf-8")
    assert call("scripts/report.py", "--run", tmp_path).code == 0
    assert 'id="costs"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert call("scripts/report.py", "--run", tmp_path, "--language", "zh").code == 0
    assert call("scripts/report.py", "--run", tmp_path).code == 0  # the language stays
    assert '<html lang="zh-CN">' in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "compare.json").write_text("{", encoding="utf-8")
    refused(call("scripts/report.py", "--run", tmp_path), "compare.json is damaged")
    refused(call("scripts/report.py", "--run", tmp_path / "absent"), "absent")
    refused(call("scripts/report.py", "--run", tmp_path, "--language", "fr"), "--language")


# In a browser

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def overflow(pages: list[tuple[str, int]], folder) -> list[str]:
    """What a browser says of each of `pages` in a window of so many pixels: "ok", or which elements stand out of it."""
    measure = """
        const page = this.contentDocument, width = parseInt(this.style.width), wide = [];
        for (const e of page.querySelectorAll("body *")) {
          if (e.closest(".scroll") && !e.classList.contains("scroll") || e.closest("svg") && e.tagName != "svg") continue;
          const right = e.getBoundingClientRect().right;
          if (right > width + 1) wide.push(e.tagName + "." + e.className + ":" + Math.round(right));
        }
        if (page.documentElement.scrollWidth > width) wide.push("page:" + page.documentElement.scrollWidth);
        this.title = wide.slice(0, 5).join(" ") || "ok";
    """
    frames = [f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page, quote=True)}" '
              f'onload="{html.escape(measure, quote=True)}"></iframe>' for page, width in pages]
    (folder / "frames.html").write_text("<!doctype html>" + "".join(frames), encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
                           "--window-size=1400,1000", "--dump-dom", (folder / "frames.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    found = re.findall(r'<iframe [^>]*title="([^"]*)"', done.stdout)
    assert len(found) == len(pages), done.stderr[-2000:]
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_overflows_in_a_browser(record, compared, tmp_path):
    wide, narrow, several = report.render(record), report.render(record, "zh"), report.render_comparison(compared)
    broken = narrow.replace("<h1>", '<h1 style="width: 500px">')
    *good, bad = overflow([(wide, 1280), (narrow, 390), (several, 1280), (several, 390), (broken, 390)], tmp_path)
    assert good == ["ok"] * 4
    assert bad.startswith("H1.:") and "page:" in bad
