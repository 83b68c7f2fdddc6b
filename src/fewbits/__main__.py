"""`python -m fewbits`."""

from fewbits.cli import main

main()
