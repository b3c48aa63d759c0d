"""The experiments that people type: they fit where they say that they do, take as long, and can be rehearsed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from configs.checks import check
from configs.compose import compose
from configs.enums import Precision, Recompute
from configs.errors import UserError
from configs.rules import groups
from marathon.plan import ASSUMED_MFU, USABLE_SHARE, device_memory
from model.decoder import flops_per_token, padded_rows
from train.schedule import step_shape

RECIPES = {path.stem: path for path in groups()["experiment"] if path.stem.startswith("eu24_")}
UNIT_S = {"hours": 3600, "days": 86400}


def stated(recipe: Path, machine: str) -> tuple[list[int], list[float]]:
    """Numbers of nodes, and seconds on the fewest and on the most, as the file's first comment has them."""
    pattern = rf"^# {machine.upper()} on ([\d, ]+) nodes: ([\d.]+) to ([\d.]+) (hours|days)"
    found = re.search(pattern, recipe.read_text(), re.MULTILINE)
    assert found, f"{recipe.name} says nothing of {machine}"
    return [int(n) for n in found[1].split(", ")], [float(found[n]) * UNIT_S[found[4]] for n in (2, 3)]


@pytest.mark.parametrize("machine", ["lumi", "leonardo"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_and_takes_as_long_as_it_says(name, machine):
    composed = compose([f"experiment={name}", f"cluster={machine}"])
    nodes, seconds = stated(RECIPES[name], machine)
    took_s = []
    for n in nodes:
        cfg = replace(composed, cluster=replace(composed.cluster, nodes=n))
        check(cfg)
        shape, memory = step_shape(cfg), device_memory(cfg)
        assert shape.micro_batch_seqs * shape.accumulation_steps * cfg.cluster.world_size == shape.seqs_per_step
        assert sum(memory.values()) < USABLE_SHARE * cfg.cluster.device_memory_gib * 2**30, memory
        rows = padded_rows(cfg.tokenizer.vocab_size)
        flops = flops_per_token(cfg.model, rows, cfg.train.seq_len) * cfg.train.tokens
        took_s.append(flops / (cfg.cluster.peak_tflops * 1e12 * ASSUMED_MFU * cfg.cluster.world_size))
    assert [took_s[0], took_s[-1]] == pytest.approx(seconds, rel=0.05)


def test_what_fits_is_near_the_limit_of_what_does():
    """Twice the sequences, or none of the recomputation, and the planner says no: it can tell recipes apart."""
    for change in ("train.max_micro_batch_seqs=4", "engine.recompute=none"):
        cfg = compose(["experiment=eu24_8b", "cluster=lumi", "cluster.nodes=32", change])
        assert sum(device_memory(cfg).values()) > USABLE_SHARE * cfg.cluster.device_memory_gib * 2**30


@pytest.mark.parametrize("name", RECIPES)
def test_a_rehearsal_keeps_the_layout_and_nothing_that_takes_long(name):
    real = compose([f"experiment={name}", "cluster=local"])
    toy = compose([f"experiment={name}", "cluster=local", "rehearse=true"])
    assert toy.rehearse and toy.name == f"{name}-rehearsal"
    assert replace(toy.engine, bucket_elements=real.engine.bucket_elements) == real.engine
    for keeps in ("faults", "cluster", "tasks", "seed"):
        assert getattr(toy, keeps) == getattr(real, keeps)
    assert toy.model.tie_embeddings == real.model.tie_embeddings
    assert toy.schedule.name == real.schedule.name
    assert list(toy.corpus.sources) == ["udhr"]
    assert toy.train.steps == 24 and step_shape(toy).accumulation_steps > 1
    assert step_shape(toy).micro_batch_seqs == real.train.max_micro_batch_seqs


def test_what_is_given_beside_it_wins():
    given = compose(["experiment=eu24_8b", "rehearse=true", "name=dry", "model.n_layer=6", "tokenizer.vocab_size=2000"])
    assert (given.name, given.model.n_layer, given.tokenizer.vocab_size) == ("dry-rehearsal", 6, 2000)
    assert (given.engine.precision, given.engine.recompute) == (Precision.bf16, Recompute.selective)
    with pytest.raises(UserError, match="rehearse"):
        compose(["experiment=eu24_8b", "rehearse=maybe"])
