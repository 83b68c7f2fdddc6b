"""From references to a diagnosis and to a page: what the command line does, for Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError
from fewbits.hub.references import check_model_ref
from fewbits.hub.requires import require
from fewbits.hub.sources import check_data_ref
from fewbits.papers.registry import check_name

if TYPE_CHECKING:
    from fewbits.diagnosis.bench import Subject

PAGE_FILE = "report.html"


def diagnose_reference(
    model: str | Path,
    *,
    recipe: str | None = None,
    bits: str | None = None,
    calib: str | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    data: str | None = None,
    samples: int | None = None,
    original: str | None = None,
    top: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    seqlen: int | None = None,
    code_module: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Rank the sites of a quantized checkpoint by what they cost, or those of a float model quantized by a recipe.

    Args:
        model: a checkpoint directory; or a model reference, then with `recipe` and `bits` (and `calib`, `options`,
            `seed`, `dtype`, `seqlen`) as in `quantize_reference`: it is quantized in memory.
        data: what to run on, by default the calibration data. samples: 64 by default, of token windows 8.
        original: the float model of a checkpoint, where its reference does not lead there any more.
        top: changes are tried at so many of the worst sites.

    Returns:
        See `fewbits.diagnosis.study.study`.

    Raises:
        FewbitsError: bad input, or settings of a recipe given for a checkpoint, which has its own.
    """
    _check(data, samples, top)
    if check_model_ref(model, code_module).kind == "fewbits":
        if recipe or bits or calib or options:
            raise FewbitsError(f"{str(model)!r} is quantized already: leave out --recipe, --bits, --calib and --set")
        subject = _checkpoint(Path(model), original, data, samples, device, code_module)
    else:
        if not recipe or not bits:
            raise FewbitsError(f"{str(model)!r} is a float model: say how to quantize it (--recipe and --bits)")
        if original:
            raise FewbitsError("--original is for checkpoints; this is a float model itself")
        check_name(recipe)
        if calib is not None:
            check_data_ref(calib)
        from fewbits.diagnosis.load import from_model

        subject = from_model(
            str(model), recipe, bits, calib=calib, options=options, data=data, samples=samples, seed=seed,
            device=device, dtype=dtype, seqlen=seqlen, code_module=code_module,
        )  # fmt: skip
    return _study(subject, top, show_progress)


def report_reference(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    samples: int | None = None,
    original: str | None = None,
    top: int = 8,
    device: str = "cpu",
    code_module: str | None = None,
    show_progress: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Diagnose a checkpoint and write it as one HTML file: (the file, the diagnosis).

    Arguments as `diagnose_reference`.

    out: by default `report.html` in the checkpoint's directory.

    Raises:
        FewbitsError: bad input; plotly is not installed; the file cannot be written.
    """
    _check(data, samples, top)
    if check_model_ref(folder, code_module).kind != "fewbits":
        raise FewbitsError(f"{str(folder)!r} is no checkpoint; `fewbits diagnose` takes float models")
    require("plotly", "a report")
    file = Path(out) if out is not None else Path(folder) / PAGE_FILE
    if not file.absolute().parent.is_dir():
        raise FewbitsError(f"{file}: its folder does not exist")
    from fewbits.report.page import page

    subject = _checkpoint(Path(folder), original, data, samples, device, code_module)
    diagnosis = _study(subject, top, show_progress)
    text = page(diagnosis, subject.report)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise FewbitsError(f"{file} cannot be written: {error.strerror}") from error
    return file, diagnosis


def _check(data: str | None, samples: int | None, top: int) -> None:
    if data is not None:
        check_data_ref(data)
    for name, value in (("samples", samples), ("top", top)):
        if value is not None and value < 1:
            raise FewbitsError(f"{name} {value}: at least 1 is needed")


def _checkpoint(
    folder: Path, original: str | None, data: str | None, samples: int | None, device: str, code_module: str | None
) -> Subject:
    from fewbits.diagnosis.load import from_checkpoint

    return from_checkpoint(
        folder, original=original, data=data, samples=samples, device=device, code_module=code_module
    )


def _study(subject: Subject, top: int, show_progress: bool) -> dict[str, Any]:
    from fewbits.diagnosis.study import study

    with _bar(show_progress) as progress:
        return study(subject, top=top, progress=progress)


@contextmanager
def _bar(show: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("diagnosing", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
