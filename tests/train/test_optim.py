"""Optimizers against their formulas written out, on any layout; groups; and widths that share a learning rate (muP)."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from configs.compose import compose
from configs.errors import UserError
from model.decoder import Decoder, count_parameters, init_weights
from model.loss import IGNORED, next_token_labels
from model.weights import FragmentReader, load_decoder
from tests.train.ranks import run_ranks
from tests.train.test_engine import ROWS, SEQ_LEN, SEQS, engine_steps, fresh_decoder, save, step_data
from train.optim import parameter_groups, state_bytes

LAYOUTS = [("muon", 1, "fp32"), ("muon", 2, "fp32"), ("muon", 3, "fp32"), ("muon", 1, "bf16")]
LAYOUTS += [("muon", 3, "fp32", "engine.sequence_parallel=2")]
LAYOUTS += [("ademamix", 1, "fp32"), ("ademamix", 3, "fp32")]
STEPS = 4


def config(world_size, optimizer="adamw", stage=1, precision="fp32", *overrides):
    """Three blocks, so that two ranks do not meet at the end of a matrix."""
    return compose(
        [
            "experiment=smoke",
            f"optim={optimizer}",
            f"cluster.devices_per_node={world_size}",
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
            f"train.seq_len={SEQ_LEN}",
            f"train.tokens_per_step={SEQ_LEN * SEQS}",
            "train.max_micro_batch_seqs=2",
            "model={n_layer: 3, d_model: 48, n_head: 6, n_kv_head: 2, head_dim: 16, d_ff: 80}",
            "optim.grad_clip=0.5",
            "optim.lr=0.01",
            "optim.eps=1e-5",
            "optim.slow_warmup_steps=3",
            *overrides,
        ]
    )


# The formulas, one parameter and one step at a time, in float64.


def adam_step(cfg, w, g, kept, t, decay):
    m, v = kept.get("m", 0), kept.get("v", 0)
    kept["m"], kept["v"] = m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
    m, v = m / (1 - cfg.beta1**t), v / (1 - cfg.beta2**t)
    return w - cfg.lr * (m / (v**0.5 + cfg.eps) + decay * w)


def ademamix_step(cfg, w, g, kept, t, decay):
    """Algorithm 1, with the schedulers of its section 3."""
    end = cfg.slow_warmup_steps
    alpha = min(t * cfg.alpha / end, cfg.alpha)
    log_start, log_end = math.log(cfg.beta1), math.log(cfg.beta3)
    beta3 = math.exp(log_start * log_end / ((1 - t / end) * log_end + t / end * log_start)) if t < end else cfg.beta3
    m1, m2, v = (kept.get(name, 0) for name in ("m1", "m2", "v"))
    kept["m1"] = m1 = cfg.beta1 * m1 + (1 - cfg.beta1) * g
    kept["m2"] = m2 = beta3 * m2 + (1 - beta3) * g
    kept["v"] = v = cfg.beta2 * v + (1 - cfg.beta2) * g**2
    fast, v = m1 / (1 - cfg.beta1**t), v / (1 - cfg.beta2**t)
    return w - cfg.lr * ((fast + alpha * m2) / (v**0.5 + cfg.eps) + decay * w)


def muon_step(cfg, w, g, kept, t, decay):
    """By singular values: what Newton and Schulz do with products, a polynomial does to each of them."""
    kept["m"] = m = cfg.momentum * kept.get("m", 0) + (1 - cfg.momentum) * g
    u, s, v = torch.linalg.svd((1 - cfg.momentum) * g + cfg.momentum * m, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return w - cfg.lr * (0.2 * max(g.shape) ** 0.5 * u @ torch.diag(s) @ v + decay * w)


@functools.cache
def plain_loop(name):
    """Weights before and after `STEPS` steps of one process."""
    cfg = config(1, name)
    decoder, kept = fresh_decoder(cfg), {}
    first = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for step in range(STEPS):
        tokens, doc = step_data(step)
        logits, labels = decoder(tokens[:, :-1], doc[:, :-1]), next_token_labels(tokens, doc)
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        (nats / (SEQS * SEQ_LEN)).backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), cfg.optim.grad_clip)
        assert step or norm > cfg.optim.grad_clip, "the gradient has to be clipped for this to say anything"
        for key, p in decoder.named_parameters():
            is_matrix = key.startswith("blocks") and p.ndim == 2
            change = {"ademamix": ademamix_step, "muon": muon_step if is_matrix else adam_step}[name]
            decay = cfg.optim.weight_decay if is_matrix else 0.0
            found = change(cfg.optim, p.data.double(), p.grad.double(), kept.setdefault(key, {}), step + 1, decay)
            p.data.copy_(found)
            p.grad = None
    return first, {name: p.detach() for name, p in decoder.named_parameters()}


def train_whole_and_in_parts(folder, world_size, layouts, middles=None):
    """One rank: each layout from its middle on, where there is one; else at once, with a self-test on the way, and then
    from its middle on in another engine."""
    from train.checkpoint import restore
    from train.dist import join, leave
    from train.engine import Engine
    from train.schedule import step_shape
    from train.selftest import self_test

    rank, told = join(config(world_size)), {}
    for layout in layouts:
        cfg, here = config(world_size, *layout), at(folder, layout)
        rank = dataclasses.replace(rank, group_size=cfg.engine.group_size)
        engine, shape = Engine(fresh_decoder(cfg), cfg, rank), step_shape(cfg)
        if middles is None:
            engine_steps(engine, cfg, rank, shape, 0, 2)
            middle = save(here / "whole", engine, rank, 2)
            self_test(cfg, here, engine, rank, ROWS, middle)
            engine_steps(engine, cfg, rank, shape, 2, STEPS)
            save(here / "whole", engine, rank, STEPS)
            engine = Engine(fresh_decoder(cfg), cfg, rank)
        restore(at(middles or folder, layout) / "whole/checkpoints/step-000000002", engine, rank, 1)
        engine_steps(engine, cfg, rank, shape, 2, STEPS)
        save(here / "parts", engine, rank, STEPS)
        placed = getattr(engine.engine.optimizer.optimizer, "matrices", {}).values()
        cut = sum(0 < matrix.numels[0] < matrix.shape.numel() for matrices in placed for matrix in matrices)
        told[layout] = cut, {fragment.name: sorted(fragment.tensors) for fragment in engine.fragments()}
    leave()
    return told


def at(folder, layout):
    return folder / "-".join(map(str, layout))


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(train_whole_and_in_parts, 2, folder, 2, LAYOUTS)


def errors(checkpoint, name):
    """By parameter: how far it is from where the formulas lead, relative to its way there."""
    first, expected = plain_loop(name)
    found = load_decoder(checkpoint, config(1))[0].state_dict()
    return {name: float((found[name] - w).norm() / (w - first[name]).norm()) for name, w in expected.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_steps_as_the_formulas_say(on_two_ranks, layout):
    """Measured: Muon 1.4e-4, in bf16 0.06; AdEMAMix 1.1e-5."""
    folder, told = on_two_ranks
    found = errors(at(folder, layout) / f"whole/checkpoints/step-{STEPS:09d}", layout[0])
    assert max(found.values()) < (0.15 if layout[2] == "bf16" else 5e-4), found
    if layout[0] == "muon":
        assert told[layout][0] > 0, "a matrix has to be cut for this to say anything"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(on_two_ranks, layout):
    folder, told = on_two_ranks
    one, other = (at(folder, layout) / way / f"checkpoints/step-{STEPS:09d}" for way in ("whole", "parts"))
    assert FragmentReader(one).files == FragmentReader(other).files
    for name, kinds in told[layout][1].items():
        expected = {"muon": ["exp_avg", "exp_avg_sq"], "ademamix": ["exp_avg", "exp_avg_slow", "exp_avg_sq"]}[layout[0]]
        is_momentum = name.endswith("_proj.weight") and layout[0] == "muon"
        assert kinds == [*(["exp_avg"] if is_momentum else expected), "master"]


def test_a_run_goes_on_with_another_number_of_ranks(on_two_ranks, tmp_path):
    layouts = [("muon", 3, "fp32"), ("ademamix", 1, "fp32")]
    run_ranks(train_whole_and_in_parts, 1, tmp_path, 1, layouts, on_two_ranks[0])
    for layout in layouts:
        found = errors(at(tmp_path, layout) / f"parts/checkpoints/step-{STEPS:09d}", layout[0])
        assert max(found.values()) < 5e-4, found


def test_muon_refuses_parts_of_matrices():
    with pytest.raises(UserError, match="makes whole matrices orthogonal"):
        config(2, "muon", 1, "fp32", "engine.tensor_parallel=2")


# Groups.


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "ademamix"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_group_and_matrices_alone_are_decayed(optimizer, tied):
    cfg = config(1, optimizer, 1, "fp32", f"model.tie_embeddings={tied}", "model.mup_base_width=12")
    decoder = Decoder(cfg.model, ROWS)
    groups = parameter_groups(decoder, cfg.optim)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(decoder.parameters()))
    for name, parameter in decoder.named_parameters():
        group, is_hidden = of[id(parameter)], name.startswith("blocks") and parameter.ndim == 2
        assert (group["weight_decay"] > 0) == (is_hidden or name == "output.weight"), name
        assert (len(group["betas"]) == 1) == (is_hidden and optimizer == "muon"), name
        if group["weight_decay"]:
            assert group["weight_decay"] * group["lr_factor"] == pytest.approx(cfg.optim.weight_decay), name
        hidden = 1 / 2 if optimizer == "muon" else 1 / 4
        last = name == "output.weight" or (tied and name == "final_norm.weight")
        assert group["lr_factor"] == pytest.approx(hidden if is_hidden else 1 / 4 if last else 1), name
    kept = sum(len(group["betas"]) * parameter.numel() for group in groups for parameter in group["params"])
    assert state_bytes(cfg, ROWS) == 4 * (count_parameters(cfg.model, ROWS) + kept)


@pytest.mark.parametrize("setting", ["beta1=0", "beta3=1", "momentum=1.5"])
def test_decays_lie_between_0_and_1(setting):
    with pytest.raises(UserError, match="between 0 and 1"):
        config(1, "ademamix", 1, "fp32", f"optim.{setting}")


# Widths.


def moved(width, base, optimizer, tied, rank):
    """Root mean square of how far logits and the residual stream have gone after four steps on one batch."""
    from train.engine import Engine

    model = f"n_layer: 2, d_model: {width}, n_head: {width // 16}, n_kv_head: {width // 32}, head_dim: 16"
    cfg = compose(
        [
            "experiment=smoke",
            f"optim={optimizer}",
            "optim.lr=0.01",
            "cluster.devices_per_node=1",
            *("train.seq_len=32", "train.tokens_per_step=128", "train.max_micro_batch_seqs=4"),
            f"model={{{model}, d_ff: {2 * width}, tie_embeddings: {tied}, mup_base_width: {base}}}",
        ]
    )
    decoder = Decoder(cfg.model, ROWS)
    init_weights(decoder, 1)
    engine, stream = Engine(decoder, cfg, rank), []
    decoder.blocks[-1].register_forward_hook(lambda *found: stream.append(found[-1].detach()))
    tokens, doc = (x[:4] for x in step_data(0))
    logits = [engine.logits(tokens[:, :-1])]
    for _ in range(4):
        engine.backward(tokens, doc)
        engine.step(cfg.optim.lr)
    logits.append(engine.logits(tokens[:, :-1]))
    return [float((last - first).square().mean().sqrt()) for first, *_, last in (logits, stream)]


@pytest.mark.parametrize(("optimizer", "tied"), [("adamw", True), ("adamw", False), ("muon", True)])
def test_coordinates_move_alike_at_every_width_with_mup_and_not_without(optimizer, tied, alone, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    narrow = moved(64, 64, optimizer, tied, alone)
    wide, without = (moved(256, base, optimizer, tied, alone) for base in (64, 0))
    assert max(there / here for here, there in zip(narrow, wide, strict=True)) < 1.2
    # Muon's update has singular values of one size, so the stream moves with the root of the width; Adam's is worse.
    assert without[1] > (1.5 if optimizer == "muon" else 10) * narrow[1]
