"""What a run says of its own speed: parts of a step add up, a profile tells products from the rest, joules count once."""

import functools
import itertools
import json
import re
import statistics
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile, schedule

from model.decoder import Decoder, init_weights
from tests.train.runs import progress, stop_after, train
from train.engine import NextTokenLoss
from train.profile import KINDS, OTHER, WAITING, seconds_by_operation
from train.timer import StepTimer

WATTS = 50.0
STEP = ("data", "forward", "backward", "optimizer", "communication")


def test_parts_of_a_step_are_told_apart_and_none_counts_twice():
    timer = StepTimer(torch.device("cpu"))
    send = functools.partial(timer.collective, time.sleep)
    began_s = time.perf_counter()
    send(0.02)  # not of a step
    for _ in range(2):
        with timer.part("backward"):
            time.sleep(0.03)
            send(0.04)
        with pytest.raises(KeyError), timer.part("optimizer"):
            under_way = timer.collective(lambda: SimpleNamespace(wait=time.sleep))
            under_way.wait(0.05)
            raise KeyError
    with timer.part("validation"):
        send(0.02)
    whole_s, found = time.perf_counter() - began_s, timer.read()
    expected = {"backward": 0.06, "optimizer": 0.0, "communication": 0.18, "validation": 0.02}
    assert found == pytest.approx({**dict.fromkeys(found, 0.0), **expected}, abs=0.02)
    assert sum(found.values()) == pytest.approx(whole_s - 0.02, abs=0.01)
    assert not any(timer.read().values())


def simulated(root):
    """The run's meter reads files below `root`."""
    from train import job

    job.Meter = functools.partial(job.Meter, root=root)


def tick(folder, stop):
    """RAPL's files for one processor of `WATTS`."""
    folder.mkdir(parents=True)
    (folder / "name").write_text("package-0\n")
    (folder / "max_energy_range_uj").write_text("65532610987\n")
    (folder / "energy_uj").write_text("1\n")

    def write():
        while not stop.wait(0.005):
            (folder / "energy_uj.new").write_text(f"{int(WATTS * 1e6 * time.monotonic()) % 65532610987}\n")
            (folder / "energy_uj.new").replace(folder / "energy_uj")

    threading.Thread(target=write, daemon=True).start()


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory, corpus):
    """A run of two ranks that was stopped after 14 steps and ended under ZeRO-3; in its second start it has no meter."""
    root, stop = tmp_path_factory.mktemp("run"), threading.Event()
    tick(root / "sys/class/powercap/intel-rapl:0", stop)
    time.sleep(0.05)
    often = ("train.log_every_steps=2", "train.validate_every_steps=7", "profile=true")
    faults = (functools.partial(simulated, root), functools.partial(stop_after, 14))
    train(root / "run", corpus, *often, "cluster.peak_tflops_derived=0.2", world_size=2, faults=faults)
    train(root / "run", corpus, *often, "engine.zero_stage=3", world_size=2)
    stop.set()
    return root / "run"


def lines_of(run_dir, file, **matching):
    found = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    return [line for line in found if matching.items() <= line.items()]


def test_joules_count_once_a_node_and_stand_in_checkpoints(two_starts):
    stopped, ended = (lines_of(two_starts, "ledger.jsonl", event=event)[0] for event in ("train_stop", "train_end"))
    then, now = progress(two_starts, 14), progress(two_starts, 20)
    # Two ranks on one node: one of them reads.
    assert then["joules"] == [pytest.approx(WATTS * then["metered_s"][0], rel=0.05), 0]
    devices = stopped["energy"]["devices"]
    assert devices["kwh"] * 3.6e6 == pytest.approx(then["joules"][0], rel=0.2)
    assert (devices["meter"], devices["metered_share"]) == ("RAPL, processors and memory", 1.0)
    assert stopped["energy"]["nodes"]["kwh"].startswith("GAP: no meter can be read")
    assert now["joules"] == then["joules"] and now["metered_s"][-1] > then["metered_s"][-1] == now["metered_s"][0]
    assert 0 < ended["energy"]["devices"]["metered_share"] < 1
    lines = lines_of(two_starts, "metrics.jsonl", kind="train")
    rates = [
        line["joules_per_token_devices"] * (line["tokens"] - before["tokens"]) / (line["time"] - before["time"])
        for before, line in itertools.pairwise(line for line in lines if line["step"] <= 14)
    ]
    assert statistics.median(rates) == pytest.approx(WATTS, rel=0.1)
    assert all(line["joules_per_token_devices"] is None for line in lines if line["step"] > 14)


