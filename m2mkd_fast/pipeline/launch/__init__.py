"""Where a run's steps are done: in this process, in workers of this machine, in process groups, in a cluster's jobs."""
