"""Make docs/demo.svg: the demo language model at 3 bits by rounding and by GPTQ, as the terminal shows it.

    python scripts/make_picture.py

Runs the two commands that the picture shows and records the reports that they print.
"""

from __future__ import annotations

import re
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console

from fewbits.report import terminal
from fewbits.workflow import quantize_reference

TARGET = Path("docs/demo.svg")
CALIBRATION, EVALUATION = "demo:text:calibration", "demo:text:evaluation"


def main() -> None:
    console = Console(record=True, width=110, file=StringIO(), force_terminal=True)
    for recipe in ("rtn", "gptq"):
        console.print(f"[green]$[/] fewbits quantize demo:text --recipe {recipe} --bits W3A16 ...", highlight=False)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            report = quantize_reference("demo:text", recipe, "W3A16", out=out, calib=CALIBRATION, eval_data=EVALUATION)
        terminal.quantized({**report, "out": f"out/{recipe}"}, console)
        console.print()
    picture = console.export_svg(title="fewbits")
    # The picture stands alone: fonts of the reader's machine, nothing fetched.
    picture = re.sub(r"@font-face\s*\{.*?\}", "", picture, flags=re.DOTALL)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(
        "\n".join(line.rstrip() for line in picture.splitlines() if line.strip()) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
