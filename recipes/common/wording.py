"""What the reports say, in English and Chinese: the English is the key. Names of flags, files and metrics stay as they are."""

import re

LANGUAGES = ("en", "zh")
ZH = {
    "{recipe} on {model}": "{recipe}，基于 {model}",
    "Comparison of {systems} on {model}": "{systems} 的比较，基于 {model}",
    "From scratch: every weight was drawn at random before the training.": "从头训练：训练前所有权重均随机初始化。",
    "{asked} was asked for and could not be reached; {used} was used in its place.": "请求的模型是 {asked}，但无法获取；改用了 {used}。",
    "finished": "完成于",
    "Contents": "目录",
    "To repeat": "重复此运行的命令",
    "Advice": "建议",
    "Data": "数据",
    "split": "划分",
    "rows": "行",
    "dialogues": "对话",
    "replies": "回复",
    "texts": "文本",
    "blocks": "文本块",
    "pairs": "句对",
    "labels": "标签",
    "words": "词",
    "e-mail addresses": "电子邮箱",
    "identity card numbers": "身份证号",
    "bank card numbers": "银行卡号",
    "bank account numbers": "银行账号",
    "order numbers": "订单号",
    "telephone numbers": "电话号码",
    "{kept} of {rows} {unit}": "{rows} {unit}中的 {kept}",
    "shortened": "截短",
    "left out": "舍弃",
    "skipped": "跳过",
    "tokens": "词元",
    "trained on": "参与训练",
    "source": "来源",
    "source text": "原文",
    "What the checks of the data found": "数据检查结果",
    "All checks: {command}": "全部检查：{command}",
    "The checks found nothing.": "检查未发现问题。",
    "Configuration": "配置",
    "this recipe": "本方法的参数",
    "every recipe": "公共参数",
    "all settings of the Trainer": "Trainer 的全部设置",
    "goes on from": "接续自",
    "Training": "训练过程",
    "loss": "损失",
    "train": "训练集",
    "dev": "开发集",
    "test": "测试集",
    "loss (nats per item)": "损失（奈特/项）",
    "learning rate": "学习率",
    "gradient norm": "梯度范数",
    "loss over tokens": "损失（按词元数）",
    "compute": "计算量",
    "{number} operations": "{number} 次浮点运算",
    "{tokens} tokens": "{tokens} 个词元",
    "step": "步",
    "Where the ranks went": "秩的分配",
    "Results": "结果",
    "parameters trained": "训练的参数",
    "{trained} of {total}": "{total} 中的 {trained}",
    "training time": "训练时间",
    "{seconds} s": "{seconds} 秒",
    "{steps} steps": "{steps} 步",
    "tokens per second": "每秒词元数",
    "peak memory": "内存峰值",
    "old rows, before and after": "旧数据得分，训练前后",
    "before": "之前",
    "after": "之后",
    "Evaluation on {split}": "在 {split} 上的评测",
    "No evaluation yet: scripts/evaluate.py --run DIR --base.": "尚未评测：scripts/evaluate.py --run DIR --base。",
    "language": "语言",
    "model": "模型",
    "count": "数量",
    "all": "全部",
    "en": "英文",
    "zh": "中文",
    "Scores with 95 % intervals": "得分与 95% 区间",
    "The line is where the score of 95 % of test sets like this one would lie (bootstrap over rows).":
        "横线表示：类似的测试集中，95% 的得分会落在此范围内（按行自助抽样）。",
    "Parts of the rows": "分组得分",
    "by {key}": "按{key}",
    "intent": "意图",
    "sentiment": "情感",
    "turn": "轮次",
    "reply length": "回复长度",
    "target length": "译文长度",
    "length": "长度",
    "Which labels are mistaken for which": "标签混淆情况",
    "right label": "正确标签",
    "predicted label": "预测标签",
    "Each label": "各标签得分",
    "label": "标签",
    "precision": "精确率",
    "recall": "召回率",
    "support": "支持数",
    "Answers side by side": "回答对照",
    "What is not in the reference is marked.": "与参考答案不同之处已标出。",
    "nothing": "（无）",
    "user": "用户",
    "assistant": "客服",
    "system": "系统",
    "tool": "工具",
    "reference": "参考答案",
    "right": "正确答案",
    "text": "文本",
    "text pair": "第二段文本",
    "Hardware and versions": "硬件与版本",
    "no GPU": "无 GPU",
    "{n} CPU cores": "{n} 个 CPU 核",
    "perplexity": "困惑度",
    "accuracy": "准确率",
    "macro F1": "宏平均 F1",
    "f1 macro": "宏平均 F1",
    "micro F1": "微平均 F1",
    "kept": "保留",
    "OOS recall": "域外召回率",
    "Quality against cost": "质量与代价",
    "seconds of training": "训练秒数",
    "peak memory (MB)": "内存峰值（MB）",
    "trained parameters": "训练的参数量",
    "seconds for an answer": "单条回答秒数",
    "MB on disk": "磁盘占用（MB）",
    "status": "状态",
    "done": "完成",
    "partly": "部分完成",
    "failed": "失败",
    "runs": "运行",
    "error": "错误",
    "seeds": "随机种子",
    "budget": "预算",
    "items": "评测项",
    "p against the best": "与最佳相比的 p 值",
    "lower is better": "越低越好",
    "higher is better": "越高越好",
    "What more data would bring": "增加数据的收益",
    "train rows": "训练行数",
    "No learning curve: scripts/compare.py --data_fractions 0.25,0.5,1.": "没有学习曲线：scripts/compare.py --data_fractions 0.25,0.5,1。",
    "dev loss": "开发集损失",
    "train loss": "训练损失",
    "earlier turns: {n}": "之前的轮次：{n}",
    "Settings that were tried": "尝试过的设置",
    "settings": "设置",
    "value on dev": "开发集得分",
    "chosen": "选中",
}

