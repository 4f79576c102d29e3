"""What the tests need: SciPy, and fractions as levels."""

from types import ModuleType


def scipy_special(purpose: str) -> ModuleType:
    """Return `scipy.special`, or say for what it is needed and how to get it.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        from scipy import special
    except ImportError as error:
        raise ImportError(
            f"SciPy is needed for {purpose}; install it with: pip install 'hf-parcor[statistics]'"
        ) from error
    return special


def fraction(name: str, value: float) -> float:
    """Return `value` if it lies strictly between 0 and 1, else raise `ValueError`."""
    if not 0 < value < 1:
        raise ValueError(f"expected 0 < {name} < 1, got {value}; pass a fraction, not percent")
    return value
