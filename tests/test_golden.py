"""The losses of each recipe's first 8 steps on the tiny Llama, as literals: whatever changes what is learned changes these.

Measured with torch 2.13.0 on a CPU in fp32 by running this test with `-s`, which prints them.
"""

import json

import pytest
from conftest import DIALOGUES
from test_methods import run_recipe

GOLDEN = {
    "full": [5.99546, 5.99978, 5.64495, 5.60443, 5.37503, 5.09976, 5.03469, 4.87964],
    "lora": [5.99546, 5.99978, 5.96145, 5.93341, 5.89367, 5.89345, 5.874, 5.8779],
    "prefix": [5.99978, 5.99849, 5.9966, 5.99624, 5.9915, 5.99683, 5.98955, 5.99576],
    "adapter": [5.99546, 5.99978, 5.92619, 5.92565, 5.91362, 5.89752, 5.90837, 5.89339],
}
MEASURED_WITH = {"prefix": ("--num_virtual_tokens", "20")}  # where it is not the default


def losses(recipe, tiny, folder, output, *flags):
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    trainer = run_recipe(recipe, tiny("llama"), folder, folder / output, "--max_steps", "8", "--per_device_train_batch_size", "1",
                         "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--learning_rate", "0.01", "--eval_strategy", "no",
                         "--save_strategy", "no", "--seed", "42", *flags)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recipe", GOLDEN)
def test_golden_losses(recipe, tiny, tmp_path):
    flags = MEASURED_WITH.get(recipe, ())
    found = losses(recipe, tiny, tmp_path, "first", *flags)
    print(recipe, [round(loss, 5) for loss in found])
    assert found == pytest.approx(GOLDEN[recipe], abs=1e-4)
    assert losses(recipe, tiny, tmp_path, "second", *flags) == found  # bit for bit


@pytest.mark.parametrize("flags", [("--seed", "43"), ("--learning_rate", "0.0102"), ("--weight_decay", "0.5"), ("--alpha", "17")])
def test_another_run_is_told_apart(flags, tiny, tmp_path):
    assert losses("lora", tiny, tmp_path, "run", *flags) != pytest.approx(GOLDEN["lora"], abs=1e-4)
