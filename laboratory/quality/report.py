"""Everything that the laboratory writes besides its rows: quality.json, the table and the plots."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightforcing.benchmarks.record import facts, write
from lightforcing.lightforcing_core.demo.model import demo_video

from .bench import QualityBench, Row
from .claims import summary
from .pages import write_pages


def report(bench: QualityBench, folder: Path, rows: Sequence[Row]) -> tuple[dict[str, Any], list[Path]]:
    """The record, written to `folder`/quality.json, and all files that were written; from all rows of the folder."""
    arguments = {**asdict(bench), "models": bench.models.name, "seeds": list(bench.seeds)}
    found = {
        "bench": "quality",
        **facts(torch.device(bench.device), arguments),
        "video": asdict(demo_video(bench.models)),
        "rows": len(rows),
        **summary(rows),
    }
    write(folder / "quality.json", found)
    return found, [folder / "quality.json", *write_pages(folder, rows, found)]
