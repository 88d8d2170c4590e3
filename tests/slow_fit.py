"""The command line with a pause at each product, so that a test can end a process in the midst of a fit.

Where ``FIRST`` is in the environment, the first sum over the rows makes a file of that name and takes so long that a
test can end a process before the first step.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from softcurve.cli.main import main
from softcurve.fit.solver.curvature import Curvature
from softcurve.fit.solver.objective import Objective

if __name__ == "__main__":
    product = Curvature.__call__

    def paused(self, direction):
        time.sleep(0.1)
        return product(self, direction)

    Curvature.__call__ = paused
    if "FIRST" in os.environ:
        at = Objective.at

        def first(self, parameters, keep=None):
            Path(os.environ["FIRST"]).touch()
            time.sleep(1.5)
            return at(self, parameters, keep)

        Objective.at = first
    main()
