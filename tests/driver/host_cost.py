"""What a call costs the host: PYTHONPATH=tests python -m driver.host_cost

One query of one token on the stand-in `mps` device, whose driver checks and executes nothing: so all of the time is
that of the dispatcher, csrc/ and the stand-ins for Metal's calls. Beside it, in the same run, torch's own attention
on a CPU token. CPU time of the thread; medians of torch.utils.benchmark, from measurements that alternate.
"""

import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Measurement, Timer

import mfa

from . import control, stand_in

ROUNDS, SECONDS = 10, 0.3


def calls() -> dict[str, Callable[[], object]]:
    """Name -> what to time."""
    ops = torch.ops.mfa
    query, key, value = (torch.randn(1, 8, 1, 64, device="mps") for _ in range(3))
    cache = [torch.randn(1, 8, 512, 64, device="mps") for _ in range(2)]
    length = torch.tensor([300], dtype=torch.int32, device="mps")
    host = [tensor.cpu() for tensor in (query, key, value)]
    nothing = (None, None, None, 0.125, None, None, 0.0)
    return {
        "torch, a CPU token": lambda: scaled_dot_product_attention(*host),
        "mfa.attention": lambda: mfa.attention(query, key, value),
        "torch.ops.mfa.attention": lambda: ops.attention(query, key, value),
        "attention_forward": lambda: ops.attention_forward(query, key, value, *nothing, 0.0, None),
        "attention_decode": lambda: ops.attention_decode(
            query, *cache, length, None, None, None, None, None, 0.125, None, None, 0.0, 0
        ),
    }


def main() -> None:
    stand_in.DRIVER.library.mfa_driver_set_execution(control.EXECUTIONS["nothing"])
    torch.set_num_threads(1)
    with torch.inference_mode():
        timers = {
            name: Timer("call()", globals={"call": call}, timer=time.thread_time) for name, call in calls().items()
        }
        runs: dict[str, list[Measurement]] = {name: [] for name in timers}
        for _ in range(ROUNDS):
            for name, timer in timers.items():
                runs[name].append(timer.blocked_autorange(min_run_time=SECONDS))
    microseconds = {name: 1e6 * Measurement.merge(run)[0].median for name, run in runs.items()}
    unit = next(iter(microseconds.values()))
    for name, cost in microseconds.items():
        print(f"{name:24}{cost:8.1f} us{cost / unit:7.2f}")


if __name__ == "__main__":
    main()
