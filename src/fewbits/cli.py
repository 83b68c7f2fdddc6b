"""The command line: `fewbits quantize | eval | export | report | diagnose | inspect | papers | bench`, all of it thin.

Errors are one red line on standard error and exit code 2; FEWBITS_DEBUG=1 shows the traceback. With `--json` exactly
one JSON object goes to standard output.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewbits.bench.command import bench
from fewbits.commands import (
    DATA_HELP,
    MODEL_HELP,
    Code,
    Device,
    Dtype,
    Json,
    Model,
    Seqlen,
    Settings,
    Task,
    parsed,
    show,
)
from fewbits.diagnosis.command import diagnose, report
from fewbits.errors import FewbitsError
from fewbits.export.command import export
from fewbits.speed.command import speed


class _Group(TyperGroup):
    """Shows a FewbitsError as one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except FewbitsError as error:
            if os.environ.get("FEWBITS_DEBUG", "") not in ("", "0"):
                raise
            _complain(str(error))
            sys.exit(2)


app = typer.Typer(
    cls=_Group,
    name="fewbits",
    help="Post-training quantization of PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: its rich one takes half a second of imports
    context_settings={"help_option_names": ["-h", "--help"]},
)
papers_app = typer.Typer(
    help="The papers that fewbits knows, and their recipes.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(papers_app, name="papers")
app.command("bench")(bench)
app.command("export")(export)
app.command("report")(report)
app.command("diagnose")(diagnose)
app.command("speed")(speed)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fewbits {version('fewbits')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


@app.command("quantize")
def _quantize(
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="A paper's name, or several joined: smoothquant+gptq. See `fewbits papers`.",
            show_default=False,
        ),
    ],
    bits: Annotated[
        str,
        typer.Option("--bits", help="W4A8: 4-bit weights, 8-bit activations; W4A16, W3A16g128 ...", show_default=False),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where the checkpoint goes: a directory that is not there yet.",
            show_default=False,
        ),
    ],
    calib: Annotated[
        str | None, typer.Option("--calib", metavar="DATA", help=f"Calibration data. {DATA_HELP}", show_default=False)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Calibration samples; by default as the recipe says.", show_default=False),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option("--eval", metavar="DATA", help="Measure before and after on this data.", show_default=False),
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option("--eval-samples", help="The first so many; by default all.", show_default=False)
    ] = None,
    settings: Settings = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="RUNTIME",
            help="Grids that this runtime has: onnxruntime, openvino, compressed-tensors, gptq, awq, gguf, torch.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Calibration samples and everything random in the recipe.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="By default as the recipe says.", show_default=False)
    ] = None,
    seqlen: Seqlen = None,
    task: Task = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run to the same --out.")] = False,
    with_report: Annotated[
        bool, typer.Option("--report", help="Also write DIR/report.html: where the accuracy went (fewbits report).")
    ] = False,
    float_metric: Annotated[
        str | None,
        typer.Option("--float-metric", metavar="FILE", help="Keeps the metric before, for further runs.", hidden=True),
    ] = None,
    code: Code = None,
    json_output: Json = False,
) -> None:
    """Quantize a model and write the checkpoint."""
    options = parsed(settings)
    if target is not None:
        options.setdefault("target", target)
    from fewbits.workflow import quantize_reference

    made = quantize_reference(
        model,
        recipe,
        bits,
        out=out,
        calib=calib,
        samples=samples,
        eval_data=eval_data,
        eval_samples=eval_samples,
        task=task,
        options=options,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seqlen=seqlen,
        resume=resume,
        code_module=code,
        show_progress=True,
        with_report=with_report,
        float_metric=float_metric,
    )
    show(made, json_output, "quantized")


@app.command("eval")
def _eval(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help=MODEL_HELP, show_default=False)],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=DATA_HELP, show_default=False)],
    task: Task = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="The first so many; by default all.", show_default=False)
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which file of a folder, or split of a data set.", show_default=False)
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_size: Annotated[int | None, typer.Option("--batch-size", show_default=False)] = None,
    seqlen: Seqlen = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Tokens between two windows; by default --seqlen.", show_default=False),
    ] = None,
    code: Code = None,
    json_output: Json = False,
) -> None:
    """Measure a model, or a checkpoint made by `fewbits quantize`."""
    from fewbits.workflow import evaluate_reference

    measured = evaluate_reference(
        model,
        data,
        task,
        samples=samples,
        split=split,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seqlen=seqlen,
        stride=stride,
        code_module=code,
        show_progress=True,
    )
    show(measured, json_output, "measured")


@app.command("inspect")
def _inspect(
    model: Model,
    code: Code = None,
    relations: Annotated[
        bool, typer.Option("--relations/--no-relations", help="Which channels are tied to which.")
    ] = True,
    json_output: Json = False,
) -> None:
    """Show the units, sites and relations that fewbits sees in a model."""
    from fewbits.workflow import inspect_reference

    show(inspect_reference(model, code_module=code, relations=relations), json_output, "inspected")


@papers_app.callback()
def _papers(
    context: typer.Context,
    family: Annotated[str | None, typer.Option("--family", show_default=False)] = None,
    json_output: Json = False,
) -> None:
    """List the papers."""
    if context.invoked_subcommand is None:
        _list_papers(family, json_output)


@papers_app.command("list")
def _papers_list(
    family: Annotated[str | None, typer.Option("--family", show_default=False)] = None, json_output: Json = False
) -> None:
    """List the papers by family, with whether their recipe is implemented."""
    _list_papers(family, json_output)


@papers_app.command("show")
def _papers_show(
    slug: Annotated[str, typer.Argument(show_default=False)],
    lang: Annotated[str, typer.Option("--lang", help="en or zh")] = "en",
    json_output: Json = False,
) -> None:
    """Show a paper's entry and recipe."""
    if lang not in ("en", "zh"):
        raise FewbitsError(f"language {lang!r}: choose en or zh")
    from fewbits.workflow import describe_paper

    show(describe_paper(slug), json_output, "paper", lang=lang)


def _list_papers(family: str | None, as_json: bool) -> None:
    from fewbits.workflow import list_papers

    show(list_papers(family), as_json, "papers")


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"error: {' '.join(message.split())}", style="red"), soft_wrap=True)


def main() -> None:
    """Entry point of the `fewbits` command."""
    app()


if __name__ == "__main__":
    main()
