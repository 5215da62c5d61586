"""Where a prefix starts. A prefix drawn at random disturbs the model for hundreds of steps; one that real tokens would leave in the
attention layers disturbs it as little as these tokens would (Li and Liang, 2021, section 7.4: "initializing with real words").
"""

import inspect

import torch
from peft import PeftModel, prompt_embeddings_from_past_key_values
from transformers import DynamicCache


def takes_keys_and_values(model) -> bool:
    """Whether the network of `model`, below any head, lets keys and values stand before a text: DistilBERT does not."""
    return model.config.is_encoder_decoder or "past_key_values" in inspect.signature(model.base_model.forward).parameters


@torch.no_grad()
def start_from_tokens(model: PeftModel, input_ids: list[int]) -> bool:
    """Set the new prefix of `model` to the keys and values that its frozen network computes for `input_ids`, one token a position.

    Of an encoder these are the ones of the tokens among themselves, without what follows. False, and nothing is set, for an
    encoder-decoder. Raises ValueError when there are fewer tokens than positions. Behind a projection, its last layer is solved for that
    prefix: exactly where the projection is at least as wide as the prefix is long, else as the least-squares fit.
    """
    config, encoder = model.peft_config[model.active_adapter], model.prompt_encoder[model.active_adapter]
    length = config.num_virtual_tokens
    ids = torch.tensor([input_ids[:length]], device=model.device)
    if ids.shape[1] < length:
        raise ValueError(f"a prefix of {length} positions can't start from {ids.shape[1]} tokens")
    backbone = model.get_base_model().base_model  # below any head, which may not hand the cache on
    if backbone.config.is_encoder_decoder:
        return False
    cache = DynamicCache(config=backbone.config)  # an encoder fills the one that it is given, and makes none
    backbone(input_ids=ids, past_key_values=cache, use_cache=True)
    wanted = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=length)  # (positions, 2 x layers x key width)
    if not config.prefix_projection:
        encoder.load_prompt_embeddings(wanted)
        return True
    narrow, activation, wide = encoder.transform
    hidden = activation(narrow(encoder.embedding.weight))  # (positions, projection_hidden_size)
    wide.bias.zero_()
    # The smallest weights W with hidden @ W.T = wanted; in fp64, as the inverse of a wide matrix magnifies rounding.
    wide.weight.copy_((torch.linalg.pinv(hidden.double()) @ wanted.double()).T)
    return True
