"""`fewbits report DIR` and `fewbits diagnose MODEL_OR_DIR`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.commands import DATA_HELP, MODEL_HELP, Code, Device, Dtype, Json, Seqlen, Settings, parsed, show

_Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help=f"By default the calibration data. {DATA_HELP}", show_default=False),
]
_Samples = Annotated[
    int | None,
    typer.Option("--samples", help="How many of it; by default 64, of token windows 8.", show_default=False),
]
_Original = Annotated[
    str | None,
    typer.Option("--original", metavar="MODEL", help="The float model, where it was moved since.", show_default=False),
]
_Top = Annotated[int, typer.Option("--top", help="At how many of the worst sites changes are tried.")]


def report(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint made by `fewbits quantize`.", show_default=False)
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE.html", help="By default DIR/report.html.", show_default=False),
    ] = None,
    data: _Data = None,
    samples: _Samples = None,
    original: _Original = None,
    top: _Top = 8,
    device: Device = "cpu",
    code: Code = None,
) -> None:
    """Write a page that says where the accuracy went, and what to do about it."""
    from fewbits.diagnosis.workflow import report_reference

    file, _ = report_reference(
        folder, out=out, data=data, samples=samples, original=original, top=top, device=device, code_module=code,
        show_progress=True,
    )  # fmt: skip
    typer.echo(f"written to {file}")


def diagnose(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help=MODEL_HELP, show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="For a float model: how it is quantized, in memory.", show_default=False),
    ] = None,
    bits: Annotated[str | None, typer.Option("--bits", help="W4A8 ...", show_default=False)] = None,
    calib: Annotated[
        str | None, typer.Option("--calib", metavar="DATA", help="Calibration data.", show_default=False)
    ] = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    data: _Data = None,
    samples: _Samples = None,
    original: _Original = None,
    top: _Top = 8,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seqlen: Seqlen = None,
    code: Code = None,
    json_output: Json = False,
) -> None:
    """Rank the sites that hurt most, with what to do about each, for a checkpoint or a model and a recipe."""
    from fewbits.diagnosis.workflow import diagnose_reference

    found = diagnose_reference(
        model, recipe=recipe, bits=bits, calib=calib, options=parsed(settings), seed=seed, data=data, samples=samples,
        original=original, top=top, device=device, dtype=dtype, seqlen=seqlen, code_module=code, show_progress=True,
    )  # fmt: skip
    show(found, json_output, "diagnosed")
