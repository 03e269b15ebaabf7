import sys

from varl.cli import main

sys.exit(main())
