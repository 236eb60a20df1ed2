"""`python -m kdrl` is `kdrl`."""

from kdrl.cli import main

main()
