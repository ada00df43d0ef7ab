"""The report's stages of MiniMax-Text-01, each on a TPU slice that holds it (``launch.plan --stages=all``)."""
