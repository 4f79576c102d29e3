"""Recording what the prefix of a computation returns, replaying it, and sending gradients back through it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_parcor.overriding import override, overriding, undo_at_end
from hf_parcor.prefix.consumers import Consumers, Place, Unkept
from hf_parcor.prefix.cut import CalledAgain, before_calls, not_inside_compiled
from hf_parcor.randomness import RandomStates

_REPLAYABLE = (Tensor, bool, int, float, str, type(None))


class PrefixFinished(BaseException):
    """Ends a run that only records the prefix."""


Rows = int | torch.Size | None
"""Which dimension of a tensor has the batch's rows; if none has, its shape when that was found out; None of others."""

Substitute = Callable[[nn.Module, int, Callable[[], Any]], Any]
"""Returns what a call of a module is to return: given the module, the number of the call and what would compute it."""


class PrefixReuse:
    r"""The outputs of modules that do not depend on the selected parameters, for the passes of one step.

    A first run records the prefix, and ends where the first selected parameter comes in. In the passes, which replay,
    the modules of the prefix compute nothing: they hand on what they returned, cut from its graph, the boundary. So
    the gradients of all passes add up there, and `backward` sends the sums through the prefix, once. With boundary b
    and prefix parameters θ this is exact:

    .. math:: \sum_k \frac{\partial L_k}{\partial b} \frac{\partial b}{\partial \theta}
        = \Big(\sum_k \frac{\partial L_k}{\partial b}\Big) \frac{\partial b}{\partial \theta}

    Dropout in the prefix keeps one mask in all passes. A module of the prefix runs its hooks in each pass, and with
    hooks of gradients it is computed in each. Hooks of modules inside of it run when it is computed.

    A pass over the first rows of a batch reuses what was recorded for all of them (`of_rows`): it gets their part, and
    its gradient gathers in their part of the boundary.

    Args:
        prefix: Modules whose calls end before the first of `starts` begins.
        starts: The modules where the selected parameters come in.
        again: Whether the rest of a run may call modules of the prefix again, and they compute then. False where they
            may have kept something for that, such as keys and values, which a replayed call does not: `CalledAgain`
            is raised then, as by a generation that ended at the first token when it was recorded, and goes on now.
    """

    forwards = 1
    """How often a step computes the prefix forward."""

    def __init__(self, prefix: Sequence[nn.Module], starts: Sequence[nn.Module], *, again: bool = True) -> None:
        self._again = again
        self.prefix = list(dict.fromkeys(prefix))
        self.starts = list(dict.fromkeys(starts))
        self.unused: set[Place] = set()
        """The outputs that are not kept, since nothing outside of the prefix consumes them."""
        self._hooks: list[int] = []  # that were there when this was found out
        self._inner_hooks: set[int] = set()
        self.runs_inner_hooks = False
        """Whether a replayed call also runs the forward hooks of modules inside, such as collect router logits."""
        self.rows: dict[Place, Rows] = {}
        """For passes over a part of the batch: where each output has its rows."""
        self._gradients = True
        self._checkpointed: bool | None = None
        self._devices: list[torch.device] | None = None
        self._consumers: Consumers | None = None
        self.forget()

    def forget(self) -> None:
        """Free what was recorded."""
        self._part: tuple[int, int] | None = None  # how many rows the pass sees, and of how many
        self._drawn: dict[tuple[nn.Module, int], RandomStates] = {}
        self._spared: set[Place] = set()
        self._ended: list[list[tuple[nn.Module, int]]] = []  # hooked calls inside of each call that is being recorded
        self._inner: dict[tuple[nn.Module, int], list[tuple[nn.Module, int]]] = {}
        self.recorded: dict[tuple[nn.Module, int], tuple[list[Any], Any]] = {}
        """What each call of a module of the prefix hands on."""
        self.calls: dict[nn.Module, int] = {}
        """How often each module of the prefix was called when it was recorded."""
        self.outputs: list[Tensor] = []
        """What the modules of the prefix returned, with its graph."""
        self.boundary: list[Tensor] = []
        """The same, cut from its graph: here the gradients of the passes add up."""
        self.precisions: set[torch.dtype] = set()
        """What the prefix computes in, inside of its modules too."""

    def replayed(self) -> list[nn.Module]:
        """Return the modules that compute nothing now, since what they returned was recorded."""
        return list(dict.fromkeys(module for module, _ in self.recorded))

    def hooked_inside(self) -> list[nn.Module]:
        """Return the modules inside of those of the prefix that have forward hooks; what is compiled has no inside."""
        inside = dict.fromkeys(inner for module in self.prefix for inner in not_inside_compiled(module))
        return [module for module in inside if module._forward_hooks and module not in self.prefix]

    @contextmanager
    def seen_by(self, consumers: Consumers) -> Iterator[None]:
        """Let it see which outputs a pass consumes that replays all of them."""
        with overriding(self, _consumers=consumers), ExitStack() as block:
            undo_at_end(block, consumers.leave)
            block.enter_context(consumers)
            yield

    def spare(self, unused: set[Place]) -> None:
        """Keep these outputs no longer, neither of what was recorded nor of what will be."""
        self.unused, self._hooks = unused, self._hooks_now()
        self._inner_hooks = {key for module in self.hooked_inside() for key in module._forward_hooks}
        spared = set()
        for (module, index), (kept, _) in self.recorded.items():
            for number, part in enumerate(kept):
                if isinstance(part, Tensor) and (module, index, number) in unused:
                    spared.add(id(part))
                    kept[number] = Unkept.of(part)
        places = [place for place, part in enumerate(self.boundary) if id(part) not in spared]
        self.outputs, self.boundary = (
            [tensors[place] for place in places] for tensors in (self.outputs, self.boundary)
        )

    def _hooks_now(self) -> list[int]:
        """Return the keys of all hooks that see what modules of the prefix take and return, or its gradients."""
        of_modules = [hooks for module in self.prefix for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        of_all = [nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks]
        of_gradients = [hooks for module in self.prefix for hooks in _backward_hooks(module)]
        return [key for hooks in [*of_modules, *of_all, *of_gradients] for key in hooks]

    @contextmanager
    def drawing_alike(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """Advance the generators at a replayed call as the recorded one did, so that a trial equals a full run.

        Args:
            devices: The accelerators that the model computes on.
        """
        with overriding(self, _devices=list(devices)):
            yield

    @contextmanager
    def recording(self, gradients: bool = True) -> Iterator[None]:
        """Keep what the prefix returns; the block ends where the first selected parameter comes in.

        Args:
            gradients: Whether gradients are to go back through the prefix; False keeps values alone.
        """
        self.forget()
        self._gradients = gradients
        # A hook that was not there before, as of a profiler or a logger, may look at all that it is given.
        self._spared = self.unused if self.unused and self._hooks_now() == self._hooks else set()

        def finish(module: nn.Module, arguments: Any) -> None:
            raise PrefixFinished

        try:
            with ExitStack() as hooks, self._substituted(self._record):
                for module in self.hooked_inside() if self.runs_inner_hooks else ():
                    self._substitute(hooks, module, self._record_inner)
                for module in self.starts:
                    before_calls(hooks, module, finish)
                yield
        except PrefixFinished as finished:
            finished.__traceback__ = None  # which holds the model; from Python 3.12 on, a frame that it holds holds it
        except BaseException:
            self.forget()
            raise

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Let the prefix return what was kept."""
        with self._substituted(self._replay):
            yield

    def begin(self, run: Callable[[], Any]) -> None:
        """Prepare the passes of a step, by a run of the model that ends early."""
        with self.recording():
            run()

    @contextmanager
    def of_rows(self, count: int, examples: int) -> Iterator[None]:
        """Let passes run on the first rows of the batch that was recorded; `find_rows` must have found its rows.

        Args:
            count: On how many.
            examples: Of how many.
        """
        with overriding(self, _part=None if count == examples else (count, examples)):
            yield

    @contextmanager
    def sharing(self, last: bool) -> Iterator[None]:
        """Let a pass of the step reuse the prefix.

        Args:
            last: Whether no other pass follows.
        """
        with self.replaying():
            yield

    def joined(self, objective: Tensor) -> Tensor:
        """Return the scalar whose backward ends a pass: here its objective."""
        return objective

    def backward(self, prepare: Callable[[], Tensor] | None = None) -> None:
        """Send the gradients that gathered at the boundary through the prefix, and free it.

        Args:
            prepare: Returns a scalar to be sent backward in the same run, for what waits for all gradients of it. With
                reentrant checkpoints it is called, and sent, after that run: they run backward by themselves, and what
                waits would take a gradient for final more than once.
        """
        reached = [i for i, leaf in enumerate(self.boundary) if leaf.grad is not None]
        ends = [self.outputs[i] for i in reached]
        gradients: list[Tensor | None] = [self.boundary[i].grad for i in reached]
        if prepare is not None and self._checkpointed is None:
            self._checkpointed = _has_reentrant_checkpoints(ends)
        if prepare is not None and not self._checkpointed:
            ends, gradients, prepare = [*ends, prepare()], [*gradients, None], None
        if ends:
            torch.autograd.backward(ends, gradients)
        self.forget()
        if prepare is not None:
            torch.autograd.backward(prepare())

    @contextmanager
    def _substituted(self, substitute: Substitute) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.prefix:
                self._substitute(stack, module, substitute)
            yield

    @staticmethod
    def _substitute(stack: ExitStack, module: nn.Module, substitute: Substitute) -> None:
        """Put a function in the place of a module's forward, which counts its calls; its hooks run as ever.

        Of a module that is compiled with its hooks, it takes the place of the whole call: no compiler sees it.
        """
        name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        forward, calls = getattr(module, name), 0

        def substituted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return substitute(module, calls - 1, lambda: forward(*args, **kwargs))

        override(stack, module, **{name: substituted})

    def _record(self, module: nn.Module, index: int, compute: Callable[[], Any]) -> Any:
        self.calls[module] = index + 1
        self._ended.append([])
        output = compute()
        inner = self._ended.pop()
        # Hooks of gradients hang on a graph from what a call takes to what it returns: with some, it is computed anew.
        handed_on = output if any(_backward_hooks(module)) else self._kept(module, index, output)
        if (module, index) in self.recorded:
            self._inner[module, index] = inner
            if self._devices is not None:
                self._drawn[module, index] = RandomStates(self._devices)
        return handed_on

    def _record_inner(self, module: nn.Module, index: int, compute: Callable[[], Any]) -> Any:
        handed_on = self._kept(module, index, compute())
        if (module, index) in self.recorded and self._ended:
            self._ended[-1].append((module, index))
        return handed_on

    def _kept(self, module: nn.Module, index: int, output: Any) -> Any:
        """Keep what a call returned, and return what it is to hand on."""
        parts, structure = tree_flatten(output)
        without_graph = self._gradients and not torch.is_grad_enabled()  # inside a reentrant checkpoint
        if without_graph or not all(isinstance(part, _REPLAYABLE) for part in parts):
            return output  # computed again in every pass
        self.precisions |= _precisions(parts)
        kept, handed_on = list(parts), list(parts)
        for number, part in enumerate(parts):
            if not isinstance(part, Tensor):
                continue
            if (module, index, number) in self._spared:
                kept[number] = Unkept.of(part)
                continue
            handed_on[number] = _copy(part)
            if part.requires_grad and self._gradients:
                kept[number] = part.detach().requires_grad_()
                self.outputs.append(part)
                self.boundary.append(kept[number])
        self.recorded[module, index] = kept, structure
        return tree_unflatten(handed_on, structure)

    def _replay(self, module: nn.Module, index: int, compute: Callable[[], Any]) -> Any:
        if not self._again and index >= self.calls.get(module, 0):
            raise CalledAgain(f"{type(module).__name__} is called again, for which it may have kept something")
        inner_calls = self._inner.get((module, index), [])
        if not all(self._can_hand_on(*call) for call in [(module, index), *inner_calls]):
            return compute()
        self._draw_alike(module, index)
        for inner, inner_index in inner_calls:
            output = self._handed_on(inner, inner_index)
            for key, hook in inner._forward_hooks.items():
                if key not in self._inner_hooks:
                    continue  # it came later, and may look at arguments, of which there are none
                replaced = (
                    hook(inner, (), {}, output) if key in inner._forward_hooks_with_kwargs else hook(inner, (), output)
                )
                output = output if replaced is None else replaced
        return self._handed_on(module, index)

    def _handed_on(self, module: nn.Module, index: int) -> Any:
        parts, structure = self.recorded[module, index]
        if self._part is not None:
            parts = [self._part_of(part, (module, index, number)) for number, part in enumerate(parts)]
        handed_on = copied(parts)
        if self._consumers is not None:
            self._consumers.hand_on(module, index, handed_on)
        return tree_unflatten(handed_on, structure)

    def _can_hand_on(self, module: nn.Module, index: int) -> bool:
        """Say whether all that a call returns is known, and of a part of the batch, which part of it that is."""
        if (module, index) not in self.recorded:
            return False
        if self._part is None:
            return True
        examples = self._part[1]
        parts, _ = self.recorded[module, index]
        places = [((module, index, number), part) for number, part in enumerate(parts) if isinstance(part, Tensor)]
        return all(_has_rows(part, self.rows.get(place), examples) for place, part in places)

    def _part_of(self, part: Any, place: Place) -> Any:
        """Return what the pass gets of an output that was recorded for the whole batch."""
        return part if self._part is None else first_rows(part, self.rows.get(place), *self._part)

    def _draw_alike(self, module: nn.Module, index: int) -> None:
        if (module, index) in self._drawn:
            self._drawn[module, index].put_back()


@contextmanager
def recording_together(prefixes: Sequence[PrefixReuse]) -> Iterator[None]:
    """Keep what several prefixes of one model return, values alone; the block ends where the last of them ends."""
    everything = PrefixReuse([module for prefix in prefixes for module in prefix.prefix], [])
    waiting = dict(enumerate(prefixes))

    def finish(index: int, module: nn.Module, arguments: Any) -> None:
        ended = waiting.pop(index, None)
        if ended is not None:
            # Not what is recorded later: a module of this prefix may be called again behind its end.
            ended.recorded, ended.calls = dict(everything.recorded), dict(everything.calls)
        if not waiting:
            raise PrefixFinished

    with everything.recording(gradients=False), ExitStack() as hooks:
        for index, prefix in waiting.items():
            prefix.forget()
            for module in prefix.starts:
                before_calls(hooks, module, partial(finish, index))
        yield


def _backward_hooks(module: nn.Module) -> list[dict[int, Any]]:
    of_all = [nn.modules.module._global_backward_pre_hooks, nn.modules.module._global_backward_hooks]
    return [module._backward_pre_hooks, module._backward_hooks, *of_all]


def _precisions(parts: Sequence[Any]) -> set[torch.dtype]:
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    under_autocast = {part.device.type for part in tensors if torch.is_autocast_enabled(part.device.type)}
    return {part.dtype for part in tensors} | {torch.get_autocast_dtype(device) for device in under_autocast}


def copied(parts: Sequence[Any]) -> list[Any]:
    """Return copies of what are tensors: whoever works in place must not change what later passes get."""
    return [_copy(part) if isinstance(part, Tensor) and type(part) is not Unkept else part for part in parts]


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy that lies in memory as its original does, since kernels round by how their operands lie."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return tensor.clone()
    repeated = [place for place, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[place] > 1]
    compact = tensor
    for place in repeated:
        compact = compact.narrow(place, 0, 1)
    copy = compact.clone()
    if copy.stride() != compact.stride():  # it has gaps
        copy = compact.new_empty_strided(compact.shape, compact.stride()).copy_(compact)
    return copy.expand(tensor.shape) if repeated else copy


def _has_reentrant_checkpoints(ends: Iterable[Tensor]) -> bool:
    """Say whether a graph has nodes that compute a part of it anew and run its backward by themselves."""
    waiting, seen = [end.grad_fn for end in ends], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if "Checkpoint" in type(node).__name__:  # PyTorch 2.11 refuses `name()` of what is written in Python
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False


def _has_rows(part: Tensor, rows: Rows, examples: int) -> bool:
    """Say whether a tensor has the rows of a batch where one of another batch had them."""
    if isinstance(rows, int):
        return rows < part.dim() and part.shape[rows] % examples == 0
    if rows is None or len(rows) != part.dim():
        return False
    # What had one entry for all examples, as a mask of a batch without padding, may have one for each now.
    return all(size == 1 for size, before in zip(part.shape, rows, strict=True) if before == 1)


def first_rows(part: Any, rows: Rows, count: int, examples: int) -> Any:
    """Return the part of a tensor that belongs to the first examples of a batch.

    Args:
        part: Of the whole batch.
        rows: The dimension that has them, or several for each example; else all of it is returned.
        count: How many examples.
        examples: Of how many.

    Examples:
        >>> first_rows(torch.arange(6), 0, count=1, examples=3)
        tensor([0, 1])
    """
    if not isinstance(rows, int):
        return part
    size = part.shape[rows] // examples * count
    return part.first(rows, size) if isinstance(part, Unkept) else part.narrow(rows, 0, size)
