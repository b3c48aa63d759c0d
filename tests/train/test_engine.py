"""The engine against a plain PyTorch loop on one process, and checkpoints across world sizes and stages."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from configs.compose import compose
from configs.enums import Precision
from model.decoder import Decoder, init_weights
from model.loss import IGNORED, next_token_labels
from model.weights import load_decoder, read_manifest
from tests.train.ranks import run_ranks

ROWS, SEQ_LEN, SEQS = 256, 32, 12
IDENTITY = {"corpus_hash": "c", "seq_len": SEQ_LEN, "seed": 1, "vocab_rows": ROWS}


def config(world_size, stage=1, precision="fp32", compiled=False):
    return compose(
        [
            "experiment=smoke",
            f"cluster.devices_per_node={world_size}",
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
            f"engine.compile={compiled}",
            f"train.seq_len={SEQ_LEN}",
            f"train.tokens_per_step={SEQ_LEN * SEQS}",
            "train.max_micro_batch_seqs=2",
            "model={n_layer: 2, d_model: 48, n_head: 6, n_kv_head: 2, head_dim: 16, d_ff: 80}",
            "optim.grad_clip=0.5",
            "optim.lr=0.01",
        ]
    )


def step_data(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(ROWS, (SEQS, SEQ_LEN + 1), generator=generator)
    doc = (torch.arange(SEQ_LEN + 1) >= torch.randint(SEQ_LEN, (SEQS, 1), generator=generator)).int()
    return tokens, doc


def fresh_decoder(cfg):
    decoder = Decoder(cfg.model, ROWS)
    init_weights(decoder, seed=3)
    return decoder


def plain_loop(n_steps, sizes=None):
    """AdamW with clipping, written out; the reference of every engine. `sizes`: sequences of each step."""
    cfg = config(1)
    decoder = fresh_decoder(cfg)
    matrices = [p for n, p in decoder.named_parameters() if p.ndim == 2 and n != "embedding.weight"]
    others = [p for n, p in decoder.named_parameters() if p.ndim != 2 or n == "embedding.weight"]
    groups = [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps)
    told = []
    for step in range(n_steps):
        n_seqs = sizes[step] if sizes else SEQS
        tokens, doc = (whole[:n_seqs] for whole in step_data(step))
        logits, labels = decoder(tokens[:, :-1], doc[:, :-1]), next_token_labels(tokens, doc)
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        (nats / (n_seqs * SEQ_LEN)).backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), cfg.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        told.append((nats.item(), norm.item()))
    return told, {name: p.detach() for name, p in decoder.named_parameters()}


def engine_steps(engine, cfg, rank, shape, first, last):
    told = []
    for step in range(first, last):
        tokens, doc = step_data(step)
        counts = torch.zeros(2, dtype=torch.float64)
        for m in range(shape.accumulation_steps):
            start = (m * rank.data_world_size + rank.data_rank) * shape.micro_batch_seqs
            counts += engine.backward(
                tokens[start : start + shape.micro_batch_seqs], doc[start : start + shape.micro_batch_seqs]
            )
        norm, _ = engine.step(cfg.optim.lr)
        told.append((rank.sum(counts.tolist())[0], norm))
    return told


def build(cfg, rank, resume_from=None):
    """What train/run.py does to have an engine, and the step it stands at."""
    from train import checkpoint
    from train.engine import Engine

    engine = Engine(fresh_decoder(cfg), cfg, rank)
    return engine, checkpoint.restore(resume_from, engine, rank, 1).step if resume_from else 0


def save(folder, engine, rank, step):
    from train.checkpoint import Saver
    from train.progress import Progress

    saver = Saver(folder, engine, rank, IDENTITY, (0, 0))
    saver.begin(Progress(step=step, updates=step))
    saver.finish()
    return folder / "checkpoints" / f"step-{step:09d}"


def train_whole_and_in_parts(folder, world_size, layouts):
    """One rank: for each layout six steps at once, saved at 3 and 6; then another engine from step 3 on.

    Losses and norms of both, by layout.
    """
    from train.dist import join, leave
    from train.schedule import step_shape

    rank = join(config(world_size))
    told = {}
    for layout in layouts:
        cfg, here = config(world_size, *layout), folder / "-".join(map(str, layout))
        shape = step_shape(cfg)
        engine, _ = build(cfg, rank)
        whole = engine_steps(engine, cfg, rank, shape, 0, 3)
        middle = save(here / "whole", engine, rank, 3)
        whole += engine_steps(engine, cfg, rank, shape, 3, 6)
        save(here / "whole", engine, rank, 6)
        engine, step = build(cfg, rank, middle)
        resumed = engine_steps(engine, cfg, rank, shape, step, 6)
        save(here / "parts", engine, rank, 6)
        told[layout] = whole, resumed
    leave()
    return told


def one_bad_step(world_size, layouts):
    """One rank: a step whose gradient is not finite on the last rank alone, then two that are sound."""
    from train.dist import join, leave
    from train.schedule import step_shape

    rank = join(config(world_size))
    told = {}
    for layout in layouts:
        cfg = config(world_size, *layout)
        engine, _ = build(cfg, rank)
        shape = step_shape(cfg)
        engine_steps(engine, cfg, rank, shape, 0, 1)
        before = [{kind: t.clone() for kind, t in f.tensors.items()} for f in engine.fragments()]
        tokens, doc = step_data(1)
        for m in range(shape.accumulation_steps):
            loss, _ = engine.engine(tokens[: shape.micro_batch_seqs], doc[: shape.micro_batch_seqs])
            spoilt = rank.rank == world_size - 1 and m == 0
            engine.engine.backward(loss * (math.inf if spoilt else 1.0))
            if m + 1 < shape.accumulation_steps:
                engine.engine.step()
        norm, applied = engine.step(cfg.optim.lr)
        after = [f.tensors for f in engine.fragments()]
        untouched = all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)
        told[layout] = norm, applied, untouched, engine_steps(engine, cfg, rank, shape, 1, 3)
    leave()
    return told


STAGES = [(stage, precision, False) for stage, precision in itertools.product((1, 2, 3), ("fp32", "bf16"))]
COMPILED = [(stage, precision, True) for stage, precision, _ in STAGES]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(train_whole_and_in_parts, 2, folder, 2, [*STAGES, *COMPILED])


def weights_of(checkpoint):
    decoder, _ = load_decoder(checkpoint, config(1))
    return {name: p.detach() for name, p in decoder.named_parameters()}


def files_of(folder):
    return read_manifest(folder / "checkpoints/step-000000006")["files"]


@pytest.mark.parametrize("layout", [*STAGES, *COMPILED])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(on_two_ranks, layout):
    folder, told = on_two_ranks
    whole, resumed = told[layout]
    assert resumed == whole[3:]
    here = folder / "-".join(map(str, layout))
    assert files_of(here / "whole") == files_of(here / "parts")


@pytest.mark.parametrize("layout", [*STAGES, *COMPILED])
def test_every_layout_steps_as_a_plain_loop(on_two_ranks, layout):
    folder, told = on_two_ranks
    whole, _ = told[layout]
    expected, weights = plain_loop(6)
    assert whole[0][1] > 0.5, "the gradient has to be clipped for this to say anything"
    if layout[1] == "bf16":
        assert [nats for nats, _ in whole] == pytest.approx([nats for nats, _ in expected], rel=2e-2)
        return
    assert [nats for nats, _ in whole] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [norm for _, norm in whole] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    if layout[2]:  # where a gradient is next to nothing, AdamW makes a step of its sign, which fused kernels may turn
        return
    found = weights_of(folder / "-".join(map(str, layout)) / "whole/checkpoints/step-000000006")
    for name, expected_weight in weights.items():
        # A hundredth of a step: where a first gradient is near 1e-8, AdamW makes a good part of a step of its rounding.
        assert torch.allclose(found[name], expected_weight, atol=1e-4), name


def test_stages_differ_in_the_order_of_sums_alone(on_two_ranks):
    _, told = on_two_ranks
    for precision in ("fp32", "bf16"):
        first, *others = [told[stage, precision, False][0] for stage in (1, 2, 3)]
        for other in others:
            found, expected = ([nats for nats, _ in told] for told in (other, first))
            assert found == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-4), precision


def test_a_gradient_that_is_not_finite_is_left_out_by_all_ranks_alike():
    told = run_ranks(one_bad_step, 2, 2, STAGES)
    for layout, (norm, applied, untouched, after) in told.items():
        assert (math.isfinite(norm), applied, untouched) == (False, False, True), layout
        assert all(math.isfinite(nats) and math.isfinite(norm) for nats, norm in after), layout


def test_engines_settings_reach_deepspeed():
    from train.engine import deepspeed_config

    cfg = config(2)
    engine = dataclasses.replace(cfg.engine, precision=Precision.bf16, zero_stage=2)
    found = deepspeed_config(dataclasses.replace(cfg, engine=engine))
    assert 2 * found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] == SEQS
    assert found["data_types"]["grad_accum_dtype"] == "fp32" == found["communication_data_type"]
    assert found["zero_optimization"]["stage"] == 2
    assert found["bf16"]["enabled"]
