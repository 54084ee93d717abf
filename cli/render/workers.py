"""Videos on Ray actors: one for each device, or for each gang of devices that render a video together."""

import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any

from ...lightforcing_core.fast_path import one_line
from ...lightforcing_core.parallel.group import process_group
from ..queue.prompt import UsageError
from .batch import Batch, Model
from .here import PATIENCE, device_of
from .jobs import RenderJob
from .renderer import MOST_TRIES, Renderer
from .store import Store

try:
    ray: Any = import_module("ray")
except ImportError as missing:
    raise ImportError('--engine ray needs Ray; install it with: pip install "ray>=2.40"') from missing

TICK = 0.5  # seconds between two looks at the board
AS_OFTEN_AS_NEEDED = {"max_restarts": -1, "max_task_retries": -1}  # a video that ends its worker 3 times fails


class Board:
    """The progress of all workers, which the driver reads."""

    def __init__(self) -> None:
        self._news: dict[str, tuple[int, int]] = {}

    def tell(self, name: str, done: int, total: int) -> None:
        self._news[name] = done, total

    def news(self) -> dict[str, tuple[int, int]]:
        news, self._news = self._news, {}
        return news


class Follower:
    """A rank of a gang other than its leader."""

    def __init__(self, model: Model, out: str) -> None:
        self._model, self._store, self._group = model, Store(out), ExitStack()

    def join(self, where: str, rank: int, size: int) -> None:
        group = self._group.enter_context(process_group(where, rank, size, device=device_of(), seconds=PATIENCE))
        self._renderer = Renderer(self._model, device_of(), group)

    def render(self, job: RenderJob) -> None:
        self._renderer.attempt(job, self._store)


class Worker:
    """Renders videos on one device, or leads a gang of `size` ranks that its placement group has resources for."""

    def __init__(self, model: Model, out: str, size: int, needs: Mapping[str, float]) -> None:
        self._model, self._out, self._size, self._needs = model, out, size, needs
        self._board = ray.get_actor(Board.__name__)
        self._store, self._group = Store(out), ExitStack()
        self._renderer: Renderer | None = None
        self._followers: list[Any] = []

    def render(self, job: RenderJob) -> tuple[str, dict[str, Any]]:
        """The job's name, and what `Renderer.attempt` returns."""
        on_chunk = partial(self._board.tell.remote, job.name)
        reason = ""
        for _ in range(MOST_TRIES):
            try:
                self._renderer = self._renderer or self._load()
                others = [follower.render.remote(job) for follower in self._followers]
                result = self._renderer.attempt(job, self._store, on_chunk)
                ray.get(others)
                return job.name, result
            except Exception as error:  # of one rank, so that the others are out of step
                reason = one_line(error)
                self._disband()
        return job.name, {"error": f"{self._size} ranks failed {MOST_TRIES} times: {reason}"}

    def _load(self) -> Renderer:
        device = device_of()
        if self._size == 1:
            return Renderer(self._model, device)
        with socket.socket() as free:
            free.bind(("", 0))
            where = f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        place = partial(_in_group, ray.util.get_current_placement_group())
        for rank in range(1, self._size):
            options = {**self._needs, "scheduling_strategy": place(rank)}
            follower = ray.remote(Follower).options(**options).remote(self._model, self._out)
            follower.join.remote(where, rank, self._size)
            self._followers.append(follower)
        joined = process_group(where, 0, self._size, device=device_of(), seconds=PATIENCE)
        return Renderer(self._model, device, self._group.enter_context(joined))

    def _disband(self) -> None:
        """End the gang; the next video is rendered by a new one."""
        for follower in self._followers:
            ray.kill(follower)
        self._renderer, self._followers = None, []
        self._group.close()


def render_with_ray(
    start: Callable[[], Batch], model: Model, out: str, size: int, address: str | None, workers: int | None
) -> bool:
    """Render a batch; whether all of it is done then.

    size: devices for each video. address: of a running cluster, None for one on this machine. workers: videos at once,
    None for as many as there are devices for. A lost worker is replaced, and its video continues after its last chunk.
    """
    batch = start()
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": paths}}
    with redirect_stdout(sys.stderr), ExitStack() as at_end:  # Ray's own messages
        at_end.callback(batch.display.progress.stop)
        ray.init(address=address, include_dashboard=None if address else False, **quiet)
        at_end.callback(ray.shutdown)
        has = ray.cluster_resources()
        kind = "GPU" if has.get("GPU") else "CPU"
        count = min(int(has[kind]) // size, workers or sys.maxsize, len(batch.todo))
        if batch.todo and not count:
            raise UsageError(f"--gpus-per-video {size} is more than the {has[kind]:g} {kind}s of the cluster")
        needs = {"num_cpus": 0, "num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        board = ray.remote(Board).options(name=Board.__name__, num_cpus=0).remote()
        pool = ray.util.ActorPool([_worker(model, out, size, kind, needs) for _ in range(count)])
        for job in batch.todo:
            pool.submit(lambda worker, job: worker.render.remote(job), job)
        while pool.has_next():
            try:
                batch.ended(*pool.get_next_unordered(timeout=TICK))
            except TimeoutError:
                for name, (done, total) in ray.get(board.news.remote()).items():
                    batch.progress(name, done, total)
    return batch.summary()


def _worker(model: Model, out: str, size: int, kind: str, needs: Mapping[str, float]) -> Any:
    group = ray.util.placement_group([{kind: 1}] * size, strategy="STRICT_PACK")
    options = {**needs, **AS_OFTEN_AS_NEEDED, "scheduling_strategy": _in_group(group, 0)}
    return ray.remote(Worker).options(**options).remote(model, out, size, needs)


def _in_group(group: Any, bundle: int) -> Any:
    return ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, bundle)
