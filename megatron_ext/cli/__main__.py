"""`python -m megatron_ext.cli`, where the console script is not installed."""

from megatron_ext.cli import main

main()
