"""Our own files: checkpoints, packed models, adapters, workdirs."""
