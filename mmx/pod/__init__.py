"""TPU pods through the gcloud program: request, install, run, watch, resume, delete."""
