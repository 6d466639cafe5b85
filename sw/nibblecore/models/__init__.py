"""Example networks. Each module needs torch; nothing imports them but training."""
