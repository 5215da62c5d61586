"""What goes wrong while a run trains: numbers that are not finite, losses that leap, too little memory, data that don't come, pickles."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES
from safetensors.torch import load_file
from test_generation import make, make_prompts
from test_methods import run_recipe

from recipes.common import deadline, disk, encoding, faults, formats, generation, models, report, runs
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs
from recipes.common.trainer import RecipeTrainer

STEPS = ("--max_steps", "5", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2",
         "--eval_strategy", "no", "--load_best_model_at_end", "False", "--learning_rate", "0.01")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    return folder


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# Numbers that are not finite


class BrokenLoss(RecipeTrainer):
    """In step 4, and in all later ones if `until` says so, the loss is no number. Keeps the weights after each step."""

    first = until = 4

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.first <= self.state.global_step + 1 <= self.until else loss

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.after = getattr(self, "after", {}) | {self.state.global_step: trained(self.model)}
        super()._maybe_log_save_evaluate(*args, **kwargs)


class BrokenGradient(RecipeTrainer):
    """In step 4 the loss is a number, but its gradient is infinite."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 3:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


def test_a_loss_that_is_no_number_stops_and_names_the_rows(tiny, data, tmp_path):
    with pytest.raises(UserError) as stopped:
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--per_device_train_batch_size", "1", trainer_class=BrokenLoss)
    found = re.match(r"step 4: the loss is nan on train row (\d) \('(.*?)'\), counted among the rows that are trained on;.*--on_nan skip; "
                     r"(\S+) is the last", str(stopped.value))
    number, beginning, checkpoint = found.groups()
    assert checkpoint == str(tmp_path / "run/checkpoint-2")
    assert DIALOGUES[int(number) - 1]["messages"][0]["content"][:20] in beginning


def test_a_gradient_that_is_not_finite_stops(tiny, data, tmp_path):
    with pytest.raises(UserError, match=r"step 4: the norm of the gradient is (inf|nan) on train rows \d \('"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, trainer_class=BrokenGradient)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_may_be_skipped(tiny, data, tmp_path, capsys):
    trainer = run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--on_nan", "skip", trainer_class=BrokenLoss)
    after = trainer.after
    assert same(after[3], after[4]) and not same(after[2], after[3]) and not same(after[4], after[5])
    assert "note: step 4: the loss is nan on train rows" in capsys.readouterr().out
    [event] = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["events"]
    assert event["step"] == 3 and event["event"].endswith("the step is left out")


def test_a_run_may_go_back_to_its_last_checkpoint(tiny, data, tmp_path):
    trainer = run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--on_nan", "rollback", trainer_class=BrokenLoss)
    after, rates = trainer.after, [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert same(after[4], after[2]) and not same(after[4], after[3]) and not same(after[5], after[4])
    other = run_recipe("lora", tiny("gpt2"), data, tmp_path / "other", *STEPS)
    assert rates == [line["learning_rate"] for line in other.state.log_history if "learning_rate" in line]


def test_a_run_that_stays_broken_is_given_up(tiny, data, tmp_path):
    class StaysBroken(BrokenLoss):
        until = 99

    with pytest.raises(UserError, match=r"step 13: .*10 steps in a row were broken"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--max_steps", "30", "--on_nan", "skip", trainer_class=StaysBroken)


def test_a_loss_that_leaps_is_noted(capsys):
    batch = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2)}
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=1, fp16=False, process_index=0), state=SimpleNamespace(global_step=30),
                              train_dataset=[{"input_ids": [5]}, {"input_ids": [1, 2]}],
                              processing_class=SimpleNamespace(decode=lambda ids, **options: "hello"))
    watch = faults.Watch(trainer, "stop")
    for loss in [2.0, 2.1, 1.9] * 8 + [2.4, 9.0]:  # 2.4 is more than usual, but no leap
        watch.seen, watch.seen_losses = [batch], [torch.tensor(loss)]
        watch.checked(torch.tensor(1.0))
    [event] = watch.events
    assert event["event"].startswith("step 31: the loss leapt to 9.000, from 2.0") and "train row 2 ('hello')" in event["event"]


# Memory


class Small(RecipeTrainer):
    """Fits two rows at once; a third breaks the backward pass half-way, when the upper layer has its gradient already."""

    fits = 2

    def _parts(self, model, inputs):
        parts = super()._parts(model, inputs)
        if len(inputs["labels"]) > self.fits:
            if not torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            self.lower.register_hook(self._full)
        return parts

    def _forward_and_backward(self, model, inputs, num_items_in_batch):
        layer = self.accelerator.unwrap_model(model).base_model.model.model.layers[0]  # no dropout in a Llama
        keep = layer.register_forward_hook(lambda module, args, output: setattr(self, "lower", output))
        try:
            return super()._forward_and_backward(model, inputs, num_items_in_batch)
        finally:
            keep.remove()

    def _full(self, gradient):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                           "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)")


