"""`python -m study`."""

import sys

from study.workflow.commands import main

sys.exit(main())
