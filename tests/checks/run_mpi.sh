#!/bin/sh
# run_mpi.sh DIRECTORY: DIRECTORY/mpi on 1, 2 and 4 processes.
if [ ! -x "$1/mpi" ]; then
    echo 'no mpicc here (Debian: apt-get install libopenmpi-dev openmpi-bin)'
    exit 1
fi
# Open MPI wants to be told where processes share cores, and who runs them; MPICH ignores these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_hwloc_base_binding_policy=none
for processes in 1 2 4; do
    mpirun -n $processes "$1/mpi" || exit 1
done
