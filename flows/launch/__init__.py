"""How a stage is started on its ranks: torchrun on this machine or several, Slurm, Kubernetes."""
