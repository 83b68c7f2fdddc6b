"""What the commands of the command line share: their common options, and how a result is printed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewbits.errors import FewbitsError

MODEL_HELP = (
    "timm:NAME, torchvision:NAME, hf:NAME, demo:NAME, module:FILE.py:FUNCTION[:ARGUMENT], or a local directory "
    "of timm, torchvision, "
    "transformers, diffusers or fewbits."
)
DATA_HELP = (
    "A parquet file, image folder, .txt, .jsonl, .tsv or .csv file, a folder of one of these, "
    "hf-dataset:NAME[:CONFIG][:SPLIT] or demo:NAME."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="Floating-point type that the model is loaded in.")]
Code = Annotated[
    str | None,
    typer.Option(
        "--code",
        metavar="FILE.py:FUNCTION",
        help="Code that loads the model; it is called with MODEL.",
        show_default=False,
    ),
]
Seqlen = Annotated[
    int | None, typer.Option("--seqlen", help="Tokens of a window, for language models.", show_default=False)
]
Task = Annotated[
    str | None,
    typer.Option("--task", help="What to measure, where it should not follow from the model.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the recipe; may be repeated.", show_default=False),
]


def parsed(settings: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` strings as a dict."""
    options: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise FewbitsError(f"--set {setting!r} is not of the form KEY=VALUE")
        if key.strip() in options:
            raise FewbitsError(f"--set {key.strip()} is given twice")
        options[key.strip()] = value.strip()
    return options


def show(report: dict[str, Any], as_json: bool, view: str, **options: Any) -> None:
    """The report as one JSON object, or by the function of `fewbits.report.terminal` of that name."""
    if as_json:
        from fewbits.hub.output import dumps

        typer.echo(dumps(report))
        return
    from rich.console import Console

    from fewbits.report import terminal

    getattr(terminal, view)(report, Console(), **options)
