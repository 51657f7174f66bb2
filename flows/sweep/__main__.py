"""`python -m flows.sweep <key of sweeps>`: see `flows.sweep.flow`."""

import sys

from flows.sweep.flow import main

sys.exit(main())
