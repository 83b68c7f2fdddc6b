"""`fewbits speed MODEL_OR_DIR`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewbits.commands import MODEL_HELP, Code, Device, Json


def speed(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help=MODEL_HELP, show_default=False)],
    bits: Annotated[
        str, typer.Option("--bits", help="What a float model is rounded to; a checkpoint has its own.")
    ] = "W4A16g128",
    device: Device = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the float model: float32 on a CPU, else bfloat16.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Samples at once.")] = 1,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens of the prompt, for language models.", show_default=False)
    ] = None,
    kernel: Annotated[
        str, typer.Option("--kernel", help="auto, or the name of one (triton, native, torch_int4 ... reference).")
    ] = "auto",
    code: Code = None,
    json_output: Json = False,
) -> None:
    """Time a model in floating point and packed on this machine: latency, memory, and what the machine could do."""
    from fewbits.speed.compare import speed_reference

    report = speed_reference(
        model, bits=bits, device=device, dtype=dtype, batch=batch, seqlen=seqlen, kernel=kernel, code_module=code
    )
    if json_output:
        from fewbits.hub.output import dumps

        typer.echo(dumps(report))
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fewbits.report.words import size

    console = Console()

    def line(text: str, **style: Any) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False, **style)

    machine, weights, memory = report["machine"], report["weights"], report["memory"]
    threads = "" if machine["threads"] is None else f", {machine['threads']} threads"
    line(f"{report['model']} on {machine['name']}{threads}, {report['dtype']}, batch {report['batch']}")
    line(
        f"measured limits: copy {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix product "
        f"{machine['gemm_flops'] / 1e12:.3g} TFLOP/s, cache {size(machine['cache_bytes'])}"
    )
    table = Table()
    for column in ("", "float ms", "packed ms", "speed-up", "bandwidth used", "arithmetic used"):
        table.add_column(column, justify="left" if not column else "right")
    for phase in report["phases"]:
        table.add_row(
            phase["phase"],
            f"{phase['float_ms']:.3g}",
            f"{phase['packed_ms']:.3g}",
            f"{phase['speedup']:.2f}x",
            *(f"{phase[f'float_of_{what}']:.0%} → {phase[f'packed_of_{what}']:.0%}" for what in ("bandwidth", "gemm")),
        )
    console.print(table)
    for which in ("float", "packed"):
        exceed = weights[f"{which}_exceed_cache"]
        where = "the cache's size is not known" if exceed is None else "exceed the cache" if exceed else "fit the cache"
        peak = memory[f"{which}_peak"]
        line(
            f"{which}: {size(memory[f'{which}_bytes'])} in memory, {size(weights[f'{which}_bytes'])} read a forward "
            f"({where}){'' if peak is None else f', peak {size(peak)}'}"
        )
    line(f"kernels: {', '.join(f'{name} in {count} layers' for name, count in report['kernels'].items())}")
    reasons: dict[str, str] = {}
    for layer in report["layers"].values():
        reasons.setdefault(layer["kernel"], f"{layer['site']}: {layer['kernel']}, {layer['why']}")
    for reason in reasons.values():
        line(f"  {reason}", style="dim")
    for site, why in report["skipped"].items():
        line(f"not packed: {site}: {why}", style="yellow")
    for verdict in report["verdict"]:
        line(verdict, style="bold")
    for note in report["notes"]:
        line(f"note: {note}", style="yellow")
