"""To Hugging Face: our state dict and config as those of `Qwen3ForCausalLM`."""

from typing import Any

from torch import Tensor

from model.decoder import Decoder

THEIR_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm",
    "output": "lm_head",
}
"""What parts of the decoder are called in `Qwen3ForCausalLM`; the others bear the same name there."""


def to_their_name(name: str) -> str:
    """Name of a parameter in `Qwen3ForCausalLM`."""
    return ".".join(THEIR_NAMES.get(part, part) for part in name.split("."))


def to_their_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their names; the tensors are shared, not copied."""
    return {to_their_name(name): tensor for name, tensor in state.items()}


def to_their_config(
    decoder: Decoder, *, seq_len: int, bos_id: int = 1, eos_id: int = 2, pad_id: int = 3
) -> dict[str, Any]:
    """The content of `config.json`, with the keys of both generations.

    transformers 4 reads `rope_theta` and `torch_dtype`, and falls back to a RoPE base of 10,000 without a word where
    only `rope_parameters` is there; transformers 5 reads the new keys.
    """
    cfg, weight = decoder.cfg, decoder.embedding.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(weight),
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        "use_cache": True,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": cfg.n_layer,
        "layer_types": ["full_attention"] * cfg.n_layer,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def to_transformers(decoder: Decoder, *, seq_len: int, **ids: int) -> Any:
    """The decoder as a `Qwen3ForCausalLM` in evaluation mode, of its dtype and on its device; `ids` as above."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    weight, state = decoder.embedding.weight, to_their_state(decoder.state_dict())
    config = Qwen3Config(**to_their_config(decoder, seq_len=seq_len, **ids))
    # from_pretrained fills what it is given and initialises nothing twice; buffers such as RoPE's come out right.
    model = Qwen3ForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=weight.dtype)
    return model.to(weight.device).eval()
