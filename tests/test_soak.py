"""The short form of `make soak`, and its end before its time.

Servers of both kinds, in `make test-all` only: about 5 minutes.
"""

import json

import psutil
import pytest
from conftest import ROOT, run_script
from servers import check_nothing_is_left, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.skipif(
        not (ROOT / "demo" / "checkpoint" / "progressive.json").is_file(),
        reason="demo/checkpoint is not there: make demo/checkpoint/progressive.json",
    ),
]


def test_nothing_is_left_of_a_soak_that_is_ended(start, tmp_path, tmp_path_factory):
    options = ["--json", tmp_path / "soak.json"]
    # Whether torch has made its own folder by then is a matter of time.
    env = {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("torch"))}
    soak = start.process(ROOT / "tests" / "soak.py", *options, env=env)
    soak.wait_for(lambda: any(path.read_text() for path in tmp_path.glob("soak-*/stock.log")))
    started = psutil.Process(soak.process.pid).children(recursive=True)

    def ended():
        soak.process.terminate()  # as `timeout` and impatient users do: more than once
        return soak.process.poll() is not None

    wait_for(ended)
    assert soak.process.returncode == 143, soak.tail()
    check_nothing_is_left(started)
    assert list(tmp_path.iterdir()) == [soak.log]


def test_short_soak(tmp_path):
    out = tmp_path / "soak.json"
    options = ["--starts", "2", "--streams", "16", "--transitions", "30", "--kills", "3", "--json", out]
    done = run_script(ROOT / "tests" / "soak.py", *options, timeout=1800)
    assert out.is_file(), done.stdout + done.stderr[-4000:]
    found = json.loads(out.read_text())
    starts, too_short = [*found["starts"], found["last"]], found["counts"].pop("not_crossed")
    assert not any(found["counts"].values()), found
    assert [row["kind"] for row in starts] == ["layers", "planes", "layers"]
    assert all(row["transitions"] in (1, 2) for row in starts)  # stage 2 may be passed over
    assert any(row["checked"] for row in starts)  # where others compute, streams may end before stage 3 comes
    assert done.returncode == bool(too_short)
    assert found["transitions"]["growth"] < 0.05  # of ten transitions: 2.1 % was seen; `make soak` finds below 1 %
