"""What a run costs on this machine, from a few timed steps, and what it will write; for the command line and notebooks.

``estimate`` goes the path of a run (compose -> stages -> check -> build -> fit) in a temporary folder and stops the fit
after a few steps. Stages that have not run are stood in for by weights that have learned nothing.
"""

from hasten.estimate.cost import Cost, Estimate, as_text
from hasten.estimate.estimating import estimate

__all__ = ["Cost", "Estimate", "as_text", "estimate"]
