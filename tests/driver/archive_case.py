"""One process of tests/mps/test_archive.py, with the pipeline archive of $MFA_CACHE_DIR:

python -m driver.archive_case use [FAMILY [OS_MAJOR]]   one attention; reports what it compiled, as JSON
python -m driver.archive_case kill TIMES                children compile many kernels, and are killed while they do
"""

import json
import os
import random
import signal
import sys
import time

import torch

import mfa
from mfa import _metal, _native

from . import stand_in


def use(family: str = "7", system: str = "15") -> None:
    stand_in.DRIVER.library.mfa_driver_set_device(1, int(family), int(system), 0)
    query, key, value = (torch.randn(1, 2, 20, 64, device="mps") for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(query.cpu(), key.cpu(), value.cpu())
    error = (mfa.attention(query, key, value).cpu() - exact).abs().max().item()
    info = _metal.info() or {}
    report = {name: info[name] for name in ("archive", "pipelines_compiled", "notes")}
    sys.stdout.write(json.dumps({**report, "error": error, "findings": stand_in.DRIVER.findings()}))


def kill(times: str) -> None:
    generator = random.Random(0)
    for _ in range(int(times)):
        child = os.fork()
        if child == 0:
            write_for_ever()
        time.sleep(generator.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def write_for_ever() -> None:
    """Every kernel that is compiled is added to the archive, which is written anew."""
    sizes = {"query_length": 64, "key_length": 64}
    plans = [_native.plan(head_dim=dim, value_dim=dim, **sizes) for dim in range(4, 256, 4)]
    while True:
        _metal.precompile([launch for plan in plans for launch in plan.launches])
        _metal.clear_cache()


if __name__ == "__main__":
    {"use": use, "kill": kill}[sys.argv[1]](*sys.argv[2:])
