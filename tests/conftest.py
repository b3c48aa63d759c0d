"""What tests of several rooms share: a tiny model, and examples that are the same in every run."""

import pytest
import torch
from hypothesis import settings

from configs.schema import ModelConfig

# Two threads of PyTorch make tiny models several times slower where something else runs beside them.
torch.set_num_threads(1)

settings.register_profile("marathon", deadline=None, derandomize=True)
settings.load_profile("marathon")


@pytest.fixture
def tiny_model() -> ModelConfig:
    return ModelConfig(n_layer=2, d_model=48, n_head=6, n_kv_head=2, head_dim=16, d_ff=80, tie_embeddings=True)
