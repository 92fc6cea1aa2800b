#!/usr/bin/env bash
# What is AdaZeta's adapter, and what is its schedule: either without the other, on movie reviews. Ten steps are an epoch.
# What is done is not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
addax-ds compare launch/reproduce/compare_adazeta_ablation.yaml --output "${OUTPUT:-runs/adazeta_ablation}"
