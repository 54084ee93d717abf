"""The command line of `lightforcing render`. Everything but its options is imported when it runs."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..queue.command import USAGE, complain


def render(
    prompts: Annotated[
        Path, typer.Argument(help="A text file with a prompt per line, or .jsonl; see docs/python-api.md.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the videos, or an address that fsspec reads, such as s3://…")],
    model: Annotated[str | None, typer.Option(help="A checkpoint; by default the demo model of the pack.")] = None,
    vae: Annotated[str | None, typer.Option(help="The model's VAE: LightVAE or Wan's own.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Every prompt with each of these seeds, like 1,2,5-8.")] = None,
    engine: Annotated[
        Literal["here", "ray"], typer.Option(help="One video after another in this process, or many with Ray.")
    ] = "here",
    gpus_per_video: Annotated[
        int, typer.Option(min=1, help="Devices, or processes on a CPU, that make each video together.")
    ] = 1,
    address: Annotated[str | None, typer.Option(help="The Ray cluster, such as auto; by default this machine.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Videos at once with Ray; by default as many as there are devices for.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Events on stdout, one JSON object per line.")] = False,
) -> None:
    """Render many videos, each once: run the same command again to continue after any interruption.

    A video appears whole. Chunks that were finished before a crash are kept and not made again.

    Exit codes: 0 all done, 1 some failed or left, 2 conflicting options, 130 interrupted.
    """
    from ..queue.jobs import read_seeds
    from ..queue.prompt import UsageError
    from .batch import Model, claim, start_batch
    from .jobs import read_jobs

    try:
        if (vae is None) == (model is not None and not Path(model).is_dir()):
            raise UsageError("--model FILE and --vae FILE go together; a demo model is a folder, or neither is given")
        if engine == "here" and (address or workers):
            raise UsageError("--address and --workers are for --engine ray")
        jobs = read_jobs(prompts, None if seeds is None else read_seeds(seeds))
        files = Model(model, vae)
        claim(jobs, files, out)
        start = partial(start_batch, jobs, out, json=json)
        if engine == "ray":
            from .workers import render_with_ray

            done = render_with_ray(start, files, out, gpus_per_video, address, workers)
        else:
            from .here import render_here

            done = render_here(start, jobs, files, out, gpus_per_video)
    except (UsageError, ImportError) as error:
        complain(str(error))
        raise typer.Exit(USAGE) from None
    raise typer.Exit(0 if done else 1)
