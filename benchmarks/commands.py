"""`lightforcing bench`: the commands that run the measurements, print their tables and write their JSON."""

from typing import Annotated

import typer

from .console import (
    Backend,
    Block,
    CudaGraphs,
    Device,
    Dtype,
    Height,
    Out,
    Repeats,
    Threads,
    Width,
    checked_cuda_graph,
    checked_dtype,
    integers,
    milliseconds,
    new_console,
    new_table,
    pair,
    prepare,
    ratio_text,
    show,
)

app = typer.Typer(no_args_is_help=True, help="Measure dense against sparse on this machine, both in one process.")


@app.command()
def attention(
    tokens_per_frame: Annotated[int, typer.Option(help="1536 is 512x768, 1560 is 480x832.")] = 1536,
    heads: Annotated[int, typer.Option(help="The 1.3B model has 12; 2 keep a CPU run short.")] = 12,
    block: Block = "64,64",
    sparsity: Annotated[
        float | None, typer.Option(help="One for every chunk; the published growth without it.")
    ] = None,
    chunks: Annotated[str, typer.Option(help='Chunks from 2 to 7, for instance "2,7", or "last".')] = "2,3,4,5,6,7",
    backend: Annotated[list[str] | None, typer.Option(help="A sparse backend, repeatable; all that can run.")] = None,
    repeats: Repeats = 5,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """One layer's self-attention, chunk by chunk of an 81-frame video: the kernel alone and with its selection."""
    place = prepare(device, threads)
    from .attention import CHUNKS, AttentionBench, run_attention

    bench = AttentionBench(
        tokens_per_frame=tokens_per_frame,
        heads=heads,
        block=pair(block),
        sparsity=sparsity,
        chunks=(CHUNKS,) if chunks == "last" else integers(chunks, "--chunks"),
        backends=tuple(backend) if backend else None,
        device=place,
        dtype=checked_dtype(dtype),
        repeats=repeats,
    )
    console = new_console()
    result = run_attention(bench, lambda row: console.print(f"chunk {row['chunk']} done", highlight=False))
    headings = ("backend", "with selection", "kernel", "ideal", "selection")
    table = new_table(
        "times as fast as the best dense attention", "chunk", *headings, "dense ms", "kernel ms", "whole ms"
    )
    for row in result["chunks"]:
        for name, ratios in row["ratios"].items():
            table.add_row(
                str(row["chunk"]),
                name,
                ratio_text(ratios["with_selection"]),
                ratio_text(ratios["kernel"]),
                f"{row['ideal_ratio']:.2f}x",
                f"{row['selection_share_of_dense']:.2%}",
                *(
                    milliseconds(row["arms"][arm])
                    for arm in (f"dense {row['best_dense']}", f"kernel {name}", f"whole {name}")
                ),
            )
    show(console, result, table, out)
    for name, reason in result["not_here"].items():
        console.print(f"not measured: {name} ({reason})", highlight=False, markup=False, soft_wrap=True)


@app.command()
def step(
    chunk: Annotated[str, typer.Option(help='Chunk from 2 to 7, or "last".')] = "last",
    layers: Annotated[
        int | None, typer.Option(help="30 on a GPU, 2 on a CPU, where 30 are reckoned from them.")
    ] = None,
    dim: Annotated[int, typer.Option(help="Width; 1536 is the 1.3B model's.")] = 1536,
    ffn_dim: Annotated[int, typer.Option(help="Feed-forward width; 8960 is the 1.3B model's.")] = 8960,
    height: Height = 512,
    width: Width = 768,
    block: Block = "64,64",
    backend: Backend = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="Measure both arms as CUDA graphs too.")] = False,
    repeats: Repeats = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """One forward of one chunk at real 1.3B shapes with random weights and a full cache, stage by stage."""
    place = prepare(device, threads)
    from .step import CHUNKS, REAL_LAYERS, StepBench, run_step

    bench = StepBench(
        chunk=CHUNKS if chunk == "last" else integers(chunk, "--chunk")[0],
        layers=layers or (REAL_LAYERS if place.startswith("cuda") else 2),
        dim=dim,
        ffn_dim=ffn_dim,
        height=height,
        width=width,
        block=pair(block),
        backend=backend,
        device=place,
        dtype=checked_dtype(dtype),
        repeats=repeats,
        cuda_graph=cuda_graph,
    )
    console = new_console()
    result = run_step(bench)
    names = list(dict.fromkeys(name for stages in result["stages"].values() for name in stages))
    table = new_table(f"one forward of {bench.layers} layers, chunk {bench.chunk}", "stage", "dense ms", "sparse ms")
    for name in names:
        table.add_row(name, *(f"{1e3 * result['stages'][arm].get(name, 0.0):.1f}" for arm in ("dense", "sparse")))
    table.add_row("whole forward", *(milliseconds(result["arms"][arm]) for arm in ("dense", "sparse")), style="bold")
    console.print(f"sparse forward: {ratio_text(result['ratio'])} as fast as dense", highlight=False)
    for name, found in result["graph_ratio"].items():
        console.print(f"{name} forward as a CUDA graph: {ratio_text(found)} as fast as without", highlight=False)
    show(console, result, table, out)
    if bench.layers != REAL_LAYERS:
        scaled = result["scaled_to_30_layers"]
        console.print(
            f"reckoned for {REAL_LAYERS} layers from {bench.layers}, not measured: dense {scaled['dense']:.2f} s, "
            f"sparse {scaled['sparse']:.2f} s",
            highlight=False,
        )