def test_the_split_of_a_window_adds_up_to_its_seconds(two_starts):
    lines = lines_of(two_starts, "metrics.jsonl", kind="train")
    parts, seconds = Counter(), 0.0
    for line in lines:
        if line["step"] != 14:  # while the first rank writes its trace, the other waits in a collective
            parts.update(line["split_s"])
            seconds += line["window_s"]
        assert line["window_s"] == pytest.approx(2 * line["step_s"])
        assert line["tokens_per_s_per_device"] == pytest.approx(line["tokens_per_s"] / 2)
    assert sum(parts[part] for part in STEP) == pytest.approx(seconds, rel=0.05)
    assert all(parts[part] > 0 for part in (*STEP, "checkpoint", "validation"))
    assert all(("mfu_derived" in line) == (line["step"] <= 14) for line in lines)
    assert lines[0]["mfu_derived"] == pytest.approx(lines[0]["mfu"] / 2)


def test_a_profile_shows_the_chosen_steps_of_each_start(two_starts):
    folder = two_starts / "logs/profile"
    traces = {path.name for path in folder.glob("*.json")}
    assert traces == {"steps-11-13.json", "steps-18-20.json"}, "the second start has six steps"
    events = json.loads((folder / "steps-11-13.json").read_text())["traceEvents"]
    assert {"step: forward", "step: backward", "step: optimizer"} <= {event.get("name") for event in events}
    page = (folder / "summary.md").read_text()
    shares = [float(share) for share in re.findall(r"([\d.]+) % \|", page.split("## By kind")[1].split("Products")[0])]
    assert sum(shares) == pytest.approx(100, abs=0.5) and "GAP" not in page


def test_products_outweigh_all_else_where_they_should():
    torch.manual_seed(1)
    from configs.schema import ModelConfig

    cfg = ModelConfig(n_layer=2, d_model=512, n_head=4, n_kv_head=4, head_dim=128, d_ff=2048, tie_embeddings=True)
    decoder = Decoder(cfg, 512)
    init_weights(decoder, 1)
    model, tokens = NextTokenLoss(decoder), torch.randint(512, (2, 257))
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
    timer, found = StepTimer(torch.device("cpu")), {}

    def take(profiler):
        found["seconds"], found["parts"] = seconds_by_operation(profiler.events(), on_device=False)

    with profile(schedule=schedule(wait=0, warmup=1, active=2), on_trace_ready=take) as profiler:
        for _ in range(3):
            with timer.part("forward"):
                loss, _ = model(tokens, torch.zeros_like(tokens, dtype=torch.int32))
            with timer.part("backward"):
                loss.backward()
            with timer.part("optimizer"):
                optimizer.step()
            profiler.step()
    kinds = Counter()
    for (kind, _), seconds in found["parts"].items():
        kinds[kind] += seconds
    assert sum(kinds.values()) == pytest.approx(found["seconds"])
    assert kinds["matrix products"] > 0.5 * found["seconds"]
    assert min(kinds[kind] for kind in ("attention", "loss", "optimizer", OTHER)) > 0


def test_kernels_count_for_the_operation_that_began_them():
    def event(name, parent=None, **kernels):
        shown = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels.items()]
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=shown, cpu_time_total=1000.0, thread=1)

    step = event("ProfilerStep*")
    loss, optimizer = event("_SummedCrossEntropy", step), event("step: optimizer", step)
    events = [
        step,
        event("aten::mm", loss, ampere_bf16_s16816gemm=300),
        event("aten::softmax", loss, cunn_SoftMaxForward=100),
        event("c10d::allreduce_", optimizer, ncclDevKernel_AllReduce=50),
        event("aten::_fused_adamw_", optimizer, multi_tensor_apply=40),
        event("triton_red_fused_mean_0", step, triton_red_fused_mean_0=10),
    ]
    seconds, found = seconds_by_operation(events, on_device=True)
    by_kind = {kind: us for (kind, _), s in found.items() if (us := round(s * 1e6))}
    expected = {"matrix products": 300, "loss": 100, "communication": 50, "optimizer": 40, OTHER: 10, WAITING: 500}
    assert by_kind == expected and seconds == pytest.approx(1e-3) and set(by_kind) <= {*KINDS, OTHER, WAITING}
