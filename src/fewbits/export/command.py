"""`fewbits export DIR --to TARGET`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.commands import DATA_HELP, Code, Json, parsed, show
from fewbits.export.targets import target_names


def export(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint made by `fewbits quantize`.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help=", ".join(target_names()) + ".", show_default=False)
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="By default DIR-TARGET beside it.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of the target; may be repeated.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help=f"Compare on this; by default on made-up inputs. {DATA_HELP}"),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="So many of it; by default 64.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Reload it there and compare.")] = True,
    code: Code = None,
    json_output: Json = False,
) -> None:
    """Write a quantized checkpoint in the form of another runtime, reload it there and compare with the simulation."""
    from fewbits.export.workflow import export_reference

    report = export_reference(
        folder, to, out=out, options=parsed(settings), data=data, samples=samples, check=check, code_module=code
    )
    show(report, json_output, "exported")
