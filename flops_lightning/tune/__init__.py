"""Finding settings: the width of the noise at each site, and the learning rate."""
