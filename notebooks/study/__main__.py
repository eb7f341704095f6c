"""`python -m study`."""

import sys

from study.commands import main

sys.exit(main())
