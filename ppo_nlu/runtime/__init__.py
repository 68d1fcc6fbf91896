"""What every program needs: command line, checkpoints, optimizer, logs."""
