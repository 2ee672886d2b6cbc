"""Findings, and the files that hold them. Standard library alone; knows nothing of what is measured."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates.

    Attributes:
        copy_bytes_s: read and written bytes a second, of an array that is copied.
        stream_bytes_s: read bytes a second, of an array that is summed.
        matmul_flop_s: floating-point operations a second, of square matrices in bfloat16.
    """

    copy_bytes_s: float
    stream_bytes_s: float
    matmul_flop_s: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement or one check.

    Attributes:
        name: what was measured.
        figures: name of a column to a number or a text, in the order of the columns.
        failure: why it is wrong; None where nothing can be wrong, or nothing was.
    """

    name: str
    figures: dict[str, float | int | str]
    failure: str | None = None


@dataclasses.dataclass
class Part:
    """A table of the report; `Report.add` writes down how long it took [s]."""

    title: str
    rows: list[Row]
    wall_s: float = 0.0


class Report:
    """What was found, on disk after every part: a run that is cut off keeps what it has.

    Args:
        directory: gets report.json and report.md.
        header: about the machine and the run.
    """

    def __init__(self, directory: Path, header: dict[str, Any]):
        self.directory, self.header, self.parts = directory, header, []
        self._last_s = time.perf_counter()
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, part: Part) -> None:
        """Prints a part and saves all so far."""
        now_s = time.perf_counter()
        part.wall_s, self._last_s = now_s - self._last_s, now_s
        self.parts.append(part)
        sys.stdout.write(table(part) + "\n")
        sys.stdout.flush()
        document = self.header | {"parts": [dataclasses.asdict(part) for part in self.parts]}
        (self.directory / "report.json").write_text(json.dumps(document, indent=1) + "\n")
        lines = [f"- {name}: {value}" for name, value in self.header.items()]
        (self.directory / "report.md").write_text("\n".join([*lines, *map(table, self.parts)]) + "\n")

    def failures(self) -> list[str]:
        """Returns "part, row: reason" of everything that is wrong."""
        return [f"{part.title}, {row.name}: {row.failure}" for part in self.parts for row in part.rows if row.failure]


def share_of_ceiling(
    seconds: float, ceilings: Ceilings, *, num_bytes: float = 0.0, flop: float = 0.0
) -> dict[str, float | int | str]:
    """Returns the figures of something that took `seconds`: its rates, and its share of the larger of its two bounds."""
    bounds = {"stream": num_bytes / ceilings.stream_bytes_s, "matmul": flop / ceilings.matmul_flop_s}
    bound = max(bounds, key=lambda name: bounds[name])
    figures: dict[str, float | int | str] = {"us": seconds * 1e6, "GB/s": num_bytes / seconds / 1e9}
    if flop:
        figures["TFLOP/s"] = flop / seconds / 1e12
    return figures | {"ceiling": bound, "share of ceiling": bounds[bound] / seconds}


def table(part: Part) -> str:
    """Returns a part as Markdown."""
    columns = list(dict.fromkeys(column for row in part.rows for column in row.figures))
    lines = [f"\n## {part.title} ({part.wall_s:.0f} s)", "| " + " | ".join(["", *columns]) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for row in part.rows:
        cells = [_text(row.figures.get(column, "")) for column in columns]
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
        if row.failure:
            lines.append(f"\n**{row.name}: {row.failure}**\n")
    return "\n".join(lines)


def _text(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
