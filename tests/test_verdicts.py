"""How the notebooks judge a claim, and which training times they compare."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))
import common  # noqa: E402


@pytest.mark.parametrize(
    ("effects", "least", "verdict", "text"),
    [
        ([[1.5], [1.2]], 0, common.HOLDS, "1.50 (one seed: no spread)"),
        ([[-1.5], [-1.2]], 0, common.FAILS, "-1.50 (one seed: no spread)"),
        ([[0.9], [0.9]], 0, common.OPEN, "0.90 (one seed: no spread)"),  # noise
        ([[1.5], [3.2]], 0, common.OPEN, "1.50 (one seed: no spread)"),  # the judges differ more
        ([[12.0], [13.0]], 10, common.HOLDS, "12.00 (one seed: no spread)"),
        ([[1.0]], 0.999, common.HOLDS, "1.00 (one seed: no spread)"),  # a share, not a loss
        # Student's t, one-sided 95 %: 6.31 standard errors for two seeds, 2.92 for three.
        ([[0.9, 1.1]], 0, common.HOLDS, "1.00 ± 0.14 (2 seeds)"),
        ([[0.8, 1.2]], 0, common.OPEN, "1.00 ± 0.28 (2 seeds)"),
        ([[0.5, 1.0, 1.5]], 0, common.HOLDS, "1.00 ± 0.50 (3 seeds)"),
        ([[0.4, 1.0, 1.6]], 0, common.OPEN, "1.00 ± 0.60 (3 seeds)"),
        ([[0.5, 1.0, 1.5]], 2, common.FAILS, "1.00 ± 0.50 (3 seeds)"),
        ([[]], 0, "not on record", ""),
    ],
)
def test_a_claim_is_judged_against_noise(effects, least, verdict, text):
    assert common.judge(*(pd.Series(e, dtype=float) for e in effects), least=least) == (
        verdict, text
    )  # fmt: skip


def test_times_of_one_run_come_before_those_of_the_records(tmp_path):
    runs = pd.DataFrame({"method": ["one-by-one", "MAS-2"], "task_set": "dk", "seed": 0,
                         "minutes": [6.0, 2.0]})  # fmt: skip

    def faster(preset="small", overrides=None, worse="one-by-one"):
        given = preset, tmp_path, overrides or {}
        return common.times_faster(runs, "MAS-2", worse, "dk", *given)

    assert faster().tolist() == [3.0]  # nothing was timed: the records
    timed = [{"subject": f"dk: {m} (d k)", "median": x} for m, x in (("MAS-2", 0.5), ("HOA-2", 4))]
    (tmp_path / "benchmarks").mkdir()
    record = tmp_path / "benchmarks" / "machine.json"
    record.write_text(json.dumps({"subjects": {"method_cost": timed}}))
    assert faster().tolist() == [2.0] and faster(worse="HOA-2").tolist() == [8.0]
    assert common.judge(faster(), least=1.75) == (common.HOLDS, "2.00 (timed in one run)")
    assert faster(preset="smoke").tolist() == faster(overrides={"fl.lr": 1}).tolist() == [3.0]
    assert faster(worse="all-in-one").empty or faster(worse="all-in-one").isna().all()
