"""What deepspeed, torchrun, mpirun and srun start: the train command, nothing more."""

import sys

from addax_ds.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
