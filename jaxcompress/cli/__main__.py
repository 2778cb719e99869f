"""python -m jaxcompress.cli"""

import sys

from jaxcompress.cli import main

sys.exit(main())
