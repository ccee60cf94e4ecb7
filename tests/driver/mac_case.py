"""Parts of `make mac` on the software driver as an M5, with small problems: their results as JSON.

python -m driver.mac_case PART ...
"""

import json
import sys
from functools import partial

import mac_report
from mac_unit import metal, questions, variants

from . import stand_in


def main(*parts: str) -> None:
    driver = stand_in.DRIVER.library
    driver.mfa_driver_set_mode(0)  # an exception couldn't cross ctypes
    driver.mfa_driver_set_device(1, 10, 26, 2)
    metal.elapsed = lambda commands: 1e-3
    variants.DTYPES = ("f16",)
    questions.PROBLEM = questions.Problem(heads=1, length=128)
    questions.STEPS, questions.ROUNDS, questions.REPEATS = 3, 1, 1
    questions.SIMDGROUPS, questions.REGIONS = (4, 8), (4 << 10, 8 << 10)
    mac_report.seconds = lambda function: function() is None or 1e-3
    mac_report.PARTS["unit"] = partial(mac_report.unit, length=32)
    results = {name: mac_report.PARTS[name]() for name in parts}
    print(json.dumps({**results, "findings": stand_in.DRIVER.findings()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
