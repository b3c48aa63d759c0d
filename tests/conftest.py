"""What tests of several rooms share: a tiny model."""

import pytest

from configs.schema import ModelConfig


@pytest.fixture
def tiny_model() -> ModelConfig:
    return ModelConfig(n_layer=2, d_model=48, n_head=6, n_kv_head=2, head_dim=16, d_ff=80, tie_embeddings=True)
