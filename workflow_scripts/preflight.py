"""Command line of stage `preflight`."""

import gc

# Collecting garbage takes a quarter of this program's seconds: after imports, and at its end.
gc.disable()

from lpovod.stages.preflight import preflight  # noqa: E402
from workflow_scripts import run  # noqa: E402

if __name__ == "__main__":
    run(preflight)
    gc.freeze()
