"""The run on Flower equals the run on one machine, bit for bit. A job of its own: needs flwr."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason='needs Flower: pip install -e ".[flower]"')
pytest.importorskip("ray", reason='needs Flower\'s simulation: pip install -e ".[flower]"')
sys.path.insert(0, str(Path(__file__).parent))

import mas_flower  # noqa: E402

from mas.run import engine  # noqa: E402
from mas_core import methods  # noqa: E402
from mas_core.data.rooms.folder import ensure_rooms


def test_flower_gives_the_weights_groups_and_losses_of_one_machine(tmp_path):
    torch.set_num_threads(1)
    rooms = tmp_path / "rooms"
    rooms.mkdir()
    run = mas_flower.DEFAULTS | {"out": str(tmp_path / "flower"), "data": str(rooms)}
    study = mas_flower.study_of(run | {"out": str(tmp_path / "here")})
    folder = ensure_rooms(study.settings.data, rooms, progress=False)
    here = engine.run({"MAS": methods.merge_and_split(study, 2)}, study.store, folder, "cpu")["MAS"]

    mas_flower.simulate(run)

    found = json.loads((tmp_path / "flower" / "result.json").read_text())
    assert found["groups"] == list(here.groups)
    assert found["test_losses"] == here.losses_last
    R0 = study.settings.mas.merge_rounds
    branches = {t.tasks: study.store.checkpoint_path(t, "last")
                for t in map(study.from_all_in_one, here.groups)}  # fmt: skip
    trunk = {study.tasks: study.store.checkpoints(study.all_in_one())[R0]}
    for tasks, path in (trunk | branches).items():
        ours, theirs = load_file(path), load_file(tmp_path / "flower" / f"{tasks}.safetensors")
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype, name
            assert torch.equal(ours[name], theirs[name]), name
