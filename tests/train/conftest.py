"""A process group of one in the test's own process, and a corpus prepared once for all runs of the room."""

import pytest
import torch
import torch.distributed as torch_dist

from data.pipeline import prepare
from tests.train.runs import small
from train.dist import Rank


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The only rank of a job."""
    torch_dist.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path_factory.mktemp('store') / 'file'}"
    )
    yield Rank(0, 1, torch.device("cpu"), "here")
    torch_dist.destroy_process_group()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Three languages in 1,000 tokens."""
    return prepare(small(f"cluster.scratch={tmp_path_factory.mktemp('scratch')}"))
