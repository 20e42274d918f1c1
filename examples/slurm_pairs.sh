#!/usr/bin/env bash
# Distil each slot of a configuration in a Slurm job of its own, then train the student end to end and write the report.
#   bash examples/slurm_pairs.sh CONFIG SLOTS [options of sbatch]
# The run folder is runs/<name of the configuration's file>; it has to lie on a disk that all nodes share.
set -euo pipefail

config=$1 slots=$2
shift 2
run=runs/$(basename "$config" .yaml)

# Teacher, meta model, hybrids and the first pair. A folder belongs to one process at a time, so the others come after it.
first=$(sbatch --parsable "$@" --wrap "m2mkd distill $config --slot 0 output=$run")

# A task for each further slot, in a copy of the run folder; what it made moves into the run folder as a whole.
# A requeued task finds its copy and goes on in it.
read -r -d '' task <<END || true
set -e
copy=$run.slot\$SLURM_ARRAY_TASK_ID
test -d \$copy || { cp -r $run \$copy.partial && mv \$copy.partial \$copy; }
m2mkd distill $config --slot \$SLURM_ARRAY_TASK_ID output=\$copy
mv \$copy/steps/m2mkd/pair\$SLURM_ARRAY_TASK_ID $run/steps/m2mkd/ && rm -r \$copy
END
pairs=$(sbatch --parsable "$@" --dependency=afterok:"$first" --array=1-$((slots - 1)) --wrap "$task")

last=$(sbatch --parsable "$@" --dependency=afterok:"$pairs" --wrap "m2mkd run $config output=$run")
echo "jobs: $first, then $pairs, then $last; the report will be $run/report.md"
