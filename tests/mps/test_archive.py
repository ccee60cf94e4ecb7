"""The archive of compiled pipelines on disk: later processes use it, and nothing that lies there can hurt them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from driver import process

from mfa import _library

pytestmark = [pytest.mark.mps, pytest.mark.usefixtures("stand_in")]


def use(cache: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """A process that calls attention, which must be right whatever the archive is."""
    environment["MFA_CACHE_DIR"] = str(cache)
    report: dict[str, Any] = json.loads(process.run("archive_case", "use", *arguments, **environment))
    assert report["error"] < 1e-5
    assert report["findings"] == []
    return report


@pytest.fixture(name="archives", scope="module")
def make_archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What a first process leaves, on an M1 and on an M3."""
    directory = tmp_path_factory.mktemp("archives")
    reports = [use(directory, family) for family in ("7", "9")]
    assert [report["pipelines_compiled"] for report in reports] == [1, 1]
    ours, foreign = (Path(report["archive"]) for report in reports)
    assert ours != foreign
    return ours, foreign


def test_the_second_process_compiles_nothing(archives: tuple[Path, Path]) -> None:
    report = use(archives[0].parent)
    assert report["pipelines_compiled"] == 0
    assert report["notes"] == []


def test_another_system_has_an_archive_of_its_own(archives: tuple[Path, Path]) -> None:
    report = use(archives[0].parent, "7", "16")
    assert report["pipelines_compiled"] == 1
    assert Path(report["archive"]) not in archives


def test_kernels_from_source_have_an_archive_of_their_own(archives: tuple[Path, Path], tmp_path: Path) -> None:
    bare = shutil.copy(_library.path_of("mfa"), tmp_path)  # without a metallib beside it
    first, second = (use(archives[0].parent, MFA_LIBRARY_UNDER_TEST=bare) for _ in range(2))
    assert first["archive"] == second["archive"]
    assert Path(first["archive"]) not in archives
    assert (first["pipelines_compiled"], second["pipelines_compiled"]) == (1, 0)


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "foreign"])
def test_a_bad_archive_is_built_anew(damage: str, archives: tuple[Path, Path], tmp_path: Path) -> None:
    ours, foreign = (file.read_bytes() for file in archives)
    half = len(ours) // 2
    bad = {
        "empty": b"",
        "truncated": ours[:half],
        "changed": ours[:half] + bytes([ours[half] ^ 1]) + ours[half + 1 :],
        "foreign": foreign,
    }
    file = tmp_path / archives[0].name
    file.write_bytes(bad[damage])
    report = use(tmp_path)
    assert report["pipelines_compiled"] == 1
    assert any(f"{file.name} is unusable, and is built anew" in note for note in report["notes"])
    assert file.read_bytes() == ours


def test_a_directory_that_cannot_be_written_is_only_noted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = use(tmp_path / "file")
    assert report["pipelines_compiled"] == 1
    assert any("can't be written" in note for note in report["notes"])


def test_a_killed_process_hurts_nobody(tmp_path: Path) -> None:
    process.run("archive_case", "kill", "40", MFA_CACHE_DIR=str(tmp_path))
    assert use(tmp_path)["notes"] == []  # what the last child left, if anything, is whole
