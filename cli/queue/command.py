"""The command line of `lightforcing queue`. Everything but its options is imported when it runs."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

USAGE = 2  # the exit code for conflicting options, as typer's for unknown ones


def queue(
    workflow: Annotated[Path, typer.Argument(help="A workflow in API form (in ComfyUI: File, Export Workflow (API)).")],
    out: Annotated[Path, typer.Option(help="Folder for the run's files; in a batch, one folder for each prompt.")],
    server: Annotated[
        list[str] | None,
        typer.Option(help="Address, also https://user:password@host; without it http://127.0.0.1:8188."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.INPUT=VALUE", help="Change an input; NODE: id or title. Repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Batch: a text file with a prompt per line, or .jsonl (text, name, seed, set).")
    ] = None,
    prompt_node: Annotated[
        str | None,
        typer.Option(metavar="NODE[.INPUT]", help="Input for the text; default: the node that feeds positive."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Batch: every prompt with each of these seeds, like 1,2,5-8.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a prompt is cancelled as failed.")] = None,
    patience: Annotated[float, typer.Option(min=1.0, help="Seconds without an answer that end the batch.")] = 30.0,
    temp: Annotated[bool, typer.Option("--temp", help="Download the files of preview nodes too.")] = False,
    save_previews: Annotated[Path | None, typer.Option(help="Folder for the previews of the sampling.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Events on stdout, one JSON object per line.")] = False,
) -> None:
    """Run a workflow on a ComfyUI server and download its results. Ctrl-C cancels it there and exits 130.

    With --prompts or --seeds, run a batch: one folder per prompt, and a ledger of finished ones.
    Run the same command again to continue the batch; finished prompts do not run again.

    Exit codes: 0 all done, 1 some failed or left, 2 conflicting options, 130 interrupted.
    """
    from .batch import Batch
    from .display import Display
    from .jobs import make_jobs, read_prompts, read_seeds
    from .prompt import UsageError, read_override, read_workflow
    from .server import ComfyServer

    is_batch = prompts is not None or seeds is not None
    try:
        if server and len(server) > 1:
            raise UsageError(
                "--server is given more than once, but a batch runs on one server; start one command per server, each "
                "with its own --prompts and --out, or spread the work over machines with a scheduler such as Ray"
            )
        if prompt_node is not None and prompts is None:
            raise UsageError("--prompt-node sets the input for the lines of --prompts; give both, or use --set")
        prompt = read_workflow(workflow)
        lines = [{"name": "prompt"}] if prompts is None else read_prompts(prompts)
        numbers = None if seeds is None else read_seeds(seeds)
        changes = list(map(read_override, overrides or ()))
        display = Display(complain, single=not is_batch, json=json)
        address = server[0] if server else "http://127.0.0.1:8188"
        with closing(ComfyServer(address, patience=patience)) as comfy, display.progress:
            classes = [node["class_type"] for node in prompt.values()]
            info = comfy.object_info(classes) if changes or is_batch else {}
            jobs = make_jobs(prompt, info, overrides=changes, lines=lines, seeds=numbers, prompt_node=prompt_node)
            done = Batch(jobs, comfy, display, out, is_batch, timeout, temp, save_previews).run()
    except (UsageError, ImportError) as error:  # a SOCKS proxy in the environment needs a package
        complain(str(error))
        raise typer.Exit(USAGE) from None
    raise typer.Exit(0 if done and not display.anything_left_out else 1)


def complain(message: str) -> None:
    """Print one line to stderr, under the command's name."""
    from .prompt import printable

    typer.echo(f"lightforcing: {printable(message)}", err=True)
