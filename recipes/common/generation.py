"""Replies from a model, many at a time."""

import torch
from tqdm.auto import tqdm

from recipes.common import chat


def room(model, max_new_tokens: int) -> int:
    """Tokens a prompt may have so that `max_new_tokens` more fit into the model's window, beside a prefix if it has one."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    prefix = model.peft_config[model.active_adapter].num_virtual_tokens if _has_prefix(model) else 0
    return window - prefix - max_new_tokens


def replies(model, tokenizer, prompts: list[list[int]], max_new_tokens: int = 128, batch_size: int = 16,
            description: str = "Generating") -> tuple[list[str], int]:
    """Greedy replies to `prompts` (token ids), in their order, and how many of them were cut at `max_new_tokens`.

    Prompts of similar length share a batch and are padded on the left, so that each continues from its own last token; a batch ends
    when its last reply does. The replies equal those of one-by-one generation, up to the rounding of differently shaped matrices.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # longest first: memory fails early
    texts, cut = [""] * len(prompts), 0
    ends = set(model.generation_config.eos_token_id)
    with tqdm(total=len(prompts), desc=description, unit="replies") as bar, torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = order[at: at + batch_size]
            ids, mask = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id)
            out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                                 max_new_tokens=max_new_tokens)[:, ids.shape[1]:]
            for i, tokens in zip(batch, out.tolist(), strict=True):
                length = next((t for t, token in enumerate(tokens) if token in ends), None)
                cut += length is None
                texts[i] = tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
            bar.update(len(batch))
    return texts, cut


def left_pad(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, each (prompts, longest), padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def turns_to_answer(messages: list[dict]) -> list[int]:
    """Indices of the assistant turns that are trained on: the ones an evaluation asks for."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") is not False]


def prompts_for(rows: list[dict], tokenizer, limit: int) -> list[tuple[int, int, list[int] | None]]:
    """(row, turn, prompt) for each assistant turn: its true history, never its answer; None where `limit` tokens don't hold it."""
    return [(r, turn, chat.prompt(row["messages"][:turn], tokenizer, limit))
            for r, row in enumerate(rows) for turn in turns_to_answer(row["messages"])]


def _has_prefix(model) -> bool:
    config = getattr(model, "peft_config", None)
    return bool(config) and config[model.active_adapter].is_prompt_learning
