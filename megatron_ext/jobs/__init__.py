"""What a batch script is too short for: the journal of a run's jobs, what comes after each of them,
whether nodes are well, and the state of a run. Needs no torch (but a node's health on GPUs does).

    python -m megatron_ext.jobs begin CONFIG [a.b=c ...]    # slurm/pretrain.sbatch calls these
    python -m megatron_ext.jobs end RUN --code 1
"""
