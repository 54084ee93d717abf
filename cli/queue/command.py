"""The command line of `lightforcing queue`. Everything but its options is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

USAGE = 2  # the exit code for options that do not fit together, as typer's for options that it does not know


def queue(
    workflow: Annotated[Path, typer.Argument(help="A workflow in API form (in ComfyUI: File, Export Workflow (API)).")],
    out: Annotated[Path, typer.Option(help="Folder for the files that the run writes; in a batch, for a folder each.")],
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of the ComfyUI server, also https://user:password@host.",
            show_default="http://127.0.0.1:8188",
        ),
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
        typer.Option(metavar="NODE[.INPUT]", help="Where the text goes; else the prompt node that feeds positive."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Batch: every prompt once per seed, like 1,2,5-8; without it the seed stays.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Give a prompt up and cancel it after so many seconds.")] = None,
    patience: Annotated[
        float, typer.Option(min=1.0, help="Seconds without an answer after which the server counts as lost.")
    ] = 30.0,
    temp: Annotated[bool, typer.Option("--temp", help="Download the files of preview nodes too.")] = False,
    save_previews: Annotated[
        Path | None, typer.Option(help="Folder for the pictures that the server sends while it samples.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Events on stdout, one JSON object per line.")] = False,
) -> None:
    """Run a workflow on a ComfyUI server and download its results. Ctrl-C cancels it there and exits 130.

    With --prompts or --seeds it is a batch: a folder per prompt, and a ledger of which are done.
    Started again, the same command continues the batch; nothing that is done runs again.

    Exit codes: 0 all done, 1 some failed or left, 2 the options do not fit together, 130 interrupted.
    """
    from .batch import Request, run_queue
    from .prompt import UsageError

    servers = server or ["http://127.0.0.1:8188"]
    try:
        if len(servers) > 1:
            raise UsageError(
                "--server is given more than once, but a batch runs on one server; start one command per server, each "
                "with its own --prompts and --out, or spread the work over machines with a scheduler such as Ray"
            )
        options = (overrides or (), prompts, prompt_node, seeds, timeout, patience, temp, save_previews, json)
        code = run_queue(Request(workflow, out, servers[0], *options), complain)
    except UsageError as error:
        complain(str(error))
        code = USAGE
    raise typer.Exit(code)


def complain(message: str) -> None:
    """Print one line to stderr, under the command's name."""
    typer.echo(f"lightforcing: {message}", err=True)
