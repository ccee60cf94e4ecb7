"""One process of tests/mps/test_backend.py: compiles every kernel, and says for what source was compiled, as JSON.

python -m driver.sources_case FIRST        (this kernel, then the others in the catalogue's order)
"""

import json
import sys
from types import SimpleNamespace

from mfa import _metal, _native

from . import stand_in


def main(first: str) -> None:
    driver = stand_in.DRIVER
    (launch,) = _native.plan(head_dim=64, value_dim=64, query_length=64, key_length=64).launches
    names = [instance.name for instance in _native.catalogue() if not instance.path.startswith("unit")]  # no source
    kernels = [first, *(name for name in names if name != first)]
    compiled: dict[str, list[str]] = {}
    for kernel in kernels:
        before = len(driver.text("compiled_sources"))
        _metal.precompile([SimpleNamespace(kernel=kernel, constants=launch.constants)])  # type: ignore[list-item]
        compiled[kernel] = driver.text("compiled_sources")[before:]
    sys.stdout.write(json.dumps({"compiled": compiled, "findings": driver.findings()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
