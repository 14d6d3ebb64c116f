"""Our own servers of the environments. `python -m integrations.openenv.servers.echo_env --port 8000` runs one by hand.

openenv.core imports gradio for a web page that is not served here, which takes two of the three seconds of a start. It
works without gradio, so this package blocks that import in every process that imports it.
"""

import sys

sys.modules.setdefault("gradio", None)  # ty: ignore[no-matching-overload]
