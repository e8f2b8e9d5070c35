"""``darkroom ui``: a studio in the browser that generates images, edits them, and takes blind votes."""

import os

# Gradio reads this when it is imported: without it a page would report its start to Gradio's servers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
