"""What a call costs the host: PYTHONPATH=tests python -m driver.host_cost

One query of one token on the stand-in `mps` device, whose driver checks and executes nothing: so all of the time is
that of the dispatcher, csrc/ and the stand-ins for Metal's calls. Beside it, in the same run, torch's own attention
on a CPU token. CPU time of the thread; medians of torch.utils.benchmark, from measurements that alternate. Then what a
call takes in counts (host_counts.py).
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Measurement, Timer

from . import control, host_counts, stand_in
from .calls import calls

ROUNDS, SECONDS = 10, 0.3


def main() -> None:
    stand_in.DRIVER.library.mfa_driver_set_execution(control.EXECUTIONS["nothing"])
    torch.set_num_threads(1)
    with torch.inference_mode():
        host = [torch.randn(1, 8, 1, 64) for _ in range(3)]
        measured = {"torch, a CPU token": lambda: scaled_dot_product_attention(*host), **calls()}
        timers = {
            name: Timer("call()", globals={"call": call}, timer=time.thread_time) for name, call in measured.items()
        }
        runs: dict[str, list[Measurement]] = {name: [] for name in timers}
        for _ in range(ROUNDS):
            for name, timer in timers.items():
                runs[name].append(timer.blocked_autorange(min_run_time=SECONDS))
    microseconds = {name: 1e6 * Measurement.merge(run)[0].median for name, run in runs.items()}
    unit = next(iter(microseconds.values()))
    for name, cost in microseconds.items():
        print(f"{name:24}{cost:8.1f} us{cost / unit:7.2f}")
    print(f"\n{'':24}" + "".join(f"{field:>10}" for field in host_counts.Counts._fields))
    for name, counts in host_counts.measure().items():
        print(f"{name:24}" + "".join(f"{count:10}" for count in counts))


if __name__ == "__main__":
    main()
