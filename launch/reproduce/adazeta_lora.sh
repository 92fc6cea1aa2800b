#!/usr/bin/env bash
# AdaZeta against zeroth-order LoRA with fixed numbers of directions, and its adapter and its schedule each without the other,
# on movie reviews. What is done is not run again. Arguments go to the command.
set -euo pipefail
cd "$(dirname "$0")/../.."
addax-ds compare launch/reproduce/compare_adazeta_lora.yaml --output "${OUTPUT:-runs/adazeta_lora}" "$@"
