"""The child process of `sparseserve serve`."""

import sys

from sparseserve.server.launch.serve import main
from sparseserve.server.launch.supervise import stop_with_parent

if __name__ == "__main__":
    stop_with_parent()
    sys.exit(main(sys.argv[1:]))
