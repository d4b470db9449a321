"""``python -m subspace_peft`` is ``subspace-peft``."""

import sys

from .cli import main

sys.exit(main())
