"""Raises one clear error on import if Bytewax is missing. Every module that uses Bytewax imports this first.

Bytewax has wheels up to Python 3.12, so it is not installed with this package on later versions.
"""

import sys
from importlib.util import find_spec

from pgoutput_source.errors import BytewaxMissing

if find_spec("bytewax") is None:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    install = "pip install bytewax" if sys.version_info < (3, 13) else "use Python 3.11 or 3.12"
    raise BytewaxMissing(
        f"PgOutputSource, the sinks, the operators and run() need Bytewax, which is not installed for {python}",
        hint=f"{install}. Without Bytewax you can use PgOutputReader, peek, ChangeEvent, read, current, the embedded "
        "servers and the commands check and resync",
    )
