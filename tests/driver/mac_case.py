"""Parts of `make mac` on the software driver as an M5, with small problems and few kernels: their results as JSON.

python -m driver.mac_case PART ...
"""

import json
import sys

import mac_report
from agx_check import instances
from mac_unit import metal, questions, variants

from . import stand_in


def main(*parts: str) -> None:
    driver = stand_in.DRIVER.library
    driver.mfa_driver_set_mode(0)  # an exception couldn't cross ctypes
    driver.mfa_driver_set_device(1, 10, 26, 2)
    metal.elapsed = lambda commands: 1e-3
    variants.DTYPES = ("f16",)
    all_variants = variants.of_question
    variants.of_question = lambda question: all_variants(question)[:1]
    questions.PROBLEM = questions.Problem(heads=1, length=128)
    questions.STEPS, questions.ROUNDS, questions.REPEATS = 3, 1, 1
    questions.SIMDGROUPS, questions.MOST, questions.REGIONS = (4, 8), 8, (4 << 10, 8 << 10)
    questions.PRODUCTS = [*questions.PRODUCTS[::3], questions.Product("f16_f16_f32", (16, 16, 16))]
    questions.SOURCES = "forward_f16.metal"
    all_pipelines = instances.pipelines
    instances.pipelines = lambda *, on_unit: [
        each for each in all_pipelines(on_unit=on_unit) if each.name.startswith("forward_f16")
    ]
    results = {name: mac_report.PARTS[name]() for name in parts}
    sys.stdout.write(json.dumps({**results, "findings": stand_in.DRIVER.findings()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
