#!/usr/bin/env bash
# AdaZeta's adapters, rank by bottleneck, on movie reviews.
# What is done is not run again. Arguments go to the command.
set -euo pipefail
cd "$(dirname "$0")/../.."
addax-ds compare launch/reproduce/compare_adazeta_size.yaml --output "${OUTPUT:-runs/adazeta_size}" "$@"
