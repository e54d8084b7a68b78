"""Three tasks of one's own on rendered rooms: luminance, saturation, distance to an edge.

The package is not touched: `TABLE` names the tasks, `open_rooms` makes their labels from images.
"""

from dataclasses import replace
from functools import partial

import torch
from scipy.ndimage import distance_transform_edt

from mas_core.data.clients import open_data
from mas_core.tasks import Batch, Task, TaskTable

TABLE = TaskTable(
    Task("l", "luminance", "rgb", "uint8x3", 1),
    Task("u", "saturation", "rgb", "uint8x3", 1),
    Task("g", "distance to the nearest edge", "rgb", "uint8x3", 1),
)


def luminance(image):
    """(B, 3, H, W) in [0, 1] -> (B, 1, H, W), Rec. 601."""
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def saturation(image):
    """Of hue, saturation, value: 1 - min/max over the channels."""
    high, low = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    return 1 - low / high.clamp(min=1e-6)


def edge_distance(image):
    """Pixels to the nearest step of luminance above 0.1, as a share of the image's height."""
    gray = luminance(image)
    steps = torch.zeros_like(gray)
    steps[..., 1:, :] = (gray[..., 1:, :] - gray[..., :-1, :]).abs()
    steps[..., 1:] = torch.maximum(steps[..., 1:], (gray[..., 1:] - gray[..., :-1]).abs())
    edges = (steps > 0.1).cpu().numpy()
    far = [distance_transform_edt(~e[0]) if e.any() else e[0] * 0.0 for e in edges]
    return torch.stack([torch.as_tensor(f)[None] for f in far]).to(image) / image.shape[-1]


LABELS = {"l": luminance, "u": saturation, "g": edge_distance}


def labelled(letters, batch):
    targets = {a: LABELS[a](batch.image) for a in letters}
    return Batch(batch.image, torch.ones_like(batch.mask), targets, TABLE)


class OwnLabels:
    """Clients whose images are those of prepared rooms and whose labels are made from them."""

    def __init__(self, rooms):
        self.rooms, self.count = rooms, rooms.count
        self.names, self.images, self.fingerprint = rooms.names, rooms.images, rooms.fingerprint

    def epoch(self, client, letters, *how):
        return map(partial(labelled, letters), self.rooms.epoch(client, "a", *how))

    def evaluation(self, split, letters, *how):
        return map(partial(labelled, letters), self.rooms.evaluation(split, "a", *how))


def open_rooms(data, folder, letters):
    """What `Data.source` names: the settings, the folder of the images and the tasks -> clients."""
    plain = replace(data, source="rooms", tasks="mas_core.tasks:TASKS")
    return OwnLabels(open_data(plain, folder, "a"))
