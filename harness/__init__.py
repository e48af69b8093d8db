"""The parts that the commands share, one technique each."""