MEMORY = (*STEPS, "--gradient_accumulation_steps", "2", "--eval_strategy", "steps", "--eval_steps", "5",
          "--per_device_eval_batch_size", "4", "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def roomy(tiny, data, tmp_path_factory):
    return run_recipe("lora", tiny("llama"), data, tmp_path_factory.mktemp("roomy") / "run", *MEMORY)


def close(one, other):
    return all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)


def test_too_little_memory_halves_the_micro_batch_and_changes_nothing(roomy, tiny, data, tmp_path, capsys):
    trainer = run_recipe("lora", tiny("llama"), data, tmp_path / "run", *MEMORY, trainer_class=Small)
    said = capsys.readouterr().out
    assert said.count("note: step 1: out of memory while training: from here on at most 2 rows at once") == 1
    assert said.count("out of memory while evaluating: from here on at most 2 rows") == 1
    assert len(json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["events"]) == 2
    assert close(trained(trainer.model), trained(roomy.model))
    for key in ("loss", "grad_norm", "eval_loss"):
        logs = [[line[key] for line in each.state.log_history if key in line] for each in (trainer, roomy)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-4) and logs[0]


def test_a_gradient_counted_twice_is_noticed(roomy, tiny, data, tmp_path):
    """The broken twin of the test above: what the half-done pass left in the gradients is kept."""
    class CountsTwice(Small):
        def training_step(self, model, inputs, num_items_in_batch=None):
            zero, self.model.zero_grad = self.model.zero_grad, lambda: None
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            finally:
                self.model.zero_grad = zero

    trainer = run_recipe("lora", tiny("llama"), data, tmp_path / "run", *MEMORY, trainer_class=CountsTwice)
    norms = [next(line["grad_norm"] for line in each.state.log_history if "grad_norm" in line) for each in (trainer, roomy)]
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


