"""Where trajectories run: in this process, on local processes, on Dask or Slurm, on a GPU."""