# What other parts of the code have written into a record. A part in braces stands for any text.
SENTENCES = {
    # advice on a comparison, and what its table means (comparison.py, scripts/compare.py)
    "nothing to compare: no training has ended well": "无可比较：没有一次训练正常结束",
    "{best} is the only one that was trained: {metric} {value} [{low}, {high}]": "只训练了 {best}：{metric} {value} [{low}, {high}]",
    "take {best}: its {metric} {value} [{low}, {high}] is better than that of every other (p <= {p})":
        "建议选用 {best}：其{metric} {value} [{low}, {high}] 优于其余各项（p <= {p}）",
    "no clear winner: {best} has the best {metric} {value} [{low}, {high}], but it can't be told apart from {names}; "
    "the cheapest of them is {cheapest} ({seconds} s of training, {size} MB on disk)":
        "没有明显的优胜者：{best} 的{metric}最好，为 {value} [{low}, {high}]，但与 {names} 无法区分；"
        "其中代价最低的是 {cheapest}（训练 {seconds} 秒，磁盘 {size} MB）",
    "no clear winner among {n} of {total}: {best} has the best {metric} {value} [{low}, {high}], but it can't be told apart from {names}; "
    "the cheapest of them is {cheapest} ({seconds} s of training, {size} MB on disk)":
        "{total} 个中有 {n} 个分不出优胜者：{best} 的{metric}最好，为 {value} [{low}, {high}]，但与 {names} 无法区分；"
        "其中代价最低的是 {cheapest}（训练 {seconds} 秒，磁盘 {size} MB）",
    "warning: {best} can't be told apart from {base}, or is worse: there is no evidence that the training helped":
        "警告：{best} 与 {base} 无法区分或更差：没有证据表明训练有用",
    "warning: {n} held-out {unit} are few: intervals of so few are too narrow, and small differences can't be seen":
        "警告：只有 {n} 条留出的{unit}：这么少，区间会偏窄，小的差异看不出来",
    "warning: there are no test rows, so these are the dev rows, by which checkpoints and settings were chosen: the scores flatter":
        "警告：没有测试集，这里用的是开发集，而检查点和设置正是据它选出的：得分偏高",
    "warning: one seed, so how much a repetition would differ is unknown: --seeds 3 shows it":
        "警告：只有一个随机种子，不知道重复一次会相差多少：--seeds 3 可以看出",
    "warning: {names} still improved at the last evaluation: with more training the order may change":
        "警告：{names} 在最后一次评测时仍在变好：多训练一些，次序可能改变",
    "warning: {name} failed and is left out: {error}": "警告：{name} 失败，未计入：{error}",
    "more data can't raise {metric} on these held-out rows, as it is {value} already":
        "{metric}已达 {value}：在这些留出的行上，更多数据无法再提高它",
    "can't tell what more data would bring: {n} (amount of data is|amounts of data are) too few for a curve":
        "无法判断更多数据的收益：{n} 种数据量太少，画不出曲线",
    "can't tell whether more data would help: what twice the rows gain in {metric} lies in {bounds}, which holds 0":
        "无法判断更多数据是否有用：行数加倍，{metric}的收益在 {bounds} 之间，其中含 0",
    "can't tell whether more data would help: by the curve twice the rows raise {metric} by about {gain} {bounds}, but fewer than {n} "
    "seeds can't tell that from chance: --seeds {enough} can":
        "无法判断更多数据是否有用：按曲线，行数加倍会使{metric}提高约 {gain} {bounds}，但随机种子少于 {n} 个，"
        "分不清是不是偶然：--seeds {enough} 可以",
    "can't tell whether more data would help: by the curve twice the rows lower {metric} by about {gain} {bounds}, but fewer than {n} "
    "seeds can't tell that from chance: --seeds {enough} can":
        "无法判断更多数据是否有用：按曲线，行数加倍会使{metric}降低约 {gain} {bounds}，但随机种子少于 {n} 个，"
        "分不清是不是偶然：--seeds {enough} 可以",
    "twice the rows ({rows}) would raise {metric} by about {gain} {bounds}, to about {value}, if the curve goes on as it did":
        "若曲线照此延续，行数加倍（{rows}）会使{metric}提高约 {gain} {bounds}，达到约 {value}",
    "twice the rows ({rows}) would lower {metric} by about {gain} {bounds}, to about {value}, if the curve goes on as it did":
        "若曲线照此延续，行数加倍（{rows}）会使{metric}降低约 {gain} {bounds}，达到约 {value}",
    "minutes: the learning rate is constant after the warm-up, as a schedule would be cut":
        "按分钟的预算：预热之后学习率不变，否则调度会被中途截断",
    "settings are chosen by dev loss, as {metric} is not measured while training: --eval_generate_rows 32 measures it":
        "设置按开发集损失选择，因为训练时不测{metric}：--eval_generate_rows 32 可以测它",
    "{name}: no settings could be chosen, as all that were tried failed: it has its defaults": "{name}：尝试的设置全部失败，用的是默认设置",
    "{name} failed, so this point is missing: {error}": "{name} 失败，缺这个点：{error}",
    "shares of the data have the same budget as all of it: a small share is read more often": "各份数据的预算相同：份额小的会被多读几遍",
    "three amounts of data fit any such curve: a fourth would test it": "三种数据量总能配上这样一条曲线：第四种才能检验它",
    # what the checks of the data found (doctor.py)
    "{n} of {rows} train rows repeat an earlier one word for word": "训练集 {rows} 行中有 {n} 行与前面的一字不差",
    "{n} of {rows} dev rows stand in train word for word, so dev scores are too good":
        "开发集 {rows} 行中有 {n} 行原样出现在训练集里，开发集得分会偏高",
    "personal data ({n} {split} rows looked at): {found}": "个人信息（检查了{split} {n} 行）：{found}",
    "{share} of the train labels are {label}, so always saying that would score as much":
        "训练标签的 {share} 是 {label}，总答它就能得这么多分",
    "{n} of {labels} labels occur fewer than {times} times in train: {rare}":
        "{labels} 个标签中有 {n} 个在训练集中出现不到 {times} 次：{rare}",
    "a stream is not examined for copies, leaks and personal data": "流式数据不检查重复、泄漏和个人信息",
    # what became of the rows (data.py, tasks/)
    "{n} {unit} (exceeds|exceed) --max_length {length}: {turns} oldest (turn|turns) dropped":
        "{n} 条{unit}超过 --max_length {length}：去掉了最早的 {turns} 轮",
    "left out, as even the last question with its answer exceeds --max_length or no turn is trained on: {n} {unit} (numbers {numbers})":
        "舍弃了 {n} 条{unit}（第 {numbers} 条）：最后一问一答也超过 --max_length，或没有可训练的轮次",
    "{n} (row exceeds|rows exceed) --max_length {length}: the end is cut off": "{n} 行超过 --max_length {length}，末尾被截去",
    "{n} (row exceeds|rows exceed) --max_length {length} with the context, which lost its beginning, or all":
        "{n} 行连同上下文超过 --max_length {length}，上下文的开头或全部被截去",
    "{n} of {tokens} tokens are unknown to the tokenizer, and the same {unknown} to the model: it goes by what stands around them":
        "{tokens} 个词元中有 {n} 个分词器不认识，对模型来说都是 {unknown}：只能凭上下文判断",
    "{n} of {words} words are unknown to the tokenizer, and the same {unknown} to the model: it goes by what stands around them":
        "{words} 个词中有 {n} 个分词器不认识，对模型来说都是 {unknown}：只能凭上下文判断",
    "{n} out-of-scope (row is|rows are) not trained on": "{n} 行域外数据不参与训练",
    "--train_fraction {share}: {n} of {rows} train rows, drawn with seed {seed}":
        "--train_fraction {share}：训练集 {rows} 行中的 {n} 行，抽取种子 {seed}",
    "replay: {n} (label|labels) of {source} without a row among those drawn, not learned ({labels}): a larger share draws more":
        "回放：{source} 中有 {n} 个标签没有抽到任何一行，因此学不到（{labels}）：提高比例可多抽一些",
    # what happened in an evaluation (tasks/)
    "{name}: {n} of {all} replies did not end within {tokens} tokens and were cut":
        "{name}：{all} 条回复中有 {n} 条写满 {tokens} 个词元仍未结束，被截断",
    "{name}: {n} (question exceeds|questions exceed) the {limit} tokens that the run's --max_length and the model's window leave; the "
    "reply counts as empty":
        "{name}：{n} 个问题超过了该运行的 --max_length 和模型窗口所留的 {limit} 个词元，其回复按空计",
    "{name}: {n} of {all} targets did not end within {tokens} tokens and were cut":
        "{name}：{all} 条译文中有 {n} 条写满 {tokens} 个词元仍未结束，被截断",
    "a row whose likeliest label has less than {cut} probability is turned away as {label} (set on dev)":
        "最可能的标签概率低于 {cut} 的行判为 {label}（阈值由开发集定）",
    "{n} (time|times) {predicted} in place of {right}": "{n} 次把 {right} 判成 {predicted}",
}


