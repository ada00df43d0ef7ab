#!/usr/bin/env bash
# Installs Cloud Storage FUSE on a host of a pod (Debian or Ubuntu), from Google's package archive.
set -euo pipefail

keys=/usr/share/keyrings/cloud.google.asc archive=https://packages.cloud.google.com/apt
curl --fail --silent --show-error "$archive/doc/apt-key.gpg" | sudo tee "$keys" >/dev/null
echo "deb [signed-by=$keys] $archive gcsfuse-$(lsb_release -c -s) main" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
sudo apt-get update --quiet
sudo apt-get install --yes --quiet gcsfuse
