"""Evaluation on the test split against the forward passes alone, on the same batches.

Evaluation gathers and decodes batches, runs the network and computes every task's loss; the
reference runs the network on batches that lie in memory.
"""

from pathlib import Path

import torch

from mas_core.data.clients import open_data
from mas_core.models import MultiTaskNet
from mas_core.records.evaluate import evaluate

from .scenes import prepared
from .timing import Row, compare, in_turns, main


def measure(quick: bool, folder: Path) -> list[Row]:
    preset, rooms = prepared(quick, folder)
    rows = []
    for tasks in ("sdnkt", "sdnkterca"):
        data = open_data(preset.data, rooms, tasks)
        net = MultiTaskNet(tasks, preset.model.size, preset.model.output_stride)
        net = net.to(memory_format=torch.channels_last)
        images = [b.image for b in data.evaluation("test", tasks, 64, "cpu")]
        subject, reference = f"{tasks}: evaluation, {preset.data.size} px", "forward passes alone"
        seconds = in_turns(
            {
                subject: lambda: evaluate(net, data.evaluation("test", tasks, 64, "cpu")),  # noqa: B023
                reference: lambda: _forward(net, images),  # noqa: B023
            },
            1 if quick else 5,
        )
        rows.append(compare(seconds, subject, reference, "time", "<= 1.10",
                            f"{sum(map(len, images))} images, losses included"))  # fmt: skip
    return rows


@torch.no_grad()
def _forward(net: MultiTaskNet, images: list[torch.Tensor]) -> None:
    net.eval()
    for image in images:
        net(image)


if __name__ == "__main__":
    main(measure)
