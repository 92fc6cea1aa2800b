#!/usr/bin/env bash
# AdaZeta's schedule of directions, alpha by beta, on movie reviews. Ten steps are an epoch.
# What is done is not run again. Arguments go to the command.
set -euo pipefail
cd "$(dirname "$0")/../.."
addax-ds compare launch/reproduce/compare_adazeta_schedule.yaml --output "${OUTPUT:-runs/adazeta_schedule}" "$@"
