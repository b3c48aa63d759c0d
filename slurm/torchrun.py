"""torchrun that ends with the status of the rank that failed first; its own would be 1 for every failure."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)  # a rank killed by a signal, told as a shell would
    except SignalException as ended:  # Slurm ends this node because another failed: no traceback for that
        sys.exit(128 + ended.sigval)
