"""The steps of the chain, and several processes at once."""

import json
import os
import subprocess
import sys

from blm_core.config import ROOT

CODE = """
from blm_core import config, pipeline
if __name__ == "__main__":
    print(pipeline.tokens(config.load("smoke"))["tokens"]["train"])
"""


def test_processes_that_start_together_prepare_once_and_agree(tmp_path):
    script = tmp_path / "prepare.py"
    script.write_text(CODE)
    environment = os.environ | {"BLM_BUILD": str(tmp_path / "build"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sum("cleaning" in err for _, err in said) == 1
    manifest = json.loads((tmp_path / "build" / "smoke" / "tokens" / "manifest.json").read_text())
    assert int(said[0][0]) == manifest["tokens"]["train"]
