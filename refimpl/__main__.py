"""`python -m refimpl` is `refimpl`."""

from refimpl.cli import main

raise SystemExit(main())
