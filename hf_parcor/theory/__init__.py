"""What the two papers prove about parameter corruption, as formulas to compute with.

* `RandomCorruptionRatio`: how far a random corruption falls short of the worst one (Theorem 1).
* `first_order_maximum_loss_change`, `second_order_average_loss_change`: the two indicators (Theorem 1).
* `relative_error_exponent`, `gradient_corruption_relative_error`: how good the gradient-based
  corruption is (Theorem 2).
* `norm_ratio`, `generalization_complexity`, `generalization_remainder`: the generalization
  bound (Theorem 3).

"Paper 1" is Sun et al., "Exploring the Vulnerability of Deep Neural Networks: A Study of Parameter Corruption"
(AAAI 2021); "paper 2" is Zhang et al., "Adversarial Parameter Defense by Multi-Step Risk Minimization" (2021).
Where a printed formula or proof step is wrong, the docstring says so under "Slips".

Only `RandomCorruptionRatio` needs SciPy, and only when one of its methods is called.
"""

from hf_parcor.theory.error_bound import gradient_corruption_relative_error, relative_error_exponent
from hf_parcor.theory.generalization import generalization_complexity, generalization_remainder, norm_ratio
from hf_parcor.theory.indicators import first_order_maximum_loss_change, second_order_average_loss_change
from hf_parcor.theory.random_corruption import RandomCorruptionRatio

__all__ = [
    "RandomCorruptionRatio",
    "first_order_maximum_loss_change",
    "generalization_complexity",
    "generalization_remainder",
    "gradient_corruption_relative_error",
    "norm_ratio",
    "relative_error_exponent",
    "second_order_average_loss_change",
]