@app.command()
def rollout(
    frames: Annotated[int, typer.Option(help="Video frames, 1 + 4k: 81, 249, 961.")] = 81,
    arm: Annotated[
        str, typer.Option(help="Any of dense, sparse and even (sparse without growth, for flatness), with commas.")
    ] = "dense,sparse",
    setting: Annotated[str, typer.Option(help="short sees every frame; long has window 12 and one sink.")] = "short",
    decode: Annotated[bool, typer.Option(help="Decode every chunk too.")] = False,
    overlap: Annotated[
        bool, typer.Option(help="With --decode and one arm, on a GPU: decode beside the next chunk's sampling.")
    ] = False,
    cuda_graph: CudaGraphs = "auto",
    vae_dim: Annotated[int, typer.Option(help="Width of the VAE; 24 is LightVAE, 96 Wan's own.")] = 24,
    dim: Annotated[int, typer.Option(help="Model width, a multiple of 128.")] = 256,
    ffn_dim: Annotated[int, typer.Option(help="Feed-forward width.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 2,
    height: Height = 64,
    width: Width = 96,
    block: Block = "64,64",
    backend: Backend = "auto",
    dtype: Dtype = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Times that each video is made; seconds are their median.")] = 1,
    device: Device = None,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """A whole video with random weights, tiny unless told otherwise: seconds and peak memory of every chunk."""
    place = prepare(device, threads)
    from .rollout import RolloutBench, run_rollout

    bench = RolloutBench(
        frames=frames,
        arms=tuple(name.strip() for name in arm.split(",")),
        setting=setting,
        decode=decode,
        overlap=overlap,
        cuda_graph=checked_cuda_graph(cuda_graph),
        vae_dim=vae_dim,
        dim=dim,
        ffn_dim=ffn_dim,
        layers=layers,
        height=height,
        width=width,
        block=pair(block),
        backend=backend,
        device=place,
        dtype=checked_dtype(dtype),
        rounds=rounds,
    )
    console = new_console()
    with console.status("running") as status:
        result = run_rollout(bench, lambda done, total: status.update(f"chunk {done} of {total}"))
    table = new_table(
        f"{frames} frames, {bench.setting} setting", "chunk", *(f"{arm} ms" for arm in bench.arms), "peak MB"
    )
    rows = result["chunks"]
    for row in rows if len(rows) <= 21 else rows[::10]:
        times = (f"{1e3 * sum(row[arm].values()):.1f}" for arm in bench.arms)
        table.add_row(str(row["chunk"]), *times, f"{row['peak_bytes'] / 1e6:.1f}")
    for name, text in result["cuda_graphs"].items():
        console.print(f"CUDA graphs, {name}: {text}", highlight=False)
    for name, value in result.get("dense_over_sparse", {}).items():
        console.print(f"sparse is {value:.2f}x as fast as dense: {name.replace('_', ' ')}", highlight=False)
    if flatness := result.get("flatness"):
        early, late = flatness["chunks"]
        console.print(f"peak memory at chunk {late} / chunk {early}: {flatness['memory']:.4f}", highlight=False)
        for name in bench.arms:
            value = flatness[f"{name}_seconds"]
            console.print(f"{name}, seconds of the last 10 chunks / chunks 10-20: {value:.3f}", highlight=False)
    show(console, result, table, out)


@app.command()
def memory(device: Device = None, threads: Threads = None, out: Out = None) -> None:
    """What a run is expected to need against what it takes, for one configuration per part of it."""
    place = prepare(device, threads)
    from .memory import run_memory

    console = new_console()
    with console.status("running"):
        result = run_memory(device_name=place)
    table = new_table("peak memory", "run", "attention", "error", "estimated MB", "measured MB")
    for row in result["cases"]:
        sizes = (f"{row[size] / 1e6:.1f}" for size in ("estimated_bytes", "measured_bytes"))
        table.add_row(row["case"]["name"], row["backend"], f"{row['error']:+.1%}", *sizes)
    show(console, result, table, out)


@app.command()
def options(
    height: Height = 512,
    width: Width = 768,
    heads: Annotated[int, typer.Option(help="The 1.3B model has 12; 1 keeps a CPU run short.")] = 1,
    sparsity: Annotated[float, typer.Option(help="The share of key blocks that is skipped.")] = 0.88,
    block: Block = "64,64",
    sharpness: Annotated[float, typer.Option(help="Standard deviation of the scaled scores.")] = 2.0,
    backend: Backend = "auto",
    repeats: Repeats = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Each option beyond the published method: its error and its time on one attention over made-up fields."""
    place = prepare(device, threads)
    from .options import OptionsBench, run_options

    bench = OptionsBench(
        height=height,
        width=width,
        heads=heads,
        sparsity=sparsity,
        block=pair(block),
        sharpness=sharpness,
        backend=backend,
        device=place,
        dtype=checked_dtype(dtype),
        repeats=repeats,
    )
    console = new_console()
    with console.status("running") as status:
        result = run_options(bench, lambda name: status.update(f"{name} done"))
    headings = ("backend", "error against dense", "time over published", "dense over this")
    table = new_table(f"{sparsity:.0%} sparse, last chunk of 81 frames", "option", *headings)
    for name, row in result["arms"].items():
        times = (ratio_text(row[key]) for key in ("over_published", "dense_over_this"))
        table.add_row(name, row["backend"], f"{row['error']:.4f}", *times)
    show(console, result, table, out)
