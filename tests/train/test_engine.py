"""The engine against a plain PyTorch loop on one process, and checkpoints across world sizes and stages."""

import dataclasses
import math
import shutil

import pytest
import torch

from configs.compose import compose
from configs.enums import Precision
from configs.errors import UserError
from model.decoder import Decoder
from model.init import init_weights
from model.loss import next_token_labels, summed_cross_entropy
from model.weights import FragmentReader, checkpoint_sha256, list_checkpoints, load_decoder, verify_files
from tests.train.ranks import run_ranks

ROWS, SEQ_LEN, SEQS = 256, 32, 8
IDENTITY = {"corpus_hash": "c", "seq_len": SEQ_LEN, "seed": 1, "vocab_rows": ROWS}


def config(world_size, stage=1, precision="fp32"):
    return compose(
        [
            "experiment=smoke",
            f"cluster.devices_per_node={world_size}",
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
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


def plain_loop(n_steps):
    """AdamW with clipping, written out; the reference of every engine."""
    cfg = config(1)
    decoder = fresh_decoder(cfg)
    matrices = [p for n, p in decoder.named_parameters() if p.ndim == 2 and n != "embedding.weight"]
    others = [p for n, p in decoder.named_parameters() if p.ndim != 2 or n == "embedding.weight"]
    groups = [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps)
    told = []
    for step in range(n_steps):
        tokens, doc = step_data(step)
        hidden = decoder.hidden(tokens[:, :-1], doc[:, :-1])
        nats = summed_cross_entropy(hidden, decoder.output_weight, next_token_labels(tokens, doc))
        (nats / (SEQS * SEQ_LEN)).backward()
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
            start = (m * rank.world_size + rank.rank) * shape.micro_batch_seqs
            counts += engine.backward(
                tokens[start : start + shape.micro_batch_seqs], doc[start : start + shape.micro_batch_seqs]
            )
        norm = engine.step(cfg.optim.lr)
        told.append((rank.sum(counts.tolist())[0], norm))
    return told


def build(cfg, rank, resume_from=None):
    """What train/run.py does to have an engine: weights first, then the engine, then moments."""
    from train import checkpoint
    from train.batch import step_shape
    from train.engine import Engine

    decoder, step = fresh_decoder(cfg), 0
    if resume_from:
        FragmentReader(resume_from).read_into(decoder)
    engine = Engine(decoder, cfg.engine, cfg.optim, step_shape(cfg), rank)
    if resume_from:
        step = checkpoint.restore(resume_from, engine).step
    return engine, step


def train_whole_and_in_parts(folder, *settings):
    """One rank: six steps at once, saved at 3 and 6; then another engine from step 3 on. Losses and norms of both."""
    from train import checkpoint
    from train.batch import step_shape
    from train.checkpoint import Progress
    from train.dist import join, leave

    cfg = config(*settings)
    rank, shape = join(cfg), step_shape(cfg)
    engine, _ = build(cfg, rank)
    whole = engine_steps(engine, cfg, rank, shape, 0, 3)
    middle = checkpoint.save(folder / "whole", engine, Progress(step=3), IDENTITY, rank)
    whole += engine_steps(engine, cfg, rank, shape, 3, 6)
    checkpoint.save(folder / "whole", engine, Progress(step=6), IDENTITY, rank)
    engine, step = build(cfg, rank, middle)
    resumed = engine_steps(engine, cfg, rank, shape, step, 6)
    checkpoint.save(folder / "parts", engine, Progress(step=6), IDENTITY, rank)
    leave()
    return whole, resumed


def go_on_alone(checkpoint, *settings):
    from train.batch import step_shape
    from train.dist import join, leave

    cfg = config(*settings)
    rank = join(cfg)
    engine, step = build(cfg, rank, checkpoint)
    told = engine_steps(engine, cfg, rank, step_shape(cfg), step, 6)
    engine.decoder.blocks[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    ((_, norm),) = engine_steps(engine, cfg, rank, step_shape(cfg), 6, 7)
    leave()
    return told, norm


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(train_whole_and_in_parts, 2, folder, 2, 1, "fp32")


def weights_of(checkpoint):
    decoder, _ = load_decoder(checkpoint, config(1))
    return {name: p.detach() for name, p in decoder.named_parameters()}


def assert_as_plain_loop(folder, told):
    expected, weights = plain_loop(6)
    for (nats, norm), (expected_nats, expected_norm) in zip(told, expected, strict=True):
        assert nats == pytest.approx(expected_nats, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert told[0][1] > 0.5, "the gradient has to be clipped for this to say anything"
    found = weights_of(folder / "whole/checkpoints/step-000000006")
    for name, expected_weight in weights.items():
        assert torch.allclose(found[name], expected_weight, atol=2e-5), name


def assert_resumed_bit_by_bit(folder, whole, resumed):
    assert resumed == whole[3:]
    last = "checkpoints/step-000000006"
    assert checkpoint_sha256(folder / "whole" / last) == checkpoint_sha256(folder / "parts" / last)


def test_two_ranks_step_as_a_plain_loop_and_resume_bit_by_bit(on_two_ranks):
    folder, (whole, resumed) = on_two_ranks
    assert_as_plain_loop(folder, whole)
    assert_resumed_bit_by_bit(folder, whole, resumed)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 2)])
def test_other_layouts_do_too(tmp_path, world_size, stage):
    whole, resumed = run_ranks(train_whole_and_in_parts, world_size, tmp_path, world_size, stage, "fp32")
    assert_as_plain_loop(tmp_path, whole)
    assert_resumed_bit_by_bit(tmp_path, whole, resumed)


def test_bf16_resumes_bit_by_bit_from_fp32_master_weights(tmp_path):
    whole, resumed = run_ranks(train_whole_and_in_parts, 2, tmp_path, 2, 1, "bf16")
    assert_resumed_bit_by_bit(tmp_path, whole, resumed)
    expected, _ = plain_loop(6)
    assert [nats for nats, _ in whole] == pytest.approx([nats for nats, _ in expected], rel=2e-2)


def test_another_world_size_and_stage_go_on_from_a_checkpoint(on_two_ranks):
    folder, (whole, _) = on_two_ranks
    told, norm_after_nan = run_ranks(go_on_alone, 1, folder / "whole/checkpoints/step-000000003", 1, 2, "fp32")
    assert [nats for nats, _ in told] == pytest.approx([nats for nats, _ in whole[3:]], rel=1e-5)
    assert not math.isfinite(norm_after_nan), "what stops the loop is the norm"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, on_two_ranks):
    from train.checkpoint import newest_usable, require_identity

    shutil.copytree(on_two_ranks[0] / "whole", tmp_path, dirs_exist_ok=True)
    older, newer = list_checkpoints(tmp_path)
    assert newest_usable(tmp_path) == (newer, [])
    with pytest.raises(UserError, match="corpus_hash is other"):
        require_identity(newer, {**IDENTITY, "corpus_hash": "other"})
    require_identity(newer, IDENTITY)
    data = newer / "rank-00001.safetensors"
    whole = data.read_bytes()
    for damage in (whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], None):
        data.unlink(missing_ok=True)
        if damage is not None:
            data.write_bytes(damage)
        found, (complaint,) = newest_usable(tmp_path)
        assert found == older
        assert str(data) in complaint
        with pytest.raises(UserError):
            verify_files(newer)
    (newer / "manifest.json").unlink()
    assert newest_usable(tmp_path) == (older, [])


def test_engines_settings_reach_deepspeed():
    from train.batch import step_shape
    from train.engine import deepspeed_config

    cfg = config(2)
    engine = dataclasses.replace(cfg.engine, precision=Precision.bf16, zero_stage=2)
    found = deepspeed_config(engine, cfg.optim, step_shape(cfg), 2)
    assert (
        found["train_batch_size"]
        == SEQS
        == 2 * found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"]
    )
    assert found["data_types"]["grad_accum_dtype"] == "fp32" == found["communication_data_type"]
    assert found["zero_optimization"]["stage"] == 2
    assert found["bf16"]["enabled"]