def test_memory_that_runs_out_in_a_later_micro_batch_counts_the_earlier_ones_once(roomy, tiny, data, tmp_path):
    class FullLater(Small):
        fits = 4

        def training_step(self, *args, **kwargs):
            self.fits = 1 if self.watch.seen else self.fits  # from the second micro-batch of a step on
            return super().training_step(*args, **kwargs)

    flags = (*MEMORY, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    there = run_recipe("lora", tiny("llama"), data, tmp_path / "roomy", *flags)
    trainer = run_recipe("lora", tiny("llama"), data, tmp_path / "run", *flags, trainer_class=FullLater)
    assert "at most 1 rows" in trainer.watch.events[0]["event"]
    assert close(trained(trainer.model), trained(there.model))


def test_a_single_row_that_does_not_fit_is_told(tiny, data, tmp_path):
    class None_(Small):
        fits = 0

    with pytest.raises(UserError, match="step 1: out of memory while training with a single row: lower --max_length"):
        run_recipe("lora", tiny("llama"), data, tmp_path / "run", *STEPS, trainer_class=None_)


def test_memory_that_runs_out_in_scoring(roomy, capsys):
    task, model = roomy.task, roomy.model.eval()
    whole, fits = dataset_outputs(model, task, task.dev, "Scoring"), 1
    loss = task.loss

    def small(model, inputs):
        if len(inputs["labels"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, inputs)

    task.loss = small
    try:
        parts = dataset_outputs(model, task, task.dev, "Scoring")
        fits = 0
        with pytest.raises(UserError, match="out of memory while scoring a single row"):
            dataset_outputs(model, task, task.dev, "Scoring")
    finally:
        task.loss = loss
    assert [sums[0].tolist() for sums in parts] == [pytest.approx(sums[0].tolist(), rel=1e-5) for sums in whole]
    assert "note: out of memory while scoring: from here on at most" in capsys.readouterr().out


def test_memory_that_runs_out_in_writing_replies(monkeypatch, capsys):
    model, tokenizer = make("gpt2")
    prompts, generate, fits = make_prompts(tokenizer), generation._generate, 1
    wanted = generation.replies(model, tokenizer, prompts, 8)

    def small(model, tokenizer, prompts, group, max_new_tokens):
        if len(group) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, tokenizer, prompts, group, max_new_tokens)

    monkeypatch.setattr(generation, "_generate", small)
    assert generation.replies(model, tokenizer, prompts, 8) == wanted
    assert "note: out of memory while writing the replies of" in capsys.readouterr().out
    fits = 0
    with pytest.raises(UserError, match="out of memory while writing the replies of a single dialogue"):
        generation.replies(model, tokenizer, prompts, 8)


def test_only_lack_of_memory_counts_as_such():
    with pytest.raises(RuntimeError) as real:
        torch.empty(10 ** 15)
    assert faults.out_of_memory(real.value) and not faults.out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        faults.in_pieces(lambda piece: (_ for _ in ()).throw(RuntimeError("shape mismatch")), {"input_ids": torch.ones(4, 2)}, None, print)


# Data


@pytest.fixture(autouse=True)
def no_limit_left_behind(monkeypatch):
    monkeypatch.setattr(deadline, "limit", 0)


def test_data_that_do_not_come_end_the_run(tiny, data, tmp_path):
    class Dead(RecipeTrainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            collate = loader.collate_fn
            loader.collate_fn = loader.base_dataloader.collate_fn = lambda rows: (
                time.sleep(60 * (self.state.global_step == 2)), collate(rows))[1]
            return loader

    began, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match="step 3: the data did not come within 1 s .--data_timeout"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--data_timeout", "1", trainer_class=Dead)
    assert time.monotonic() - began < 50 and signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed")])
def test_data_that_fail_end_the_run(error):
    with pytest.raises(UserError, match="step 3: the data can't be read any more"), deadline.deadline("step 3"):
        raise error
    with pytest.raises(RuntimeError, match="other"), deadline.deadline("step 3"):
        raise RuntimeError("other")


def coming(*pauses):
    for number, pause in enumerate(pauses):
        time.sleep(pause)
        yield number


def test_slow_data_are_waited_for_and_dead_ones_are_not(monkeypatch):
    monkeypatch.setattr(deadline, "limit", 1)
    assert list(deadline.timed(coming(0.4, 0.4, 0.4, 0.4), "rows.jsonl")) == [0, 1, 2, 3]
    for _ in deadline.timed(coming(0, 0), "rows.jsonl"):
        time.sleep(1.2)  # what is done with a row may take longer
    with deadline.deadline("step 3"):  # a stream of which a step takes many rows
        for _ in deadline.timed(coming(0.4, 0.4, 0.4, 0.4), "rows.jsonl"):
            deadline.renew()
    got = []
    with pytest.raises(UserError, match="rows.jsonl: the data did not come within 1 s .--data_timeout.*then start again"):
        got.extend(deadline.timed(coming(0.1, 60), "rows.jsonl"))
    monkeypatch.setattr(deadline, "limit", 0)
    assert list(deadline.timed(coming(0, 1.2), "rows.jsonl")) == [0, 1] and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("more", [(), ("--streaming", "--max_eval_samples", "2")])
def test_a_source_that_dies_while_it_is_read_ends_the_run(more, tiny, data, tmp_path, monkeypatch):
    records = formats.records
    monkeypatch.setattr(formats, "records", lambda file: itertools.chain(records(file), coming(60)))
    with pytest.raises(UserError, match=r"train\.jsonl: the data did not come within 1 s"):
        run_recipe("lora", tiny("gpt2"), data / "train.jsonl", tmp_path / "run", *STEPS, "--data_timeout", "1", *more)


def test_a_stream_that_dies_while_it_is_trained_on_ends_the_run(tiny, data, tmp_path, monkeypatch):
    records, reads = formats.records, []

    def slow_then_dead(file):
        reads.append(file)
        for record in records(file):
            time.sleep(0.4)  # five rows before a step: longer than allowed in all, and not for any of them
            yield record
        time.sleep(60 * (len(reads) > 2))  # the dev rows, and one pass over the train rows

    monkeypatch.setattr(formats, "records", slow_then_dead)
    with pytest.raises(UserError, match=r"step [23]: the data did not come within 1 s"):
        run_recipe("lora", tiny("gpt2"), data / "train.jsonl", tmp_path / "run", *STEPS, "--data_timeout", "1", "--streaming",
                   "--max_eval_samples", "1", "--per_device_train_batch_size", "3")


def test_dev_data_that_do_not_come_end_the_run(tiny, data, tmp_path):
    class Dead(RecipeTrainer):
        def get_eval_dataloader(self, *args):
            loader = super().get_eval_dataloader(*args)
            loader.base_dataloader.collate_fn = loader.collate_fn = lambda rows: time.sleep(60)
            return loader

    with pytest.raises(UserError, match="evaluation after step 5: the data did not come within 1 s"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--data_timeout", "1", trainer_class=Dead)


def slow(row):
    time.sleep(row["seconds"])
    return {"input_ids": [1]}, {}


def test_a_process_that_tokenizes_and_hangs_ends_the_run(monkeypatch):
    monkeypatch.setattr(deadline, "limit", 2)
    monkeypatch.setattr(disk, "CHUNK", 4)
    steady = encoding.encode([{"seconds": 0.8}] * 8, "rows", slow, "row", "stop", 2)  # a chunk takes longer than allowed, a row does not
    assert len(steady.features) == 8
    began, children = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(UserError, match="tokenizing: the data did not come within 2 s"):
        encoding.encode([{"seconds": 60}] * 8, "rows", slow, "row", "stop", 2)
    assert time.monotonic() - began < 30 and set(multiprocessing.active_children()) <= children


# Safety


def test_an_adapter_that_was_pickled_is_refused(tiny, data, tmp_path):
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--max_steps", "1")
    torch.save({}, tmp_path / "run/adapter_model.bin")
    (tmp_path / "run/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights .* are not loaded, as opening a pickle can run any code.*convert them") as told:
        models.load_run(tmp_path / "run")
    convert = shlex.split(str(told.value).partition("convert them: ")[2])
    subprocess.run([sys.executable, *convert[1:]], check=True)
    assert (tmp_path / "run/adapter_model.safetensors").is_file()


def pickled_by_index(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": "weights.bin"}}), encoding="utf-8")
    (folder / "other.safetensors").touch()
    return "weights.bin"


def pickled_by_config(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}), encoding="utf-8")
    return "adapter_model.bin"


def pickled_beside_other_tensors(folder):
    (folder / "other.safetensors").touch()
    return "pytorch_model.bin"


@pytest.mark.parametrize("pickled", [pickled_by_index, pickled_by_config, pickled_beside_other_tensors])
def test_no_door_opens_weights_that_are_pickled(pickled, tiny, data, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / pickled(folder))
    (folder / "model.safetensors").unlink()
    (folder / "run.json").write_text(json.dumps({"recipe": "full", "task": "chat", "model": {"used": str(folder)}, "data": {},
                                                 "shared_arguments": {}, "training_arguments": {"seed": 1}}), encoding="utf-8")
    monkeypatch.setattr(torch, "load", None)
    doors = (lambda: models.resolve(str(folder)), lambda: models.load_run(folder), lambda: models.load_base(folder),
             lambda: models.source_of_run(folder, models.read_record(folder)))
    for door in doors:
        with pytest.raises(UserError, match="pickled weights .* are not loaded.*convert them") as told:
            door()
    monkeypatch.undo()
    convert = shlex.split(str(told.value).partition("convert them: ")[2].partition(" (or")[0])
    subprocess.run([sys.executable, *convert[1:]], check=True, cwd=tmp_path)
    assert models.load_tokenizer(models.resolve(str(tmp_path / "NEW"))).chat_template


def test_an_adapter_beside_a_model_is_refused(tiny, tmp_path):
    """transformers would load the model that the adapter names."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another"}), encoding="utf-8")
    with pytest.raises(UserError, match="holds an adapter beside a model, so which is meant is unclear: move adapter_config.json away"):
        models.resolve(str(folder))


def test_code_that_a_model_brings_along_is_not_run(tiny, data, tmp_path):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    for path in tiny("gpt2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(sprung)!r}, 'w')\nfrom transformers import GPT2Config as Config, GPT2LMHeadModel as Model\n",
                                   encoding="utf-8")
    with pytest.raises(UserError):
        run_recipe("lora", folder, data, tmp_path / "run", *STEPS)
    assert not sprung.exists()


class Code:
    def __reduce__(self):
        return print, ("code that a pickle brings along was run",)


def test_a_pickle_in_a_checkpoint_is_not_opened(tiny, data, tmp_path, capfd):
    flags = (*STEPS, "--max_steps", "3")
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags)
    (tmp_path / "run/run.json").unlink()  # as if it had not come to its end
    checkpoint = tmp_path / "run/checkpoint-2"
    torch.save({"state": Code()}, checkpoint / "optimizer.pt")
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    content = (checkpoint / "optimizer.pt").read_bytes()
    manifest["files"]["optimizer.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="checkpoint-2 holds a pickle of more than tensors, which is not opened"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags, "--resume_from_checkpoint", str(checkpoint))
    assert "was run" not in capfd.readouterr().out


def test_code_that_a_tokenizer_brings_along_is_neither_run_nor_asked_for(tiny, tmp_path, monkeypatch):
    run, sprung = tmp_path / "run", tmp_path / "sprung"
    shutil.copytree(tiny("gpt2"), run)
    (run / "config.json").unlink()  # as in the run of an adapter
    config = json.loads((run / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (run / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (run / "own.py").write_text(f"open({str(sprung)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # what transformers would ask
    monkeypatch.setattr(models, "read_record", lambda run: {"task": "classify"})
    with contextlib.suppress(UserError):
        models.load_run_tokenizer(run)
    assert not sprung.exists()


def test_a_report_escapes_what_the_data_say(roomy):
    record = json.loads((runs.Path(roomy.args.output_dir) / "run.json").read_text(encoding="utf-8"))
    evil = "<script>alert(1)</script>"
    record["data"]["splits"]["train"]["source"] = record["command"] = record["model"]["used"] = evil
    html = report.render(record)
    assert evil not in html and "&lt;script&gt;alert(1)" in html
