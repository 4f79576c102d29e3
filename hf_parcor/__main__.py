"""`python -m hf_parcor` is the command `hf-parcor`."""

import sys

from hf_parcor.cli import main

sys.exit(main())
