#!/usr/bin/env bash
# AdaZeta against zeroth-order LoRA with a fixed number of directions, on movie reviews. Ten steps are an epoch.
# What is done is not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
addax-ds compare launch/reproduce/compare_adazeta_lora.yaml --output "${OUTPUT:-runs/adazeta_lora}"
