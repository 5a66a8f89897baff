#!/usr/bin/env bash
# sbatch configs/slurm.sh --recipe imagenet_lt_resnet50 [--OPTION VALUE ...]
#
# Two machines with four GPUs each; change the lines below to match yours. Two minutes before its time limit, or when
# it is preempted, the job saves a checkpoint and requeues itself. It then resumes from that checkpoint.
#SBATCH --job-name=ride_bf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -u

recipe_output="outputs/${SLURM_JOB_NAME}-${SLURM_JOB_ID}"  # a requeued job keeps its id
resume=()
[ -d "$recipe_output/last" ] && resume=(--resume)
options=(--output_dir "$recipe_output" --num_workers 8 ${resume[@]+"${resume[@]}"} "$@")
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Signals go to the training processes and not to Accelerate's launcher, which would end them before they have saved.
# SLURM_NODEID is known only inside a task, so a shell reads it there. The words after "launch" are its arguments.
srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file configs/several_machines.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 4)) \
    --main_process_ip "$first_node" --main_process_port 29500 \
    train_accelerate.py "${options[@]}" &
step=$!

again=false
requeue() {
    again=true
    # Select processes by the job id in their environment: other jobs may train here, and 123 also matches 1234.
    srun --overlap --ntasks-per-node=1 bash -c '
        for process in $(pgrep -f "[-]u train_accelerate.py"); do
            if tr "\0" "\n" < "/proc/$process/environ" | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID"; then
                kill -USR1 "$process"
            fi
        done 2> /dev/null' || true
}
trap requeue USR1 TERM
wait "$step"
code=$?
if [ "$again" = true ]; then
    wait "$step"  # the trap ended the first wait; wait until the checkpoint is written
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
