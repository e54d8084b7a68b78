"""A training step captured in a CUDA graph: one launch where a small network needs hundreds.

At 32 px a GPU computes a step faster than the CPU can launch its kernels. A captured step is
replayed on the same memory: batches and the learning rate are copied in, losses and affinities are
copied out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mas_core.affinity import measured_step
from mas_core.config import FL
from mas_core.local import sgd
from mas_core.models import MultiTaskNet, forward_tasks, gradient_at_features
from mas_core.tasks import Batch

PIXELS = 2**18  # batches below this are bound by launches: 256 images of 32 px, 4 of 256 px
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def capture_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record what `step` launches; returns what launches it again, and where its losses will lie.

    Before, the step runs three times on a side stream, so that gradients, momentum and the
    libraries' workspaces exist.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()
    return graph.replay, losses


def run_eagerly(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """The same contract without a graph, for comparison and for a CPU."""
    losses = step()
    return lambda: losses.copy_(step()), losses


def generator_state(like: Tensor) -> Tensor:
    """The state of the random generator that operations on a tensor's device draw from."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


class GraphedStep:
    """SGD steps of one network in training on batches of one shape; with `measure`, affinities too.

    Weights, statistics and momentum are updated in place. Building it leaves the network and the
    random generators as they were, and raises where the second of two replayed steps has other
    losses or affinities than run step by step, or where a step draws random numbers.
    """

    def __init__(
        self, net: MultiTaskNet, batch: Batch, fl: FL, scale: float = 1.0, measure: bool = False,
        capture: Capture = capture_graph,
    ) -> None:  # fmt: skip
        self.lr = torch.zeros((), device=batch.image.device)
        self.optimizer = sgd(net.parameters(), self.lr, fl)
        self._batch, self._n = copy.deepcopy(batch), len(net.tasks)

        def step(measured: bool) -> Tensor:  # losses, then affinities
            self.optimizer.zero_grad()
            forward = forward_tasks(net, self._batch)
            at_features, S = forward.backward_decoders(), self.lr.new_empty(0)
            if measured:
                S = measured_step(
                    net, self._batch, forward, at_features, self.lr, scale, fl.affinity
                )
            else:
                forward.features.backward(gradient_at_features(at_features, scale))
            self.optimizer.step()
            return torch.cat([forward.losses.detach(), S.flatten()])

        state = [(t, t.clone()) for t in net.state_dict().values()]

        def restore() -> None:
            with torch.no_grad():
                for tensor, kept in state:
                    tensor.copy_(kept)

        def second(run: Callable[[], Tensor]) -> Tensor:
            restore()
            self.begin(0.01)
            run()
            return run().clone()

        def run_eagerly_twice(run: Callable[[], Tensor]) -> Tensor:
            before = generator_state(batch.image)
            losses = second(run)
            if not torch.equal(before, generator_state(batch.image)):
                raise ValueError("a step draws random numbers, as dropout does")
            return losses

        self._captured, checks = {}, []
        try:
            with torch.random.fork_rng([batch.image.device] * batch.image.is_cuda):
                for measured in (False, True) if measure else (False,):
                    run = partial(step, measured)
                    self._captured[measured] = capture(run)
                    replayed = second(partial(self._replay, batch, measured))
                    checks.append((replayed, run_eagerly_twice(run)))
        finally:
            restore()
        for replayed, run in checks:
            torch.testing.assert_close(replayed, run, rtol=0.02, atol=1e-3, equal_nan=True)

    def begin(self, lr: float) -> torch.optim.SGD:
        """Start a client: this learning rate, no momentum; returns the optimiser of all steps."""
        self.lr.fill_(lr)
        for state in self.optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()
        return self.optimizer

    def __call__(
        self, batch: Batch, measured: bool, clock: Callable[[], float]
    ) -> tuple[Tensor, Tensor | None, float]:
        """One step on a batch of the same shape.

        Returns its losses before the step (n,) and, where measured, affinities (n, n) and the
        seconds of the whole step.
        """
        if not measured:
            return self._replay(batch, False).clone(), None, 0.0
        began = clock()
        losses, S = self._replay(batch, True).clone().split((self._n, self._n**2))
        return losses, S.view(self._n, self._n), clock() - began

    def _replay(self, batch: Batch, measured: bool) -> Tensor:
        self._batch.image.copy_(batch.image)
        self._batch.mask.copy_(batch.mask)
        for a, target in self._batch.targets.items():
            target.copy_(batch.targets[a])
        launch, found = self._captured[measured]
        launch()
        return found


class CapturedSteps:
    """The captured steps of networks by the shape of their batches; handed to `local_update`.

    Called as (net, batch, fl, scale, measure). None where capturing does not pay (no GPU, large
    batches) and, with a warning, where it fails.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[MultiTaskNet, dict] = WeakKeyDictionary()

    def __call__(
        self, net: MultiTaskNet, batch: Batch, fl: FL, scale: float, measure: bool
    ) -> GraphedStep | None:
        shape = batch.image.shape
        if not batch.image.is_cuda or shape[0] * shape[-1] ** 2 > PIXELS:
            return None
        known = self._of.setdefault(net, {})
        key = (*shape, fl.momentum, fl.weight_decay, scale, measure and fl.affinity)
        if key not in known:
            try:
                known[key] = GraphedStep(net, batch, fl, scale, measure)
            except Exception as error:  # what a driver, card or version cannot capture
                warnings.warn(f"training without a CUDA graph: {error}", stacklevel=2)
                known[key] = None
        return known[key]
