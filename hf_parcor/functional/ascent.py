"""An ascent that is remembered by its gradients: where it stands is made again, in turn, whenever it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hf_parcor.functional.constrained_maximum import factor_of_maximum, maximum_with_factor
from hf_parcor.functional.norms import euclidean_norm_of_bundles
from hf_parcor.functional.projections import factor_of_projection, project_
from hf_parcor.functional.vectors import Factor, in_turn, scaled


class RememberedAscent:
    """The point `a_k = Π(a_{k−1} + u_k)` with `a_0 = 0`, to the last bit as if it were kept, for p = 2 and ∞.

    (But for the sign of a zero that has moved nowhere.)

    `a` needs float32, 4 bytes a weight, where gradients of 16-bit weights have 2. So two steps are remembered in the
    memory of one `a`; what is made of them goes bundle by bundle, and takes the scratch of one of them.

    Args:
        names: All parameters, in the order of the vector.
        p: 2 or ∞.
        epsilon: The radius that Π projects onto; None where the steps cannot leave it.
        first_inside: Whether the first step is known to stay inside, and is not projected.
    """

    def __init__(self, names: list[str], p: float, epsilon: float | None, *, first_inside: bool = True) -> None:
        self._names, self._p, self._epsilon = names, p, epsilon
        self._projected_from = 1 if first_inside else 0
        self._steps: list[tuple[Mapping[str, Tensor], Factor]] = []
        self._shrinks: dict[int, Factor] = {}  # what Π multiplies by for p = 2, by the step

    def __len__(self) -> int:
        """Return how many steps it has taken."""
        return len(self._steps)

    def climb(self, gradients: Mapping[str, Tensor], radius: float) -> None:
        """Take a step of this length along gradients, which must stay as they are.

        Args:
            gradients: By name; a parameter that is absent does not move, though Π may shrink what it has.
            radius: α.
        """
        self._steps.append((gradients, factor_of_maximum(list(gradients.values()), self._p, radius)))
        index = len(self) - 1
        if self._is_projected(index) and self._p == 2 and self._epsilon is not None:
            self._shrinks[index] = Factor(factor_of_projection(euclidean_norm_of_bundles(self._lists), self._epsilon))

    def _is_projected(self, index: int) -> bool:
        return self._epsilon is not None and index >= self._projected_from

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `a` by name, and hold no tensor while the next bundle is made."""
        for bundle in self._bundles():
            for name in list(bundle):
                yield name, bundle.pop(name)
            del bundle

    def _lists(self) -> Iterator[list[Tensor]]:
        for bundle in self._bundles():
            yield list(bundle.values())
            del bundle  # before the next one is made

    def _bundles(self) -> Iterator[dict[str, Tensor]]:
        like = {name: gradient for gradients, _ in self._steps for name, gradient in gradients.items()}
        names = [name for name in self._names if name in like]
        for places in in_turn([like[name] for name in names]):
            yield self._made({names[place]: like[names[place]] for place in places})

    def _made(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        point: dict[str, Tensor] = {}
        for index, (gradients, factor) in enumerate(self._steps):
            moved = [name for name in like if name in gradients]
            update = dict(
                zip(moved, maximum_with_factor([gradients[name] for name in moved], self._p, factor), strict=True)
            )
            known = [name for name in moved if name in point]
            if known:
                torch._foreach_add_([point[name] for name in known], [update[name] for name in known])
            point |= {name: part for name, part in update.items() if name not in point}
            del update
            if index in self._shrinks:
                scaled(list(point.values()), self._shrinks[index], overwrite=True)
            elif math.isinf(self._p) and self._epsilon is not None and self._is_projected(index):
                project_(list(point.values()), self._p, self._epsilon)
        return {name: point[name] for name in like if name in point}
