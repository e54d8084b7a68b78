"""A short seeded run of the campaign of faults, and that it would notice."""

import random

import pytest

from tests import faults


def test_a_short_campaign():
    campaign = faults.faults(600, seed=1, rounds=2)
    assert campaign.tried == {"kills": 2, "damaged files": 12, "command lines": 6}
    assert campaign.failed == []


@pytest.mark.parametrize("how", faults.DAMAGES)
def test_every_damage_changes_a_file(how, tmp_path):
    path = tmp_path / "rounds.csv"
    for seed in range(5):
        path.write_text("round,loss\n0,1.5\n1,1.25\n")
        faults.DAMAGES[how](path, random.Random(seed))
        assert not path.exists() or path.read_bytes() != b"round,loss\n0,1.5\n1,1.25\n"


def test_what_a_command_wrongly_accepts_is_noticed(tmp_path, monkeypatch):
    campaign = faults.Campaign(tmp_path, seed=0)
    monkeypatch.setattr(faults, "mas", lambda command: 1)
    campaign.damage()
    assert len(campaign.failed) == 1 and "exit 1" in campaign.failed[0]
