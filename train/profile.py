"""`profile=true`: a trace of a few steps of the first rank, and one page that says where their time went."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

from data.files import write_whole
from ledger.pages import render
from model.decoder import flops_per_token
from train.job import Job

FIRST_STEP, N_STEPS = 11, 3
"""Counted from this start; fewer where it has fewer. A line of metrics is written after the tenth."""
WAITING, OTHER = "idle, or in Python", "norms and other pointwise"
KINDS = {
    "communication": ("step: communication", "c10d::", "_c10d_functional", "nccl:", "gloo:", "record_param_comms"),
    "optimizer": ("step: optimizer",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "marathon::product", "mkldnn::"),
    "attention": ("marathon::one_by_one", "torch_attn::", "aten::_scaled_dot_product", "aten::_flash_attention"),
    "loss": ("_SummedCrossEntropy",),
    "copies": ("aten::copy_", "aten::_to_copy", "aten::clone", "Memcpy"),
}
"""How names of operations begin. The first kind wins to which an operation, or one around it, belongs; others are norms
and pointwise. Kernels of an accelerator belong to the operation that began them, whatever they are called."""


def profile_steps(job: Job) -> Callable[[], object]:
    """Begins, where it is asked; returns what is to be called after each step."""
    n_left = job.cfg.train.steps - job.progress.step
    if not (job.cfg.profile and job.rank.is_first and n_left):
        return lambda: None
    n_before = min(FIRST_STEP - 1, max(n_left - N_STEPS, 0))
    n_steps, n_warmup = min(N_STEPS, n_left), min(n_before, 1)
    when = schedule(wait=n_before - n_warmup, warmup=n_warmup, active=n_steps, repeat=1)
    profiler = profile(schedule=when, on_trace_ready=lambda found: _write(found, job, n_steps))
    profiler.start()
    return profiler.step


def seconds_by_operation(events: Any, on_device: bool) -> tuple[float, Counter[tuple[str, str]]]:
    """Seconds that have passed in the steps, and those of each operation with its kind, which add up to them.

    On an accelerator they are its kernels', and idle is what is left; where kernels run side by side, less than it was.
    """
    frames = [event for event in events if event.name.startswith("ProfilerStep") and event.cpu_time_total]
    seconds, found = sum(frame.cpu_time_total for frame in frames) / 1e6, Counter[tuple[str, str]]()
    for event in events:
        if on_device:
            found[_kind(event), event.name] += sum(kernel.duration for kernel in event.kernels) / 1e6
        elif event.thread == frames[0].thread:
            found[_kind(event), event.name] += event.self_cpu_time_total / 1e6
    found[WAITING, "not within an operation"] += max(seconds - found.total(), 0.0)
    return max(seconds, found.total()), found


def _kind(event: Any) -> str:
    is_frame, names = event.name.startswith(("step: ", "ProfilerStep")), []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    kinds = (kind for kind, starts in KINDS.items() if any(name.startswith(starts) for name in names))
    found = next(kinds, OTHER)
    return WAITING if is_frame and found != "communication" else found


def _write(found: Any, job: Job, n_steps: int) -> None:
    folder = job.run_dir / "logs" / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    steps = range(job.progress.step - n_steps + 1, job.progress.step + 1)
    found.export_chrome_trace(str(folder / f"steps-{steps[0]}-{steps[-1]}.json"))
    seconds, by_operation = seconds_by_operation(found.events(), job.rank.device.type != "cpu")
    products = flops_per_token(job.cfg.model, job.vocab_rows, seq_len=0)  # attention left out
    facts = {"seconds": seconds, "by_operation": by_operation, "product_flops_per_token": products}
    page = render(Path(__file__).with_name("profile.md.j2"), job=job, steps=steps, **facts)
    write_whole(folder / "summary.md", page)
    job.metrics.terminal.say(f"profile: {folder / 'summary.md'}")
