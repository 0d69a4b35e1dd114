"""`stdit train` on CPUs with shards in the host's memory, which training leaves out there."""

import sys

from stdit.recipes import train

if __name__ == "__main__":
    train.effective = lambda config, device, processes: config
    sys.exit(train.run(sys.argv[1:]))
