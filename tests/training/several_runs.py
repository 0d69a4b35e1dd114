"""Several `stdit train` one after the other in the same processes, which start once for all of them.

Shards may wait in the host's memory, which training leaves out on CPUs.

python -m torch.distributed.run --nproc-per-node 2 several_runs.py '[["t.yaml", "name=a"], ["t.yaml", "name=b"]]'
"""

import json
import os
import sys

from stdit.recipes import train

if __name__ == "__main__":
    leave = os._exit
    os._exit = lambda code: None  # by which a run of several processes leaves
    train.effective = lambda config, device, processes: config
    for arguments in json.loads(sys.argv[1]):
        if code := train.run(arguments):
            leave(code)
    sys.stdout.flush()
    leave(0)