def counted(n: int, what: str) -> str:
    """`n` and what there are so many of: "1 row", "2 rows" of "rows"; of "row is|rows are", the part that fits."""
    one, _, several = what.rpartition("|")
    return f"{n:,} {several if n != 1 else one or several.removesuffix('s')}"


def wording(language: str):
    """A function `t(text, **values)` that says `text` in "en" or "zh". KeyError for a sentence that ZH does not hold."""
    def t(text: str, **values) -> str:
        said = ZH[text] if language == "zh" else text
        return said.format(**values) if values else said

    return t


def name_in(language: str):
    """A function that says a name which comes from a record (a column, a key, who speaks) in `language`, or leaves it as it is."""
    return lambda name: ZH.get(name.replace("_", " "), name) if language == "zh" else name.replace("_", " ")


def sentence_in(language: str):
    """A function that says a sentence of a record in `language`, or leaves it as it is, if SENTENCES does not hold it."""
    name = name_in(language)
    how = dict.fromkeys(("metric", "split"), name)  # parts that have a name in Chinese
    how["unit"] = lambda unit: name(unit if unit in ZH else f"{unit}s")
    how["names"] = lambda names: re.sub(r", | and ", "、", names)
    how["found"] = lambda kinds: re.sub("([^,]+?) in ([0-9]+)", lambda one: f"{name(one[1].strip())} {one[2]} 行", kinds)

    def told(sentence: str) -> str:
        for english, pattern in _PATTERNS.items():
            if found := pattern.fullmatch(sentence):
                return SENTENCES[english].format(**{part: how.get(part, str)(text) for part, text in found.groupdict().items()})
        about, colon, rest = sentence.partition(": ")  # "lora: can't tell ..."
        known = told(rest) if colon else rest
        return f"{about}：{known}" if known != rest else sentence

    return told if language == "zh" else lambda sentence: sentence


def _pattern(english: str) -> re.Pattern:
    """What `english` matches: each part in braces any text, as short as can be; of (row is|rows are), either."""
    parts = [f"(?P<{part}>.+?)" if i % 2 else re.escape(part) for i, part in enumerate(re.split(r"{(\w+)}", english))]
    return re.compile(re.sub(r"\\\(([^()|]*)\\\|([^()|]*)\\\)", r"(?:\1|\2)", "".join(parts)), re.S)


_PATTERNS = {english: _pattern(english) for english in SENTENCES}
