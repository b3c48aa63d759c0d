"""How many parameters a model has and how many operations it takes, from its dimensions alone."""

from configs.schema import ModelConfig


def count_parameters(cfg: ModelConfig, vocab_rows: int) -> int:
    """All parameters; an embedding matrix that serves twice is counted once."""
    attention = cfg.d_model * cfg.head_dim * 2 * (cfg.n_head + cfg.n_kv_head) + 2 * cfg.head_dim
    mlp = 3 * cfg.d_model * cfg.d_ff
    norms = 2 * cfg.d_model
    embeddings = vocab_rows * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    return cfg.n_layer * (attention + mlp + norms) + cfg.d_model + embeddings


def flops_per_token(cfg: ModelConfig, vocab_rows: int, seq_len: int) -> float:
    """Operations of forward and backward for one trained token; recomputation is not counted.

    6 for each parameter that multiplies (2 forward, 4 backward; the input embedding is a look-up, the output
    matrix multiplies even where it is tied), and 6 n_layer n_head head_dim seq_len for attention: two products
    of 2 operations a position, 3 passes, over the half of the positions that a causal mask leaves. Document
    masks leave fewer; they are not deducted. This is Chowdhery et al. 2022 (PaLM), appendix B, with the
    causal half.
    """
    multiplying = cfg.n_layer * (
        cfg.d_model * cfg.head_dim * 2 * (cfg.n_head + cfg.n_kv_head) + 3 * cfg.d_model * cfg.d_ff
    )
    multiplying += vocab_rows * cfg.d_model
    attention = 6 * cfg.n_layer * cfg.n_head * cfg.head_dim * seq_len
    return 6.0 * multiplying + attention
