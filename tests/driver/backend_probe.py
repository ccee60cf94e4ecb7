"""One process of tests/mps/test_backend.py: what the backend says of a device, as JSON.

python -m driver.backend_probe PRESENT FAMILY OS_MAJOR OS_MINOR [DEVICES [VARIANT]]
"""

import ctypes
import json
import sys

import torch

import mfa
from mfa import _metal

from . import stand_in


def main(present: str, family: str, major: str, minor: str, devices: str = "1", variant: str = "g") -> None:
    stand_in.DRIVER.library.mfa_driver_set_device(int(present), int(family), int(major), int(minor))
    stand_in.DRIVER.library.mfa_driver_set_device_count(int(devices))
    stand_in.DRIVER.library.mfa_driver_set_variant(ctypes.c_char(variant.encode()))
    info = _metal.info() or {}
    uses_unit = mfa.device_info().uses_matrix_unit
    query, key, value = (torch.randn(1, 2, 20, 64, device="mps") for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(query.cpu(), key.cpu(), value.cpu())
    try:
        result = (mfa.attention(query, key, value).cpu() - exact).abs().max().item()
    except RuntimeError as error:
        result = str(error)
    sys.stdout.write(
        json.dumps(
            {"info": info, "uses_matrix_unit": uses_unit, "result": result, "findings": stand_in.DRIVER.findings()}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
