"""Videos one after another on this machine, each by this process or by several."""

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ...lightforcing_core.parallel.group import process_group
from ...lightforcing_core.parallel.shares import Exchange
from .batch import Batch, Model
from .jobs import RenderJob
from .renderer import Renderer
from .store import Store

RESTARTS = 20  # of all ranks after one has ended
PATIENCE = 1800.0  # seconds that ranks wait for rank 0, which alone decodes and writes; an ended one is noticed at once

Start = Callable[[], Batch]  # makes the batch, in the process that shows its events


def render_here(start: Start, jobs: Sequence[RenderJob], model: Model, out: str, ranks: int) -> bool:
    """Render a batch; whether all of it is done then. Each of several `ranks` is a process of its own."""
    if ranks == 1:
        return _render(start, jobs, model, out, None)
    # Ranks that start again would read the addresses of those before from a store that outlives them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        1, 1, ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=RESTARTS, start_method="spawn"
    )
    try:
        done = elastic_launch(config, _rank)(start, jobs, model, out)[0]
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        raise OSError(
            f"the processes that render ended {RESTARTS} times; {error.get_first_failure()[1].message}"
        ) from error
    if isinstance(done, str):
        raise ValueError(done)
    return bool(done)


def _rank(start: Start, jobs: Sequence[RenderJob], model: Model, out: str) -> bool | str:
    """What `_render` returns, or why a model cannot be loaded, which would be no better after a restart."""
    with process_group(device=device_of(), seconds=PATIENCE) as group:
        try:
            return _render(start, jobs, model, out, group)
        except ValueError as error:
            return str(error)


def _render(start: Start, jobs: Sequence[RenderJob], model: Model, out: str, exchange: Exchange | None) -> bool:
    shows, store = exchange is None or exchange.rank == 0, Store(out)
    todo = [job for job in jobs if not store.has(f"{job.name}.mp4")]  # the same on all ranks, which begin together
    batch = start() if shows else None
    renderer = Renderer(model, device_of(), exchange) if todo else None
    for job in todo:
        assert renderer is not None
        if batch is None:
            renderer.attempt(job, store)
        else:
            batch.ended(job.name, renderer.attempt(job, store, partial(batch.progress, job.name)))
    return batch is None or batch.summary()


def device_of() -> torch.device:
    """The GPU of this process, or the CPU; Ray shows each actor its own GPU alone."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
