"""What a benchmark leaves: lines while it runs, a table at the end, and files."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import counted, timed

Row = timed.Row | counted.Row


def fields(row: Row) -> dict[str, Any]:
    """By name, those of its problem first."""
    return {**row.case._asdict(), **{name: value for name, value in row._asdict().items() if name != "case"}}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(fields, rows))


def write_json(path: Path, rows: Sequence[Row], environment: Mapping[str, Any]) -> None:
    report = {"environment": environment, "rows": list(map(fields, rows))}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def shown(rows: Iterable[Row], problems: int) -> Iterator[Row]:
    """The same rows, printed as they come, above a progress bar where there is rich and a terminal."""
    try:
        from rich.progress import Progress
    except ImportError:
        for row in rows:
            print(row, flush=True)
            yield row
        return
    with Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("problems", total=problems)
        seen = set()
        for row in rows:
            print(row, flush=True)
            seen.add((row.case, row.is_training))
            progress.update(task, completed=len(seen))
            yield row


def print_summary(rows: Sequence[timed.Row]) -> None:
    """A line per problem, a column per backend. Nothing without rich: the lines had it all."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return
    names = list(dict.fromkeys(row.backend for row in rows))
    table = Table("problem", "", *names, caption="ms, times as fast as sdpa, MB at the peak")
    faster = timed.speedups(rows)
    cells = {(row.case, row.is_training, row.backend): cell(row, faster[row]) for row in rows}
    for case, is_training in dict.fromkeys((row.case, row.is_training) for row in rows):
        texts = [cells.get((case, is_training, name), "") for name in names]
        table.add_row(str(case), "training" if is_training else "forward", *texts)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def cell(row: timed.Row, faster: float | None) -> str:
    if row.milliseconds is None:
        return "-"
    parts = [f"{row.milliseconds:.3g}", "" if faster is None else f"{faster:.2f}x"]
    parts.append("" if row.megabytes is None else f"{row.megabytes:.3g}")
    return "  ".join(parts)
