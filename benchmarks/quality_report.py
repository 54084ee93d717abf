"""Everything that `bench quality` writes besides its rows: quality.json, the table and the plots."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..lightforcing_core.demo.model import demo_video
from .quality import QualityBench, Row
from .quality_claims import summary
from .quality_pages import write_pages
from .record import facts, write


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
