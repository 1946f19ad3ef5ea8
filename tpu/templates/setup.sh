#!/bin/bash
# Installs Winnow from an archive of its repository into ~/winnow, with its own Python. Run again, it
# updates both; logs/ is kept.
set -euo pipefail
mkdir -p ~/winnow
tar --extract --gzip --file ~/winnow.tar.gz --directory ~/winnow
cd ~/winnow
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl --location --silent --fail https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || uv venv --python {{python}} .venv
uv pip install --python .venv/bin/python --editable '.[{{extra}}]'
.venv/bin/python -c 'import importlib.metadata as m; print("jax", m.version("jax"), "is installed")'
