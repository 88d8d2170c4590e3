"""The command line with a pause at each product, so that a test can end a process in the midst of a fit."""

from __future__ import annotations

import time

from softcurve.app.cli import main
from softcurve.fit.solver.curvature import Curvature

if __name__ == "__main__":
    product = Curvature.__call__

    def paused(self, direction):
        time.sleep(0.1)
        return product(self, direction)

    Curvature.__call__ = paused
    main()
