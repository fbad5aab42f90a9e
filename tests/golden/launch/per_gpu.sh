#!/bin/bash

# Parameters
#SBATCH --chdir=/shared/runs/digits-20260131-142501-3f9c
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=4
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/digits-20260131-142501-3f9c/logs/batch.log
#SBATCH --requeue
#SBATCH --signal=B:USR2@90
#SBATCH --time=10
#SBATCH --wait-all-nodes=1
#SBATCH --wckey=submitit

# setup
mkdir -p /shared/runs/digits-20260131-142501-3f9c/logs/"restart-${SLURM_RESTART_COUNT:-0}"
ln -sfn "restart-${SLURM_RESTART_COUNT:-0}" /shared/runs/digits-20260131-142501-3f9c/logs/current
rm -f /shared/runs/digits-20260131-142501-3f9c/stop /shared/runs/digits-20260131-142501-3f9c/stopped /shared/runs/digits-20260131-142501-3f9c/failure.json /shared/runs/digits-20260131-142501-3f9c/result.json /shared/runs/digits-20260131-142501-3f9c/exit_code
trap 'touch /shared/runs/digits-20260131-142501-3f9c/stop' USR2
srun() {
  command srun "$@" &
  while kill -0 "$!" 2>/dev/null; do wait "$!"; done
  wait "$!"
}
for folder in "${SLURM_TMPDIR:-}" "${TMPDIR:-}"; do
  case $folder in
    /tmp | /tmp/* | *[,:]*) ;;
    /*) [ ! -d "$folder" ] || export APPTAINER_BIND="${APPTAINER_BIND:+$APPTAINER_BIND,}$folder" ;;
  esac
done
for name in $(compgen -e); do
  case $name in HOME | USER | LOGNAME | SHELL | PATH | LD_LIBRARY_PATH | PWD | TMPDIR | TERM | LANG | LC_* | TZ | SLURM_* | SLURMD_* | PMI_* | PMI2_* | PMIX_* | MUNGE* | KRB5CCNAME | XDG_RUNTIME_DIR | DBUS_SESSION_BUS_ADDRESS | APPTAINER* | SINGULARITY* | ENROOT_* | HPCUTILS_* | SUBMITIT_* | CUDA_VISIBLE_DEVICES | CUDA_MPS_* | NVIDIA_* | ROCR_VISIBLE_DEVICES | HIP_VISIBLE_DEVICES | GPU_DEVICE_ORDINAL | UCX_* | FI_* | NCCL_* | RCCL_* | PSM2_* | HFI_* | MLX5_* | http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY) ;; *) unset "$name" 2>/dev/null ;; esac
done

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/digits-20260131-142501-3f9c/.submitit/%j_%t_log.out --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task=4 --output=/shared/runs/digits-20260131-142501-3f9c/logs/current/rank-%t.log --open-mode=append apptainer --quiet exec --no-home --no-mount cwd --pwd / --no-eval --nv --bind /shared/runs:/shared/runs --bind /shared/jobs/digits:/shared/jobs/digits:ro --env OMPI_MCA_btl_vader_single_copy_mechanism=none --env PMIX_MCA_gds=hash --env PYTHONPATH= --env PYTHONHOME= --env PYTHONNOUSERSITE=1 --env OMPI_MCA_mpi_yield_when_idle=1 --env TF_CPP_MIN_LOG_LEVEL=2 /images/tf.sif python3 -u -m submitit.core._submit /shared/runs/digits-20260131-142501-3f9c/.submitit


# teardown
code=$?
if [ -f /shared/runs/digits-20260131-142501-3f9c/stopped ]; then
  code=75
  [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] || { scontrol requeue "$SLURM_JOB_ID" && exit 0; }
elif [ "$code" -ne 0 ] && [ -f /shared/runs/digits-20260131-142501-3f9c/failure.json ]; then
  cause=$(sed -n 's/^ *"exit_code": \([0-9]*\).*/\1/p' /shared/runs/digits-20260131-142501-3f9c/failure.json)
  code=${cause:-$code}
fi
if [ "$code" -eq 0 ] && [ ! -f /shared/runs/digits-20260131-142501-3f9c/result.json ]; then code=9; fi
echo "$code" > /shared/runs/digits-20260131-142501-3f9c/exit_code.part && mv /shared/runs/digits-20260131-142501-3f9c/exit_code.part /shared/runs/digits-20260131-142501-3f9c/exit_code
exit "$code"