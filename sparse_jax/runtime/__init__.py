"""What outlives a process: hosts that find each other, checkpoints, workdirs."""
