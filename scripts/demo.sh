#!/usr/bin/env bash
# The main job: one student, four ways, one table. A run that is finished is kept, one that was stopped goes on.
set -euo pipefail
kdrl=$1 runs=$2
arm() {
  local out=$runs/$1
  shift
  if [[ -f $out/report.html ]]; then
    echo "== $out is finished (remove it to run it again)"
  elif [[ -f $out/recipe.yaml ]]; then
    "$kdrl" train --resume "$out"
  else
    echo "== $out"
    "$kdrl" train recipes/demo.yaml "$@" --output "$out"
  fi
}
arm grpo method=grpo
arm opd method=opd
arm kdrl method=kdrl
arm kdrl-annealed method=kdrl-annealed objective.distill.mask=wrong_response
"$kdrl" report "$runs"/*/
