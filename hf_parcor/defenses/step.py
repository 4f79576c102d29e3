"""One micro-batch of defended training: passes at `w + a_k` whose gradients add up to the gradient of the risk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from hf_parcor.corruptions import Corruption
from hf_parcor.defenses.adversarial_inputs import AdversarialInputs
from hf_parcor.distributed.dtensors import addresses_of, local_part, local_parts, of_first_rank
from hf_parcor.distributed.processes import TrainingProcesses
from hf_parcor.functional.ascent import RememberedAscent
from hf_parcor.functional.vectors import clones, working_copy, working_dtype
from hf_parcor.injection import CorruptionNorm, Injection, Multiple, Pieces
from hf_parcor.overriding import gradients_set_aside
from hf_parcor.prefix.consumers import UnkeptError
from hf_parcor.prefix.reuse import PrefixFinished, PrefixReuse

logger = logging.getLogger(__name__)

Objective = Callable[[Tensor], Tensor]
"""What a pass minimises, made from the loss of the batch: `lambda loss: loss / 2`, say."""


class DefendedStep:
    """The state of one micro-batch: the weights `w + a_k`, and the gradients of its passes.

    Used in a `with` block, after which the weights have their exact bits back, also after an exception, and every
    `.grad` holds what it held before plus the weighted sum of the gradients of all passes.

    The gradient of pass k serves twice: it is summed into the update and it makes `a_{k+1}`. It is the gradient of
    THIS micro-batch: what `.grad` accumulated before is set aside, and put back for the last pass, or when one fails:
    then `.grad` holds what it held before plus the gradients of finished passes, and perhaps parts of the failed one.

    Args:
        parameters: The selected parameters, `w`, by name.
        run_pass: `run_pass(objective, k)` runs forward and backward of `objective(L)` for pass k at the weights as
            they are, adding to `.grad`, and returns its value, detached. With k = −1 it is not run to its end.
        passes: How many passes there will be, so that the last one is known.
        others: All other trainable parameters, `θ`; their gradients accumulate, but for a probe.
        embedding: The model's input embedding, for defenses that perturb the inputs.
        prefix: What does not depend on `w`, to be run once for all passes; None runs all of the model in each.
        reduction: With a prefix on several processes: prepares the all-reduce of what the step leaves in `.grad`, and
            returns the graph to be sent backward for it along with the prefix.
        processes: All processes that take this step, for corruptions that they share; None if there is one.
        epoch: How many epochs of training are done, a fraction is fine. Default 0.
        merged: What adapters will add to parameters when they are merged: `corrupt` then corrupts the sums, and the
            adapters still add theirs in the pass. Default none.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        run_pass: Callable[[Objective, int], Tensor],
        passes: int,
        others: Iterable[torch.nn.Parameter] = (),
        embedding: torch.nn.Module | None = None,
        prefix: PrefixReuse | None = None,
        reduction: Callable[[], Tensor] | None = None,
        processes: TrainingProcesses | None = None,
        epoch: float = 0.0,
        merged: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters = parameters
        self._run_pass = run_pass
        self._passes = passes
        self._others = list(others)
        self._embedding = embedding
        self._prefix = prefix
        self._reduction = reduction
        self._processes = processes
        self.epoch = epoch
        self._merged = merged or {}
        self._inputs: AdversarialInputs | None = None
        self._injection = Injection(parameters)
        self._sum: dict[str, Tensor] = {}
        self._handed_back: list[tuple[torch.nn.Parameter, Tensor]] = []  # one of them, to see whether it stays
        self._fresh: dict[str, Tensor] = {}
        self._fresh_is_sum = False
        self._ascent: RememberedAscent | None = None
        self._waiting: list[dict[str, Tensor]] = []
        self.remembers = False
        """Whether gradients wait to be summed, as they are, until an ascent along them has ended (see `climb`)."""
        self._risk: list[Tensor] = []
        self.losses: list[Tensor] = []
        """The loss of each pass so far, without weight or penalty, detached."""

    @property
    def risk(self) -> Tensor:
        """The sum of what the passes so far minimised, detached."""
        return torch.stack(self._risk).sum()

    def backward(self, objective: Objective) -> None:
        """Run the next pass at `w + a_k`: it adds the gradient of `objective(L(w + a_k))` to the update."""
        last = len(self.losses) == self._passes - 1
        self._begin()
        if last:
            self._hand_back()
        self._risk.append(self._run(objective))
        if last and self._prefix is not None:
            self._prefix.backward(self._reduction)
        if not last:
            self._fresh = self._take_gradients()
            self._add_to_sum()

    def _add_to_sum(self) -> None:
        if self.remembers:
            self._fresh_is_sum = True
            self._waiting.append(dict(self._fresh))
            return
        self._fresh_is_sum = not self._sum
        self._add(self._fresh)

    def _add(self, gradients: dict[str, Tensor]) -> None:
        if not self._sum:  # no copies: what follows only reads them
            self._sum = dict(gradients)
            return
        known = [name for name in gradients if name in self._sum]
        if known:
            sums, parts = ([held[name] for name in known] for held in (self._sum, gradients))
            torch._foreach_add_(local_parts(sums), local_parts(parts))
        new = [name for name in gradients if name not in self._sum]
        self._sum.update(zip(new, clones([gradients[name] for name in new]), strict=True))

    def _end_ascent(self) -> None:
        """Let go of the ascent, and sum the gradients that it was remembered by, in their order."""
        self._ascent = None
        while self._waiting:
            self._add(self._waiting.pop(0))

    def probe(self, watch_inputs: bool = False) -> None:
        """Run the next pass at `w + a_k` for its gradient alone: the update does not get it.

        Args:
            watch_inputs: Find the gradient with respect to the inputs too, for `displace_inputs`.

        Raises:
            ValueError: The inputs are to be watched, and the step has no input embedding.
        """
        if watch_inputs and self._inputs is None:
            if self._embedding is None:
                raise ValueError("embedding: expected the model's input embedding, got None; hand it to DefendedStep")
            self._inputs = AdversarialInputs(self._embedding)
        self._begin()
        with gradients_set_aside([*self._others, *self._boundary()]):
            try:
                self._run(lambda loss: loss)
            finally:
                for tensor in self._boundary():  # which the pass itself may have recorded
                    tensor.grad = None
        self._fresh, self._fresh_is_sum = self._take_gradients(), False

    def _boundary(self) -> list[Tensor]:
        return [] if self._prefix is None else self._prefix.boundary

    def _begin(self) -> None:
        """Set aside what was accumulated before, and run the prefix."""
        if self.losses:
            return
        self._sum = self._take_gradients()
        self._run_prefix()

    def _run_prefix(self) -> None:
        if self._prefix is not None:

            def finish(loss: Tensor) -> Tensor:
                raise PrefixFinished

            self._prefix.begin(lambda: self._run_pass(finish, -1))

    def _run(self, objective: Objective) -> Tensor:
        ratio: list[Tensor] = []

        def seen(loss: Tensor) -> Tensor:
            for parameter, gradient in self._handed_back:
                if parameter.grad is not gradient:
                    raise ValueError(
                        "loss: expected one that is computed, and no more, got one that takes away the gradients of "
                        "earlier passes, as optimizer.zero_grad() does; call that before the step"
                    )
            value = objective(loss)
            ratio.append(torch.where(value.detach() == 0, 1.0, loss.detach() / value.detach()))
            return value if self._prefix is None else self._prefix.joined(value)

        index = len(self.losses)
        try:
            value = self._run_sharing(seen, index)
        except UnkeptError:
            if self._prefix is None or index or ratio:
                raise
            logger.warning(
                "reuse_prefix: the loss uses an output of the shared prefix that it did not use in the first step; "
                "from here on all outputs are kept, which takes more memory."
            )
            self._prefix.spare(set())
            self._run_prefix()
            value = self._run_sharing(seen, index)
        if not ratio:
            raise RuntimeError(
                "run_pass: expected a pass that hands its loss to the objective, got one that did not; a Trainer "
                "whose training_step does not call compute_loss cannot be defended"
            )
        if self._inputs is not None:
            self._inputs.end_pass()
        self.losses.append(value * ratio[0])  # the stock step may have divided both by the accumulation steps
        return value

    def _run_sharing(self, seen: Objective, index: int) -> Tensor:
        with nullcontext() if self._prefix is None else self._prefix.sharing(last=index == self._passes - 1):
            return self._run_pass(seen, index)

    def rehearse(self, see: Callable[[Tensor], None]) -> None:
        """Run one forward pass at the weights as they are, pass its loss to `see`, and keep nothing of it."""

        def finish(loss: Tensor) -> Tensor:
            see(loss)
            raise PrefixFinished

        with suppress(PrefixFinished):
            self._run_pass(finish, -1)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """All parameters that the step brings a gradient to: `w` and `θ`."""
        return [*self.parameters.values(), *self._others]

    @property
    def is_displaced(self) -> bool:
        """Whether a corruption is written into the weights, a zero one included."""
        return self._injection.is_active

    def narrow_gradients(self, of_all_processes: bool = False) -> dict[str, Tensor]:
        """Return the last pass's gradients as they are, only to be read.

        None of them, where one is not narrower than float32, or their mean over several processes is asked for:
        `gradients` returns those.
        """
        averaged = of_all_processes and self._processes is not None
        if averaged or any(gradient.dtype.itemsize >= 4 for gradient in self._fresh.values()):
            return {}
        taken, self._fresh = self._fresh, {}
        return taken

    def gradients_to_read(self, of_all_processes: bool = False) -> dict[str, Tensor]:
        """Return the last pass's gradients in the dtypes that they have, only to be read.

        Args:
            of_all_processes: As for `gradients`, which then makes those that are returned.
        """
        if of_all_processes and self._processes is not None:
            return self.gradients(of_all_processes)[0]
        taken, self._fresh = self._fresh, {}
        return taken

    def gradients(self, of_all_processes: bool = False) -> tuple[dict[str, Tensor], bool]:
        """Return the last pass's (weighted) gradients of the selected parameters, and whether to overwrite them.

        In float32 at least. Parameters that got none in this pass are absent. After a first pass they may be what
        the update is summed in, and must only be read.

        Args:
            of_all_processes: Return their mean over all processes: the gradient of the joined batch, weighted as DDP
                weighs the batches in the update. No parameter is absent then.
        """
        taken, self._fresh, ours = self._fresh, {}, not self._fresh_is_sum
        processes = self._processes if of_all_processes else None
        if processes is not None:  # which must average the same tensors: another may have what is absent here
            taken = {
                name: taken[name] if name in taken else torch.zeros_like(parameter, requires_grad=False)
                for name, parameter in self.parameters.items()
            }
        narrow = [name for name, gradient in taken.items() if gradient.dtype.itemsize < 4]
        if narrow:
            taken = {**taken, **dict(zip(narrow, working_copy([taken[name] for name in narrow]), strict=True))}
            ours = ours or len(narrow) == len(taken)
        if processes is not None:
            if not ours:
                taken, ours = dict(zip(taken, clones(list(taken.values())), strict=True)), True
            processes.average_(list(taken.values()))
        return taken, ours

    def agree_(self, update: Mapping[str, Tensor]) -> None:
        """Overwrite tensors that were drawn at random with those of the first process."""
        if self._processes is not None:
            self._processes.agree_(list(update.values()))

    def displace(
        self,
        update: Mapping[str, Tensor] | Pieces | Multiple,
        project: Callable[[list[Tensor]], None] | None = None,
        *,
        last_of: float | None = None,
    ) -> None:
        """Move the corruption, `a ← Π(a + u)`, and with it the weights; the tensors of u are the step's from here.

        Args:
            update: `u`.
            project: Π; None for none.
            last_of: Where the corruption is moved once and is zero before: the order of the norm that `withdraw` will
                be asked for. Of pieces and of a multiple nothing is kept then.
        """
        if isinstance(update, (Pieces, Multiple)) and last_of is not None and not self.is_displaced:
            self._injection.write(update, last_of)
        else:
            self._injection.displace(update, project, keep=True)

    def climb(self, radius: float, p: float, epsilon: float | None, *, last: bool) -> None:
        """Take a step along the last pass's gradient, `a ← Π(a + u)`, and write `w + a`; no a is kept.

        `remembers` must be set before the first pass, and nothing else move the weights.

        Args:
            radius: The norm of u, at most that of S in the first step.
            p: 2 or ∞.
            epsilon: The radius of S; None where the steps cannot leave it.
            last: Whether it is the last step: then what the ascent was remembered by is summed.
        """
        if self._ascent is None:
            self._ascent = RememberedAscent(list(self.parameters), p, epsilon)
        self._ascent.climb(self.gradients_to_read(), radius)
        self._injection.write(Pieces(self._ascent.pieces()), p if last else None)
        if last:
            self._end_ascent()

    @property
    def climbs(self) -> int:
        """How many steps `climb` has taken."""
        return 0 if self._ascent is None else len(self._ascent)

    def corrupt(
        self,
        corruption: Corruption,
        gradients: Mapping[str, Tensor] | None = None,
        *,
        shared: bool = False,
        p: float = 2.0,
    ) -> None:
        """Write a corruption of the clean weights in place of the last one: `w ⊕ corruption`.

        Args:
            corruption: The rule that chooses it. What is random is drawn with a new seed from PyTorch's global
                generator.
            gradients: Those at the clean weights, for a corruption along them; what is absent has none. They are read.
            shared: Whether all processes draw the same. Default False: each another, but for shards of one model.
            p: The order of the norm that `withdraw` will be asked for. Default 2.
        """
        self._injection.restore()
        generator = None
        if corruption.stochastic:
            seed = int(torch.randint(2**62, ()))
            if self._processes is not None:
                seed = self._processes.seed(seed, self._device, shared=shared)
            generator = torch.Generator(self._device).manual_seed(seed)
        weights: dict[str, Tensor] = dict(self.parameters)
        for name, change in self._merged.items():
            weights[name] = (weights[name].detach() + change).to(weights[name].dtype)  # as it will be stored
        pieces = corruption.pieces(weights, _AtCleanWeights(self.parameters, gradients or {}), generator)
        if pieces.replaces and self._merged:
            pieces = Pieces(((name, piece - self._merged.get(name, 0)) for name, piece in pieces), replaces=True)
        self._injection.write(pieces, p)

    def draw(self, count: int, *, shared: bool = False) -> int:
        """Return a number below `count`, drawn by PyTorch's global generator.

        Args:
            count: How many there are to choose from.
            shared: As for `corrupt`.
        """
        number = of_first_rank(torch.randint(count, ()), self.parameters.values())
        if shared and self._processes is not None:
            number = number.to(self._device)
            self._processes.agree_([number])
        return int(number)

    @property
    def _device(self) -> torch.device:
        return local_part(next(iter(self.parameters.values()))).device

    def displace_inputs(self, step_size: float, epsilon: float) -> None:
        """Move the inputs one step of this size along their gradient, each example inside its ball of epsilon.

        Raises:
            ValueError: No probe has watched the inputs.
        """
        if self._inputs is None:
            raise ValueError("displace_inputs: expected a probe before that watched the inputs, got none")
        self._inputs.displace(step_size, epsilon)

    def restore(self) -> None:
        """Restore the weights and the inputs; nothing to do is fine."""
        try:
            self._injection.restore()
        finally:
            if self._inputs is not None:
                self._inputs.withdraw()

    def withdraw(self, p: float) -> CorruptionNorm:
        """Restore the weights, and return the norm of the corruption that they last held."""
        return self._injection.withdraw(p)

    def _take_gradients(self) -> dict[str, Tensor]:
        """Return the gradients, each in memory of its own: they are going to be overwritten one by one.

        Raises:
            NotImplementedError: One is sparse.
        """
        taken = {}
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    raise NotImplementedError(
                        f"{name}: expected a dense gradient of what is defended, got {gradient.layout}; build the "
                        "embedding with sparse=False, or name it in exclude_modules"
                    )
                taken[name], parameter.grad = gradient, None
        if not taken:
            return taken
        seen = set(addresses_of([other.grad for other in self._others if other.grad is not None]))
        for name, address in zip(taken, addresses_of(list(taken.values())), strict=True):
            if address and address in seen:
                taken[name] = taken[name].clone()
            seen.add(address)
        return taken

    def _hand_back(self) -> None:
        self._end_ascent()
        for name, parameter in self.parameters.items():
            parameter.grad = self._sum.get(name)
        self._handed_back = [(self.parameters[name], gradient) for name, gradient in islice(self._sum.items(), 1)]
        self._sum = {}

    def __enter__(self) -> DefendedStep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.restore()
            if (self._sum or self._waiting) and error is not None:
                self._hand_back()
        finally:
            if self._prefix is not None:
                self._prefix.forget()


class _AtCleanWeights:
    """The gradient of one batch at the clean weights, for what is chosen along it alone; a `GradientSource`."""

    def __init__(self, parameters: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        self._parameters, self._known = parameters, known

    def __len__(self) -> int:
        return 1

    def over_data(self) -> Mapping[str, Tensor]:
        absent = {name: like for name, like in self._parameters.items() if name not in self._known}
        zeros = {
            name: torch.zeros_like(like, dtype=working_dtype([like]), requires_grad=False)
            for name, like in absent.items()
        }
        return {**self._known, **zeros}

    def on_next_batch(self, corruption: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotImplementedError(_ANOTHER_PLACE)

    def gradient_at(self, values: Mapping[str, Tensor], batches: int | None = None) -> Mapping[str, Tensor]:
        raise NotImplementedError(_ANOTHER_PLACE)

    def loss_at(self, values: Mapping[str, Tensor], batches: int | None = None) -> float:
        raise NotImplementedError(_ANOTHER_PLACE)


_ANOTHER_PLACE = "expected a corruption along the gradient at the clean weights, got one that asks for others"
