"""`python -m data_tools ...` is `data-tools ...`."""

from data_tools.cli import main

raise SystemExit(main())
