"""The kernels' source inside libmfa, for a machine without a metallib (cmake/embed_kernels.py)."""

import sys
from collections import Counter
from pathlib import Path

from mfa import _native

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "cmake"))

import embed_kernels  # type: ignore[import-not-found]  # noqa: E402


def test_every_kernel_of_the_catalogue_is_in_one_source() -> None:
    """But those of the matrix unit, which are never compiled at run time."""
    sources = [embed_kernels.inline(path, set()) for path in sorted((REPOSITORY / "metal").glob("*.metal"))]
    embedded = Counter(name for source in sources for name in embed_kernels.host_names(source))
    assert embedded == Counter(
        instance.name for instance in _native.catalogue() if not instance.path.startswith("unit")
    )
