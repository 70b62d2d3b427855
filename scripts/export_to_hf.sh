#!/usr/bin/env bash
# A checkpoint as a folder that loads by itself anywhere, and on request a repository on the Hugging Face hub.
#
#   scripts/export_to_hf.sh --checkpoint outputs/rl/checkpoint-best --output_dir exports/vtg-4b --merge_lora true
#
# Every flag goes to inference/export.py; --help lists them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
find_python
exec "$python" "$root/inference/export.py" "$@"
