"""FedProx (Li et al., 2020): clients are pulled towards the server's weights."""

from __future__ import annotations

from mas_core.config import FL
from mas_core.fedavg import FedAvg
from mas_core.models import MultiTaskNet, State


class FedProx(FedAvg):
    """Adds mu/2 |w - w_server|^2 to every client's loss, mu = `fl.prox_mu`."""

    measures = False

    def __init__(self, net: MultiTaskNet, fl: FL, state: State) -> None:
        super().__init__(net, fl, state)
        self.server = [(p, p.detach().clone()) for p in net.parameters() if p.requires_grad]

    def correct(self) -> None:
        for p, origin in self.server:
            p.grad.add_(p.detach() - origin, alpha=self.fl.prox_mu)
