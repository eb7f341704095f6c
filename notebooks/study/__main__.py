"""`python -m lsgs_core.study`."""

import sys

from lsgs_core.study.commands import main

sys.exit(main())
