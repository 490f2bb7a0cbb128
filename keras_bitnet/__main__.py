"""`python -m keras_bitnet` is the command line."""

import sys

from keras_bitnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
