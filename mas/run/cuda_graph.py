"""A training step captured in a CUDA graph: one launch where a small network needs hundreds.

At 32 px a GPU computes a step faster than the CPU can launch its kernels. A captured step is
replayed on the same memory: batches and the learning rate are copied in, losses are copied out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

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


class GraphedStep:
    """SGD steps of one network in training on batches of one shape.

    Weights, statistics and momentum are updated in place. Building it leaves the network as it was,
    and raises where the second of two replayed steps has other losses than run step by step.
    """

    def __init__(
        self, net: MultiTaskNet, batch: Batch, fl: FL, scale: float = 1.0,
        capture: Capture = capture_graph,
    ) -> None:  # fmt: skip
        self.lr = torch.zeros((), device=batch.image.device)
        self.optimizer = sgd(net.parameters(), self.lr, fl)
        self._batch = copy.deepcopy(batch)

        def step() -> Tensor:
            self.optimizer.zero_grad()
            forward = forward_tasks(net, self._batch)
            at_features = forward.backward_decoders()
            forward.features.backward(gradient_at_features(at_features, scale))
            self.optimizer.step()
            return forward.losses.detach()

        state = [(t, t.clone()) for t in net.state_dict().values()]

        def restore() -> None:
            with torch.no_grad():
                for tensor, kept in state:
                    tensor.copy_(kept)

        def second(run: Callable[[], Tensor]) -> Tensor:
            restore()
            self.begin(0.01)
            run()
            return run()

        try:
            self._replay, self._losses = capture(step)
            replayed, run = second(lambda: self(batch)), second(step).clone()
        finally:
            restore()
        torch.testing.assert_close(replayed, run, rtol=0.02, atol=1e-3)

    def begin(self, lr: float) -> None:
        """Start a client: this learning rate, no momentum."""
        self.lr.fill_(lr)
        for state in self.optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()

    def __call__(self, batch: Batch) -> Tensor:
        """One step on a batch of the same shape; returns its losses before the step, (n,)."""
        self._batch.image.copy_(batch.image)
        self._batch.mask.copy_(batch.mask)
        for a, target in self._batch.targets.items():
            target.copy_(batch.targets[a])
        self._replay()
        return self._losses.clone()


class CapturedSteps:
    """The captured steps of networks by the shape of their batches; handed to `local_update`.

    Called as (net, batch, fl, scale). None where capturing does not pay (no GPU, large batches)
    and, with a warning, where it fails.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[MultiTaskNet, dict] = WeakKeyDictionary()

    def __call__(
        self, net: MultiTaskNet, batch: Batch, fl: FL, scale: float
    ) -> GraphedStep | None:
        shape = batch.image.shape
        if not batch.image.is_cuda or shape[0] * shape[-1] ** 2 > PIXELS:
            return None
        known = self._of.setdefault(net, {})
        key = (*shape, fl.momentum, fl.weight_decay, scale)
        if key not in known:
            try:
                known[key] = GraphedStep(net, batch, fl, scale)
            except Exception as error:  # what a driver, card or version cannot capture
                warnings.warn(f"training without a CUDA graph: {error}", stacklevel=2)
                known[key] = None
        return known[key]
