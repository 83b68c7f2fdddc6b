"""`fewbits bench MATRIX.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.errors import FewbitsError


def bench(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.yaml", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="rows.jsonl, table.md and leaderboard.html.")],
    variables: Annotated[
        list[str] | None,
        typer.Option("--var", metavar="NAME=VALUE", help="What ${NAME} in the matrix stands for; may be repeated."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs at a time (with --ray on a card: runs that share it).")] = 1,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Run on Ray: `local` for a cluster here, or `auto` to join one."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="By default as the matrix says.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Make the tables from the rows that exist.")] = False,
) -> None:
    """Run models x recipes x bits, and make the table. What is in DIR/rows.jsonl already is not run again."""
    from rich.console import Console

    from fewbits.bench.matrix import load_matrix
    from fewbits.bench.run import ROWS, read_rows, run_matrix

    if jobs < 1:
        raise FewbitsError(f"--jobs {jobs}: at least 1 is needed")
    pairs = [text.partition("=") for text in variables or []]
    wrong = [name for name, equals, _ in pairs if not equals or not name]
    if wrong:
        raise FewbitsError(f"--var {wrong[0]!r} is not of the form NAME=VALUE")
    loaded = load_matrix(matrix, {name: value for name, _, value in pairs}, device)
    console = Console(stderr=True)
    if table_only:
        known = {row["key"]: row for row in read_rows(out / ROWS)}
        rows = [known[cell.key] for cell in loaded.cells if cell.key in known]
        lacking = len(loaded.cells) - len(rows)
        if lacking:
            console.print(
                f"{lacking} of {len(loaded.cells)} runs of the matrix are not in {out / ROWS}", style="yellow"
            )
        write_tables(rows, out, loaded.title)
    else:
        rows = _run(loaded, out, jobs, ray, retry, console, run_matrix)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        console.print(f"{row['model']} {row['label']} {row['bits']}: {row['error']}", style="yellow", markup=False)
    console.print(f"{len(rows)} rows, {len(failed)} failed; {out / 'table.md'}, {out / 'leaderboard.html'}")


def _run(
    loaded: Any, out: Path, jobs: int, ray: str | None, retry: bool, console: Any, run_matrix: Any
) -> list[dict[str, Any]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with bar:
        task = bar.add_task("bench", total=len(loaded.cells))

        def arrived(row: dict[str, Any], done: int, of: int) -> None:
            rows.append(row)
            bar.update(task, completed=done, description=f"{row['model']} {row['label']} {row['bits']}")

        try:
            found: list[dict[str, Any]] = run_matrix(
                loaded, out, jobs=jobs, ray_address=ray, retry=retry, on_row=arrived
            )
        except KeyboardInterrupt:
            console.print(f"interrupted; the finished rows are in {out}, the same command goes on")
            raise typer.Exit(130) from None
    write_tables(found, out, loaded.title)
    return found


def write_tables(rows: list[dict[str, Any]], out: Path, title: str = "") -> None:
    """table.md and leaderboard.html in `out`, each whole or not at all."""
    import os

    from fewbits.bench.leaderboard import leaderboard
    from fewbits.bench.tables import cost_table, markdown

    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("table.md", markdown(rows) + "\n### What it costs\n\n" + cost_table(rows)),
        ("leaderboard.html", leaderboard(rows, title)),
    ):
        temporary = out / f".{name}.part"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / name)
