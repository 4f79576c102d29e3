"""Is one training method better than another? Mean, spread and quantiles of repeated runs, t-tests, Holm's correction.

Paper 2 ("Adversarial Parameter Defense by Multi-Step Risk Minimization", Appendix C) runs every method three times and
tests "Proposed ≤ Baseline" with Student's one-sided t-test: `student_t_test(proposed, baseline)` here.

SciPy is needed for probabilities and quantiles: `pip install "hf-parcor[statistics]"`.
"""

from hf_parcor.statistics._requirements import scipy_special
from hf_parcor.statistics.multiple_comparisons import holm_correction
from hf_parcor.statistics.quantiles import QuantileWithInterval
from hf_parcor.statistics.summary import MeanAndSpread
from hf_parcor.statistics.t_tests import Alternative, TTest, student_t_test, welch_t_test

__all__ = [
    "Alternative",
    "MeanAndSpread",
    "QuantileWithInterval",
    "TTest",
    "holm_correction",
    "scipy_special",
    "student_t_test",
    "welch_t_test",
]
